"""bench.qdot: the profile reader on profiles of known content, ratios, targets, the reference's process."""

import doctest
import importlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from bench import cpu_ratios, cpu_targets, device_trace, measured, qdot_rows, qdot_tables
from bench.shapes import scheme

ROOT = pathlib.Path(__file__).parents[2]

# As a TPU records it: modules beside the ops and steps that they contain, and a second core.
TPU = """
planes { name: "/host:CPU" lines { name: "XLA Modules" events { metadata_id: 1 duration_ps: 9000000 } }
  event_metadata { key: 1 value { id: 1 name: "jit_ours(77)" } } }
planes { name: "/device:TPU:1" lines { name: "XLA Modules" events { metadata_id: 1 duration_ps: 8000000 } }
  event_metadata { key: 1 value { id: 1 name: "jit_ours(77)" } } }
planes { name: "/device:TPU:0"
  lines { name: "Steps" events { metadata_id: 3 duration_ps: 7000000 } }
  lines { name: "XLA Modules" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 2000000 }
    events { metadata_id: 2 offset_ps: 3000000 duration_ps: 5000000 }
    events { metadata_id: 1 offset_ps: 9000000 duration_ps: 3000000 }
    events { metadata_id: 1 offset_ps: 13000000 duration_ps: 2500000 } }
  lines { name: "XLA Ops" events { metadata_id: 3 duration_ps: 1000000 } }
  event_metadata { key: 1 value { id: 1 name: "jit_ours(77)" } }
  event_metadata { key: 2 value { id: 2 name: "jit_bf16(78)" } }
  event_metadata { key: 3 value { id: 3 name: "fusion.1" } } }
"""
# As a GPU records it: kernels on streams, each with the name of its program, here by value and by reference.
GPU = """
planes { name: "/device:GPU:0"
  lines { name: "Stream #14(MemcpyH2D)" events { metadata_id: 2 duration_ps: 500000 } }
  lines { name: "Stream #13(Compute)"
    events { metadata_id: 1 duration_ps: 2000000 stats { metadata_id: 9 str_value: "jit_ours" } }
    events { metadata_id: 1 duration_ps: 4000000 stats { metadata_id: 9 ref_value: 8 } }
    events { metadata_id: 1 duration_ps: 3000000 stats { metadata_id: 9 str_value: "jit_bf16" } } }
  lines { name: "XLA Modules" events { metadata_id: 1 duration_ps: 99000000 } }
  event_metadata { key: 1 value { id: 1 name: "gemm_kernel" } }
  event_metadata { key: 2 value { id: 2 name: "MemcpyH2D" } }
  stat_metadata { key: 8 value { id: 8 name: "jit_ours" } }
  stat_metadata { key: 9 value { id: 9 name: "hlo_module" } } }
"""


@pytest.mark.parametrize("module", ["device_trace", "cpu_ratios", "measured", "qdot_rows"])
def test_examples_in_docstrings(module):
    assert doctest.testmod(importlib.import_module(f"bench.{module}")).failed == 0


def test_runs_on_a_tpu_are_its_modules():
    times = device_trace.program_times(ProfileData.from_text_proto(TPU))
    assert times == {"jit_ours": [2.0, 3.0, 2.5], "jit_bf16": [5.0]}
    assert device_trace.medians(times, ["ours"], 3) == {"ours": 2.5}


def test_kernels_on_a_gpu_are_added_up_by_program():
    times = device_trace.program_times(ProfileData.from_text_proto(GPU))
    assert times == {"jit_ours": [6.0], "jit_bf16": [3.0]}
    assert device_trace.medians(times, ["ours", "bf16"], 2) == {"ours": 3.0, "bf16": 1.5}


def test_a_program_that_did_not_run_is_named():
    with pytest.raises(ValueError, match=r"no run of 'theirs'; it has \['jit_ours'\]"):
        device_trace.medians({"jit_ours": [1.0]}, ["theirs"], 1)


def test_a_recorded_profile_is_found_and_has_no_accelerator_here(tmp_path):
    with pytest.raises(FileNotFoundError, match="No profile in"):
        device_trace.read(str(tmp_path))
    square = jax.jit(device_trace._named("qdot_ours", lambda x: x @ x))
    x = jnp.ones((8, 8))
    square(x)
    with jax.profiler.trace(str(tmp_path)):
        square(x).block_until_ready()
    profile = device_trace.read(str(tmp_path))
    with pytest.raises(ValueError, match=r"no run of a program on an accelerator; its planes: .*/host:CPU"):
        device_trace.program_times(profile)
    events = [event for plane in profile.planes for line in plane.lines for event in line.events]
    assert "jit_qdot_ours" in {
        device_trace.stat(event, "hlo_module") for event in events
    }  # programs are called what the reader looks for


