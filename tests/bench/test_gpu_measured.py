"""The table of a GPU, with times of our choosing: what runs is what is said to, and losing rows say so."""

import jax.numpy as jnp
import pytest
from qwix_kernels import chips

from bench import device_trace, gpu_measured, gpu_problems, qdot_tables
from bench.gpu_problems import Cell
from bench.shapes import scheme

H100 = chips.chip("h100")
LIMITS = {"copy_gbps": 2600.0, "bf16_tflops": 750.0}


@pytest.fixture
def timed(monkeypatch):
    """Names of the programs that were timed, with how many sets of arguments they take in turn."""
    seen = {}

    def times(programs, rounds):
        seen.update({name: len(arguments) for name, (_, arguments) in programs.items()})
        for fn, arguments in programs.values():
            assert fn(*arguments[-1]).shape == (1, *seen["shape"])
        chosen = {"ours": 30.0, "bf16": 60.0, "same": 20.0, "dot": 25.0}
        return {name: chosen[name] for name in programs}

    monkeypatch.setattr(device_trace, "time_compiled", times)
    monkeypatch.setattr(gpu_measured, "ROTATE_BYTES", 3 * 256 * 512)
    return seen


LARGE = [pytest.param(name, marks=pytest.mark.large) for name in ("wf8af8_b128", "wnf4a16_g64")]


@pytest.mark.parametrize("name", ["w8a8", "w4a16_g128", *LARGE])
def test_a_row(name, timed, capsys):
    timed["shape"] = (16, 256)
    (row,) = gpu_measured.measure(H100, [Cell("h100", name, 16, 512, 256)], 2)
    assert "error" not in row, row
    assert row["difference"] < 0.02 and row["loses"] and row["memory_bound"]
    bits = {"w4a16_g128": 4, "wnf4a16_g64": 4}.get(name, 8)
    assert timed["ours"] == timed["same"] == 3 * 8 // bits and timed["bf16"] == 2
    assert ("dot" in timed) == (row["xla_dot_us"] is not None) == row["eight_bits"] == ("a16" not in name)
    qdot_tables.show(
        {"gpu": [row], "limits": LIMITS, "device_kind": "NVIDIA H100", "versions": {"jax": "0.0"}}
    )
    printed = capsys.readouterr().out
    assert "Measured on the GPU" in printed and "loses" in printed and "2600 GB/s" in printed


def test_what_fails_is_a_row(timed):
    timed["shape"] = (1, 1)
    rows = list(gpu_measured.measure(H100, [Cell("h100", "w4a16_g128", 16, 100, 256)], 2))
    assert "the tile 128 does not divide K=100" in rows[0]["error"]


def test_cells_are_those_that_are_asked_for():
    found = gpu_problems.asked("h100", [(16, 256, 512), (64, 256, 512)], ["w8a8"])
    assert found == [Cell("h100", "w8a8", m, 256, 512) for m in (16, 64)]


def test_shares():
    row = {"bytes": 2.6e6, "us": 2.0, "m": 100, "k": 1000, "n": 1000, "eight_bits": False}
    copied, rate = qdot_tables.shares(row, LIMITS)
    assert copied == 0.5 and rate == pytest.approx(100 / 750)
    assert qdot_tables.shares(row | {"eight_bits": True}, LIMITS)[1] == pytest.approx(50 / 750)


def test_default_cells():
    cells = gpu_measured.default_cells("h100")
    assert {(c.scheme, c.m) for c in cells} == {(s, m) for s in gpu_problems.SCHEMES for m in (4096, 16)}
    for cell in cells:
        assert not scheme(cell.scheme).misfit(cell.k, cell.n)
    assert jnp.bfloat16 == gpu_problems.operands(scheme("w8a8"), 16, 256, 128)[0].dtype
