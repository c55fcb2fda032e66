"""bench.scale: collectives are read from programs as they are, and what exceeds its bound is said."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from bench import scale_cells, scale_compile, scale_hlo, scale_memory, scale_plan, scale_tables

ROOT = pathlib.Path(__file__).resolve().parents[2]
LOOP = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = f32[8]{0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %g = s8[64,16]{1,0} all-gather(%q), replica_groups=[2,4]<=[8], dimensions={0}
  %start = (s8[8,16]{1,0}, s8[64,16]{1,0}) all-gather-start(%q), replica_groups=mesh['x'=4,'y'=2] {'x','y'}
  %done = s8[64,16]{1,0} all-gather-done(%start)
  %t = (u8[1,8]{1,0}, u8[1,8]{1,0}) all-to-all(%a, %b), replica_groups={{0,1},{2,3}}
  %r = f32[4]{0} reduce-scatter(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  %p = bf16[10]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  %wide = f32[64]{0} custom-call(%x), custom_call_target="tpu_custom_call"
  %narrowed = bf16[64]{0} all-reduce(%wide), replica_groups={{0,1}}, to_apply=%add
  %alone = f32[4]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add
  %w = (s32[], f32[8]) while(%i), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_collectives_are_read_with_their_groups_loops_and_bytes():
    found = scale_hlo.collectives(LOOP)
    sent = {}
    for c in found:
        sent.setdefault(c.op, []).append(c.wire_bytes)
    assert sent == {
        "all-gather": [768, 896],  # 3/4 and 7/8 of 1024
        "all-to-all": [8],
        "reduce-scatter": [48],
        "collective-permute": [20],
        "all-reduce": [128 + 64, 0, 3 * 48],  # summed as float32, handed out as bfloat16
    }
    counts = {"all-gather": 2, "all-reduce": 4, "all-to-all": 1, "collective-permute": 1, "reduce-scatter": 1}
    assert scale_hlo.counted(found) == counts
    with pytest.raises(ValueError, match="no ENTRY"):
        scale_hlo.collectives("")


def test_sums_over_shards_are_sent_once_and_more_is_said(devices):
    cell = next(c for c in scale_cells.cells(4, 2) if c.name == "dot, M and K sharded")
    row = scale_compile.row("4x2", cell)
    assert row["counts"] == {"all-reduce": 2} and row["bytes"] == row["must_bytes"] and not row["failed"]
    less = dataclasses.replace(cell, must={"all-reduce": 100.0})
    said = scale_tables.failures({"cells": [scale_compile.row("4x2", less)]})
    assert said == [f"4x2, dot, M and K sharded: {row['bytes']} bytes on the wire where 100 must be"]


def test_memory_is_within_its_bound(devices):
    row = scale_memory.row("2x4", 256, 6)
    assert row["quantized_bytes"] == 6 * (256 * 256 + 256 * 4)
    assert row["quantized_bytes"] < row["peak_bytes"] <= row["bound_bytes"] and not row["failed"]


def test_the_plan_is_arithmetic():
    narrow = {"all_gather of QArrays": 1.0, "reduce_scatter int8": 1.0}
    lines = {r["chips"]: r for r in scale_plan.rows(["v5e"], narrow)}
    assert lines[8]["int8_bytes"] == 7 / 8 * 8e9 * 3 and lines[256]["bf16_bytes"] == 255 / 256 * 8e9 * 6
    assert lines[8]["compute_ms"] == pytest.approx(6 * 8e9 * 8192 / 197e12 * 1e3)


def test_too_few_devices_are_said(devices, monkeypatch):
    monkeypatch.setattr(scale_compile, "_devices", lambda name: devices[:4])
    with pytest.raises(ValueError, match="needs 8 devices, and there are 4"):
        scale_compile.mesh_of("2x4", None)


@pytest.mark.large
def test_the_program(tmp_path):
    file = tmp_path / "scale.json"
    command = [sys.executable, "-m", "bench.scale", "--meshes", "8x1,v5e:4x4", "--only", "_", "--check"]
    options = {"cwd": ROOT, "env": dict(os.environ), "text": True, "capture_output": True}
    done = subprocess.run([*command, "--width", "256", "--layers", "4", "--json", str(file)], **options)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert {c["mesh"] for c in result["cells"]} == {"8x1", "v5e:4x4"} and len(result["plan"]) == 24
    unknown = subprocess.run([*command[:3], "--meshes", "9x1"], **options)
    assert unknown.returncode and "no 9x1; there are 2x4" in unknown.stderr
