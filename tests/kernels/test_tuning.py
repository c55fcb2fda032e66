"""Where block sizes come from, how far a tuned entry reaches, and that no file can break a program."""

import dataclasses
import json
import multiprocessing
import threading
import warnings

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qwix_kernels import chips, dispatch, tuning, tuning_files
from qwix_kernels.matmul import RowQuantize, Tensor, matmul, problem_of
from qwix_kernels.matmul.tpu_config import Config as TpuConfig
from qwix_kernels.problem import Epilogue, MatmulProblem, Operand, RMSNorm

V5E = chips.CHIPS["v5e"]
PROBLEM = MatmulProblem(
    8, 64, 32, Operand("bfloat16", 1, 8), Operand("int4", 1, 32, "float32", 1, 32), "bfloat16"
)
IMPLEMENTATION = "mosaic_tpu"


@dataclasses.dataclass(frozen=True)
class Config:
    block: int = 8

    def refit(self, tuned, problem):
        return self if problem.n >= 32 else None


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """The user's cache file and the folder of the packaged tables, both empty."""
    monkeypatch.setenv("QWIX_TUNING_CACHE", str(tmp_path / "user.json"))
    monkeypatch.delenv("QWIX_TUNING_WARN", raising=False)
    monkeypatch.setattr(tuning, "_TABLES", tmp_path)
    monkeypatch.setattr(tuning, "_FAR_SAID", set())
    monkeypatch.setattr(tuning_files, "_WARNED", set())
    tuning_files._read.cache_clear()
    tuning_files._table.cache_clear()
    return tmp_path


def found(explicit=None, problem=PROBLEM):
    return [
        (x.config, x.source, x.match) for x in tuning.candidates(problem, V5E, explicit, Config, "kernel")
    ]


def package(folder, entries, implementation="kernel"):
    entries = {(implementation, tuning.key(p)): e for p, e in entries}
    tuning_files.update(folder / "v5e.json", entries)


def sized(m, k, n, **changes):
    """A matmul of the same facts with other sizes."""
    lhs, rhs = dataclasses.replace(PROBLEM.lhs, free=m), dataclasses.replace(PROBLEM.rhs, free=n)
    return dataclasses.replace(PROBLEM, **{"m": m, "k": k, "n": n, "lhs": lhs, "rhs": rhs, **changes})


def w8a8(m, k=4096, n=4096, scale="bfloat16"):
    shape = jax.ShapeDtypeStruct
    w = Tensor(shape((1, k, n), jnp.int8), shape((1, 1, n), scale))
    return problem_of(shape((1, m, k), jnp.bfloat16), w, quantize_lhs=RowQuantize("int8", 127.5))


def test_the_order_of_sources(files):
    assert found() == []
    package(files, [(PROBLEM, {"config": {"block": 16}})])
    assert found() == [(Config(16), "packaged", "exact")]
    assert tuning.save(PROBLEM, V5E, "kernel", Config(32)) == files / "user.json"
    assert found()[0] == (Config(32), "user cache", "exact")
    with tuning.use(Config(64)):
        assert found()[0] == (Config(64), "context", "")
        with tuning.use(Config(65)):
            assert found()[0][0] == Config(65)
        assert found()[0][0] == Config(64)
        assert found(Config(128)) == [(Config(128), "explicit", "")]
    assert [source for _, source, _ in found()] == ["user cache", "packaged"]


def test_the_nearest_entry_comes_first_and_the_users_wins_a_tie(files):
    package(
        files, [(sized(16, 64, 32), {"config": {"block": 1}}), (sized(16, 96, 32), {"config": {"block": 2}})]
    )
    tuning.save(sized(16, 64, 48), V5E, "kernel", Config(3))
    tuning.save(sized(16, 96, 32), V5E, "kernel", Config(4))
    tuning.save(sized(16, 256, 32), V5E, "kernel", Config(5))  # two octaves away
    got = found(problem=sized(9, 64, 32))
    assert [(config.block, source) for config, source, _ in got] == [
        (1, "packaged"),
        (3, "user cache"),  # 0.58 octaves, as the next ones
        (4, "user cache"),
        (2, "packaged"),
    ]
    assert [match.split(" (")[0] for *_, match in got] == ["bucket", "near", "near", "near"]
    assert got[1][2] == "near (0.58 octaves, m16 k64 n48)"
    assert found(problem=sized(17, 64, 32)) == []  # another bucket