def test_programs_are_timed_in_turn(monkeypatch, tmp_path):
    profile = ProfileData.from_text_proto(TPU.replace("jit_ours", "jit_a").replace("jit_bf16", "jit_b"))
    monkeypatch.setattr(device_trace, "read", lambda folder: profile)
    ran = []
    noisy = lambda name: lambda x: jax.debug.callback(lambda: ran.append(name)) or x + 1
    programs = {name: (noisy(name), [(jnp.ones(3),)]) for name in "ab"}
    assert device_trace.time_on_device(programs, rounds=3) == {"a": 2.5, "b": 5.0 / 3}
    jax.effects_barrier()
    assert ran == ["a", "b"] * 4
    with pytest.raises(ValueError, match="2 rounds or more, got rounds=1"):
        device_trace.time_on_device(programs, rounds=1)


def test_a_table_on_a_device(monkeypatch, capsys):
    """What a TPU would print, with times of our choosing; a losing row says so."""
    seen = {}

    def fake(programs, rounds):
        for name, (fn, (arguments,)) in programs.items():
            seen[name] = jax.eval_shape(fn, *arguments)
        return {"qdot_ours": 30.0, "qdot_bf16": 20.0, "qdot_same": 60.0}

    monkeypatch.setattr(measured, "time_on_device", fake)
    rows = list(measured.measure(measured.chips.CHIPS["v5e"], ["w4a16_g128"], [(16, 256, 384)], 2))
    assert [out.shape for out in seen.values()] == [(1, 16, 384)] * 3
    assert rows[0]["loses"] and rows[0]["ratio_to_xla_bf16"] == 1.5 and rows[0]["ratio_to_xla_same_op"] == 0.5
    assert rows[0]["percent_of_floor"] == 100 * rows[0]["floor_us"] / 30
    qdot_tables.show({"device": rows})
    printed = capsys.readouterr().out
    assert "Measured on the device" in printed and "loses" in printed and "16 x 256 x 384" in printed
    assert "static" not in printed.lower().replace(rows[0]["note"].lower(), "")


def test_no_accelerator_is_here():
    assert measured.local_chip() is None


GROUP = cpu_ratios.Group(
    16,
    256,
    256,
    "float32",
    {
        "w8a8": [1.0, 1.0, 1.0, 1.0],
        "w4a8": [1.4, 1.4, 1.4, 1.2],
        "w8a8_g128": [2.0, 9.0, 9.0, 2.0],
        "float32": [4.0, 4.0, 4.0, 4.0],
        "google/qwix w8a8": [0.5, 0.5, 0.5, 0.5],
        "google/qwix w4a8": [3.0, 3.0, 3.0, 3.0],
    },
)


def test_targets_are_missed_where_three_quarters_of_the_rounds_say_so():
    found = {(v.target, v.ours): v for v in cpu_targets.verdicts([GROUP])}
    assert set(found) == {
        (cpu_targets.INT4, "w4a8"),
        (cpu_targets.SUB_CHANNEL, "w8a8_g128"),
        (cpu_targets.NO_SLOWER, "w8a8"),
        (cpu_targets.NO_SLOWER, "w4a8"),
    }
    assert not found[cpu_targets.INT4, "w4a8"].met
    assert found[cpu_targets.SUB_CHANNEL, "w8a8_g128"].met  # half of the rounds were disturbed
    assert not found[cpu_targets.NO_SLOWER, "w8a8"].met and found[cpu_targets.NO_SLOWER, "w4a8"].met
    assert "takes 2.00x of google/qwix w8a8" in str(found[cpu_targets.NO_SLOWER, "w8a8"])


def test_only_undocumented_misses_fail_the_check(monkeypatch):
    targets = lambda: {"targets": [v.as_dict() for v in cpu_targets.verdicts([GROUP])]}
    assert {t["ours"] for t in qdot_rows.undocumented(targets())} == {"w4a8", "w8a8"}
    reasons = {(cpu_targets.NO_SLOWER, "w8a8"): "because", (cpu_targets.INT4, "w4a8"): "so it is"}
    monkeypatch.setattr(cpu_targets, "DOCUMENTED", reasons)
    assert not qdot_rows.undocumented(targets())
    assert any("missed (because)" in t["said"] for t in targets()["targets"])


def test_documented_misses_name_targets_and_schemes():
    for target, name in cpu_targets.DOCUMENTED:
        assert target in cpu_targets.LIMITS and scheme(name)


