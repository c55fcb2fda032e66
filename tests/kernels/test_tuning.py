"""Where block sizes come from, and that no file can break a program."""

import dataclasses
import json

import pytest
from qwix_kernels import chips, tuning
from qwix_kernels.problem import MatmulProblem, Operand, RowQuantize

V5E = chips.CHIPS["v5e"]
PROBLEM = MatmulProblem(
    8, 64, 32, Operand("bfloat16", 1, 8), Operand("int4", 1, 32, "float32", 1, 32), "bfloat16"
)


@dataclasses.dataclass(frozen=True)
class Config:
    block: int = 8


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """The user's cache file and the folder of the packaged tables, both empty."""
    monkeypatch.setenv("QWIX_TUNING_CACHE", str(tmp_path / "user.json"))
    monkeypatch.setattr(tuning, "_TABLES", tmp_path)
    monkeypatch.setattr(tuning, "_WARNED", set())
    tuning._read.cache_clear()
    return tmp_path


def found(explicit=None):
    return list(tuning.candidates(PROBLEM, V5E, explicit, Config, "kernel"))


def test_the_order_of_sources(files):
    assert found() == []
    (files / "v5e.json").write_text(json.dumps({"kernel": {tuning.key(PROBLEM): {"block": 16}}}))
    assert found() == [(Config(16), "packaged")]
    assert tuning.save(PROBLEM, V5E, "kernel", Config(32)) == files / "user.json"
    assert found()[0] == (Config(32), "user cache")
    with tuning.use(Config(64)):
        assert found()[0] == (Config(64), "context")
        assert found(Config(128)) == [(Config(128), "explicit")]
    assert [source for _, source in found()] == ["user cache", "packaged"]


def test_saving_keeps_the_other_entries():
    other = dataclasses.replace(PROBLEM, m=16)
    tuning.save(PROBLEM, V5E, "kernel", Config(32))
    path = tuning.save(other, V5E, "kernel", Config(48))
    assert set(json.loads(path.read_text())["v5e"]["kernel"]) == {tuning.key(PROBLEM), tuning.key(other)}


def test_a_context_of_another_kernel_is_passed_over():
    with tuning.use("not a config of this kernel"):
        assert found() == []


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"v5e": 3}', '{"v5e": {"kernel": []}}', "\x00", '{"v5e": {"kernel": {"%s": 7}}}']
)
@pytest.mark.filterwarnings("ignore:Ignoring the tuning")
def test_a_broken_file_is_ignored(files, text):
    (files / "user.json").write_text(text.replace("%s", tuning.key(PROBLEM)))
    assert found() == []


def test_a_broken_entry_warns_once(files):
    table = {"v5e": {"kernel": {tuning.key(PROBLEM): {"blok": 3}}}}
    (files / "user.json").write_text(json.dumps(table))
    with pytest.warns(UserWarning, match="Ignoring the tuning entry .*blok"):
        assert found() == []
    assert found() == []


def test_whatever_changes_a_kernel_changes_the_key():
    lhs, rhs = PROBLEM.lhs, PROBLEM.rhs
    changed = [
        dict(m=9), dict(out_dtype="float32"), dict(rhs_transposed=True), dict(precision="highest"),
        dict(quantize_lhs=RowQuantize("int8", 127.5)), dict(quantize_lhs=RowQuantize("int8", 127.5, 32)),
        dict(lhs=dataclasses.replace(lhs, dtype="float32")), dict(lhs=dataclasses.replace(lhs, batch=2)),
        dict(rhs=dataclasses.replace(rhs, zero_point=True)), dict(rhs=dataclasses.replace(rhs, tile_k=64)),
        dict(rhs=dataclasses.replace(rhs, codebook="nf4")),
        dict(rhs=dataclasses.replace(rhs, scale_dtype="bfloat16")),
    ]  # fmt: skip
    keys = {tuning.key(dataclasses.replace(PROBLEM, **c)) for c in changed}
    assert len(keys | {tuning.key(PROBLEM)}) == len(changed) + 1