def test_other_scale_types_and_epilogues_are_near_but_never_exact(files):
    package(files, [(w8a8(1024), {"config": {"block": 1}})])
    wide = w8a8(1024, scale="float32")
    assert tuning.key(wide) != tuning.key(w8a8(1024))
    ((config, source, match),) = found(problem=wide)
    assert (config, source) == (Config(1), "packaged") and match.startswith("near (0.00 octaves, ")
    fused = dataclasses.replace(wide, epilogue=Epilogue(bias=True, activation="silu"))
    assert [match for *_, match in found(problem=fused)] == [match]
    assert found(problem=dataclasses.replace(wide, rhs_transposed=True)) == []
    assert found(problem=dataclasses.replace(wide, epilogue=Epilogue(gate=True))) == []


def test_saving_keeps_the_other_entries(files):
    other = dataclasses.replace(PROBLEM, m=16)
    tuning.save(PROBLEM, V5E, "kernel", Config(32))
    path = tuning.save(other, V5E, "kernel", Config(48))
    assert json.loads(path.read_text())["v5e"]["kernel"] == {
        tuning.key(PROBLEM): {"config": {"block": 32}},
        tuning.key(other): {"config": {"block": 48}},
    }
    assert found()[0][0] == Config(32) and found(problem=other)[0][0] == Config(48)
    assert [p.name for p in files.iterdir()] == ["user.json"]  # nothing is left lying about


def test_a_context_of_another_kernel_is_passed_over():
    with tuning.use("not a config of this kernel"):
        assert found() == []


def test_a_context_belongs_to_its_thread():
    seen = []
    with tuning.use(Config(64)):
        thread = threading.Thread(target=lambda: seen.append(tuning.ambient()))
        thread.start()
        thread.join()
    assert seen == [None] and tuning.ambient() is None


def _save_some(which):
    for m in range(8):
        tuning.save(dataclasses.replace(PROBLEM, m=8 * which + m + 1), V5E, "kernel", Config(which + 1))