FAKE = """
import jax.numpy as jnp
def quantize(x, qtype, *, channelwise_axes, tiled_axes):
    assert (tuple(channelwise_axes), qtype) in {((1,), "int8"), ((0,), "int8")}
    return x
def dot_general(x, w, numbers):
    return jnp.dot(x, w)
"""


def interpreter(folder: pathlib.Path, prelude: str, flags: str = "") -> str:
    """An executable that runs a script as this Python does, after `prelude`."""
    runner = folder / "runner.py"
    runner.write_text(f"{prelude}\nimport runpy, sys\nrunpy.run_path(sys.argv[-1], run_name='__main__')\n")
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {flags} "{runner}" "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def fake_reference(tmp_path):
    package = tmp_path / "site" / "qwix"
    info = tmp_path / "site" / "qwix-0.1.8.dist-info"
    for folder in (package, info):
        folder.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qwix\nVersion: 0.1.8\n")
    return interpreter(tmp_path, f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})")


def test_the_reference_runs_in_its_own_process_beside_ours(fake_reference):
    with cpu_ratios.Reference(fake_reference) as reference:
        assert reference.version.startswith("0.1.8 on jax ")
        shapes, schemes = [(4, 32, 16)], ["w8a8", "w8a8_g16"]
        groups = list(cpu_ratios.measure(shapes, schemes, ["float32"], rounds=3, reference=reference))
    (group,) = groups
    assert group.schemes == ("w8a8", "w8a8_g16")
    assert {len(times) for times in group.seconds.values()} == {3}
    assert {v.theirs for v in cpu_targets.verdicts(groups)} == {"google/qwix w8a8", "google/qwix w8a8_g16"}
    rows = qdot_rows.cpu_rows(groups)
    assert rows[0]["ratio_to_reference"]["median"] > 0 and rows[0]["ratio_to_float32"]["low"] > 0


def test_interpreters_without_the_reference_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Cannot run '/no/python': No such file"):
        cpu_ratios.Reference("/no/python")
    with pytest.raises(ValueError, match=r"its qwix is this project itself.*uv pip install qwix==0\.1\.8"):
        cpu_ratios.Reference(sys.executable)
    with pytest.raises(ValueError, match="No module named 'jax'"):
        cpu_ratios.Reference(interpreter(tmp_path, "", "-I -S"))
    with pytest.raises(ValueError, match="it said nothing"):
        cpu_ratios.Reference("/bin/true")


@pytest.mark.parametrize(
    "text", ["", "16", "16x16", "16x16x0", "16x16x-1", "1x2x3x4", "axbxc", "16 x 16 x 16"]
)
def test_shapes_that_are_none(text):
    with pytest.raises(ValueError, match="A shape is M x K x N"):
        qdot_rows.parse_shape(text)


def test_schemes_that_do_not_fit():
    with pytest.raises(ValueError, match="128 does not divide K=200"):
        qdot_rows.checked(["1x200x8"], ["w8a8_g128"])
    with pytest.raises(ValueError, match=r"CPU ratios are .* not of w8a8_b128"):
        qdot_rows.checked(["1x256x128"], ["w8a8_b128"], on_cpu=True)


def command(*arguments: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "LIBTPU", "XLA_", "ALLOW_"))}
    line = [sys.executable, "-m", "bench.qdot", *arguments]
    return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def test_static_prices_and_cpu_ratios_side_by_side(tmp_path):
    out = tmp_path / "qdot.json"
    done = command(
        *("--shapes", "8x128x128", "--schemes", "w8a8", "--chips", "v5e", "--rounds", "2"),
        *("--cpu_shapes", "4x32x32", "--cpu_schemes", "w8a8,w4a8", "--cpu_dtypes", "float32"),
        *("--json", str(out)),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Measured on the CPU" in done.stdout and "Static price" in done.stdout
    result = json.loads(out.read_text())
    assert set(result) == {"versions", "cpu", "targets", "static", "reference"}
    assert result["versions"]["jax"] == jax.__version__ and result["versions"]["libtpu"]
    assert [row["scheme"] for row in result["cpu"]] == ["w8a8", "w4a8"]
    assert result["static"][0]["static_us"] > 0 and result["static"][0]["xla_bf16_us"] > 0
    assert not any("us" in key for row in result["cpu"] for key in row)  # ratios, no times


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cpu_shapes", "16x16"], "A shape is M x K x N"),
        (["--schemes", "w3a16"], "Unknown scheme 'w3a16'"),
        (["--static=false", "--compare", "/no/python"], "Cannot run '/no/python'"),
    ],
)
def test_a_command_that_makes_no_sense(arguments, message):
    done = command(*arguments)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
