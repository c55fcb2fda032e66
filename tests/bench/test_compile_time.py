"""bench.compile_time: what it compiles, its ratios, its check. No time is asserted here."""

import pathlib
import subprocess
import sys

import jax
import pytest

from bench import compile_ratios

ROOT = pathlib.Path(__file__).parents[2]
HLO = """
ENTRY %main (a: f32[4]) -> f32[4] {{
  %a = f32[4]{{0}} parameter(0)
{lines}
}}"""
ADD = "  %b{i} = f32[4]{{0}} add(%a, %a)"


def test_ratios_are_of_programs_compiled_in_turn(monkeypatch):
    seconds = {"float": iter([9.0, 2.0, 4.0]), "w8a8": iter([1.0, 6.0])}
    lines = {"float": 4, "w8a8": 6}
    asked = []

    def fake(target, name, _):
        asked.append((target, name))
        return next(seconds[name]), HLO.format(lines="\n".join(ADD.format(i=i) for i in range(lines[name])))

    monkeypatch.setattr(compile_ratios, "program", lambda scheme, blocks, length: (scheme, ()))
    monkeypatch.setattr(compile_ratios, "compiled_text", fake)
    (row,) = compile_ratios.measure(["v5e"], ["w8a8"], blocks=3, length=8, rounds=2)
    # The first is thrown away; then 1/2 and 6/4.
    assert (row["low"], row["ratio"], row["high"]) == (0.75, 1.0, 1.25)
    assert row["instructions_ratio"] == 1.5 and row["kernels"] == row["distinct_kernels"] == 0
    assert [name for _, name in asked] == ["float", "float", "w8a8", "float", "w8a8"]


def test_both_programs_are_the_model_in_bfloat16():
    for scheme in ("float", "int8"):
        fn, (state, tokens) = compile_ratios.program(scheme, blocks=1, length=4)
        dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(state)}
        assert dtypes == ({"bfloat16"} if scheme == "float" else {"bfloat16", "int8"})
        assert jax.eval_shape(fn, state, tokens).shape == (1, 4, 49152)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--targets", "v4"], "no v4; there are cpu, v5e"),
        (["--schemes", "int3"], "no int3; there are float"),
    ],
)
def test_a_command_that_makes_no_sense(arguments, message):
    command = [sys.executable, "-m", "bench.compile_time", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and message in done.stdout + done.stderr