def test_threads_and_processes_lose_nothing_of_each_other(files):
    threads = [threading.Thread(target=_save_some, args=[i]) for i in range(3)]
    process = multiprocessing.get_context("fork").Process(target=_save_some, args=[3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fork in a process with threads: the child only writes a file
        process.start()
    for thread in threads:
        thread.start()
    read = threading.Thread(target=lambda: [found() for _ in range(50)])  # never half a file
    read.start()
    for thread in (*threads, read):
        thread.join()
    process.join()
    assert process.exitcode == 0
    entries = json.loads((files / "user.json").read_text())["v5e"]["kernel"]
    assert sorted(e["config"]["block"] for e in entries.values()) == sorted([1, 2, 3, 4] * 8)


NO_FILES = ("", "{", "[1]", "7", "\x00", "\ud800", "[" * 100_000)
NO_LEVELS = ('{"v5e": 3}', '{"v5e": {"kernel": []}}', '{"v5e": NaN}')
NO_ENTRIES = ("7", "[]", '{"config": 3}', '{"config": {"blok": 3}}')


@pytest.mark.parametrize(
    "text", [*NO_FILES, *NO_LEVELS, *(f'{{"v5e": {{"kernel": {{"%s": {e}}}}}}}' for e in NO_ENTRIES)]
)
def test_what_cannot_be_read_is_reported_once_and_ignored(files, text):
    (files / "user.json").write_bytes(text.replace("%s", tuning.key(PROBLEM)).encode(errors="surrogatepass"))
    with pytest.warns(UserWarning, match=r"Ignoring .*user\.json"):
        assert found() == []
    assert found() == []  # a second warning would be an error


def test_a_bad_entry_does_not_hide_the_good_ones(files):
    entries = {tuning.key(PROBLEM): {"config": {"block": 3}}, tuning.key(sized(16, 64, 32)): "big", "": {}}
    (files / "v5e.json").write_text(json.dumps({"kernel": entries}))
    with pytest.warns(UserWarning, match="m16 k64 n32"):
        assert found() == [(Config(3), "packaged", "exact")]


def test_a_file_that_is_something_else_is_not_overwritten(files):
    (files / "user.json").write_text("my notes")
    with pytest.raises(ValueError, match=r"no tuning file .*move it away"):
        tuning.save(PROBLEM, V5E, "kernel", Config())
    assert (files / "user.json").read_text() == "my notes"


def test_a_folder_in_place_of_a_file(files):
    (files / "user.json").mkdir()
    with pytest.warns(UserWarning, match="Ignoring the tuning file"):
        assert found() == []


def test_whatever_changes_a_kernel_changes_the_key():
    lhs, rhs = PROBLEM.lhs, PROBLEM.rhs
    changed = [
        dict(m=9), dict(out_dtype="float32"), dict(rhs_transposed=True), dict(precision="highest"),
        dict(quantize_lhs=RowQuantize("int8", 127.5)), dict(quantize_lhs=RowQuantize("int8", 127.5, 32)),
        dict(lhs=dataclasses.replace(lhs, dtype="float32")), dict(lhs=dataclasses.replace(lhs, batch=2)),
        dict(rhs=dataclasses.replace(rhs, zero_point=True)), dict(rhs=dataclasses.replace(rhs, tile_k=64)),
        dict(rhs=dataclasses.replace(rhs, codebook="nf4")), dict(norm=RMSNorm()),
        dict(epilogue=Epilogue(bias=True)), dict(epilogue=Epilogue(activation="silu")),
        dict(rhs=dataclasses.replace(rhs, scale_dtype="bfloat16")),
        dict(rhs=dataclasses.replace(rhs, tile_free=32)),
    ]  # fmt: skip
    keys = {tuning.key(dataclasses.replace(PROBLEM, **c)) for c in changed}
    assert len(keys | {tuning.key(PROBLEM)}) == len(changed) + 1


sizes = st.integers(1, 1 << 15)
tiles = st.integers(1, 256)
operands = st.builds(
    Operand,
    st.sampled_from(["int8", "int4", "bfloat16", "float8_e4m3fn"]),
    st.sampled_from([1, 3]),
    sizes,
    st.sampled_from([None, "float32", "bfloat16"]),
    tiles,
    tiles,
    st.booleans(),
    st.sampled_from([None, "nf4"]),
)
problems = st.builds(
    MatmulProblem,
    sizes,
    sizes,
    sizes,
    operands,
    operands,
    st.sampled_from(["bfloat16", "float32"]),
    st.booleans(),
    st.none() | st.builds(RowQuantize, st.just("int8"), st.just(127.5), st.integers(0, 256)),
    st.sampled_from([None, "high"]),
)


@given(problems)
def test_a_key_can_be_taken_apart(problem):
    parsed = tuning_files.parse_key(tuning.key(problem))
    assert (parsed.batch, parsed.m, parsed.k, parsed.n) == (problem.batch, problem.m, problem.k, problem.n)
    assert parsed.octaves(parsed) == 0
    assert parsed.kind.split("[")[0].split(" ")[0].split("->")[0] in parsed.facts


@given(problems, st.text())
def test_no_key_breaks_the_reader(problem, junk):
    for key in (
        junk,
        tuning.key(problem) + junk,
        junk + tuning.key(problem),
        tuning.key(problem)[: len(junk)],
    ):
        parsed = tuning_files.parse_key(key)
        assert parsed is None or (parsed.kind and min(parsed.batch, parsed.m, parsed.k, parsed.n) > 0)


@given(sizes, sizes)
def test_buckets(m, other):
    assert 16 <= tuning.bucket(m) <= 1024 and tuning.bucket(m).bit_count() == 1
    assert tuning.bucket(tuning.bucket(m)) == tuning.bucket(m)
    assert tuning.bucket(m) >= min(m, 1024)
    assert m > other or tuning.bucket(m) <= tuning.bucket(other)


@given(st.sampled_from([1, 16, 600, 1024, 3000]), *[st.sampled_from([192, 576, 1024, 4096, 14336])] * 4)
def test_refitted_blocks_cover_what_they_covered(m, k, n, new_k, new_n):
    for blocks in ((256, 512, k), (1024, n, 512), (8, 128, k)):
        got = TpuConfig(*blocks).refit((1024, k, n), w8a8(m, new_k, new_n))
        if got is None:
            assert new_k % blocks[2]
            continue
        assert got.block_m <= max(blocks[0], 8) and got.block_m < m + 64
        assert got.block_n <= new_n and (got.block_n == new_n or got.block_n == blocks[1])
        assert new_k % got.block_k == 0 and (blocks[2] < k or got.block_k == new_k)


def explain(problem):
    return dispatch.explain(problem, "v5e", implementation=IMPLEMENTATION)


def other_config(problem):
    """A config that fits, other than the heuristic's, and whose estimate is near."""
    own = explain(problem).config
    return dataclasses.replace(own, block_n=256 if own.block_n != 256 else 512)


def test_explain_says_where_the_blocks_come_from(files):
    problem = w8a8(1024)
    got = explain(problem)
    assert (got.config_source, got.tuned) == ("heuristic", "") and "tuned: no" in str(got)
    config = other_config(problem)
    package(files, [(problem, {"config": dataclasses.asdict(config)})], IMPLEMENTATION)
    got = explain(problem)
    assert (got.config, got.config_source, got.tuned) == (config, "packaged", "exact")
    assert "tuned: exact" in str(got)
    got = explain(w8a8(2048))
    assert (got.config, got.config_source, got.tuned) == (config, "packaged", "bucket")
    got = explain(w8a8(1024, n=5120))
    assert got.config_source == "packaged" and got.tuned == "near (0.32 octaves, m1024 k4096 n4096)"
    assert explain(w8a8(1024, n=16384)).config_source == "heuristic"
    assert explain(w8a8(16)).config_source == "heuristic"


def test_a_search_that_the_heuristic_won_stands_for_its_neighbours(files):
    heuristic = explain(w8a8(1024)).config
    package(files, [(w8a8(1024), {"static_us": 1.0})], IMPLEMENTATION)
    tuning.save(w8a8(1024, n=6144), V5E, IMPLEMENTATION, other_config(w8a8(1024, n=6144)))
    got = explain(w8a8(1024))
    assert (got.config, got.config_source, got.tuned) == (heuristic, "heuristic", "exact")
    assert explain(w8a8(800)).tuned == "bucket"


def test_borrowed_blocks_must_fit_and_look_no_worse(files):
    tall = TpuConfig(1024, 4096, 4096)  # 16 MiB of weights in one block: fits; 8192 columns do not
    package(files, [(w8a8(1024), {"config": dataclasses.asdict(tall)})], IMPLEMENTATION)
    assert explain(w8a8(1024)).config == tall
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        too_big = w8a8(1024, 8000, 4096)
        assert explain(too_big).config_source == "heuristic"
    slow = TpuConfig(8, 128, 4096)
    tuning.save(w8a8(1024), V5E, IMPLEMENTATION, slow)
    assert explain(w8a8(1024)).config == slow  # the user's own, for this very problem
    got = explain(w8a8(1000))  # borrowed, it looks worse than the formula's; the packaged one comes next
    assert got.config != slow


def test_an_exact_entry_that_does_not_fit_is_reported_once(files):
    package(
        files, [(w8a8(1024), {"config": {"block_m": 7, "block_n": 128, "block_k": 4096}})], IMPLEMENTATION
    )
    with pytest.warns(UserWarning, match="Ignoring the tuned config .*packaged.* does not fit: block_m"):
        assert explain(w8a8(1024)).config_source == "heuristic"
    assert explain(w8a8(1024)).config_source == "heuristic"


def test_far_from_everything_tuned_is_said_once_where_it_matters(files, monkeypatch):
    package(files, [(w8a8(1024, 512, 512), {"static_us": 1.0})], IMPLEMENTATION)
    dispatch.warn_of_untuned(explain(w8a8(1024)), V5E)  # who does not tune is not told to
    tuning.save(w8a8(1024, 512, 256), V5E, IMPLEMENTATION, TpuConfig(512, 256, 512))
    say = lambda p: dispatch.warn_of_untuned(explain(p), V5E)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        say(w8a8(1024, 1024, 1024))  # within two octaves
        say(w8a8(16, 4096, 128))  # a small problem
        say(w8a8(1024, 512, 512))
        say(dataclasses.replace(w8a8(1024), rhs_transposed=True))  # a kind of which nothing was tuned
    with pytest.warns(UserWarning, match=r"m1024 k4096 n4096.* nothing within 6\.0 octaves.*bench\.tune"):
        say(w8a8(1024))
    say(w8a8(1024, 4096, 8192))  # the same kind: said already
    monkeypatch.setenv("QWIX_TUNING_WARN", "1")
    with pytest.warns(UserWarning, match="nothing of its kind"):
        say(dataclasses.replace(w8a8(16, 4096, 128), rhs_transposed=True))
    monkeypatch.setenv("QWIX_TUNING_WARN", "0")
    say(w8a8(1024, 8192, 8192))


def test_a_lookup_does_not_change_a_result(files):
    lhs = jnp.ones((1, 16, 256), jnp.bfloat16)
    w = Tensor(jnp.ones((1, 256, 128), jnp.int8), jnp.ones((1, 1, 128), jnp.bfloat16))
    (files / "user.json").write_text("{")
    assert (matmul(lhs, w)[0, 0, 0]) == 256.0
