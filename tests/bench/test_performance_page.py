"""The generated performance page: from answers of our choosing, so that what it must say is known."""

import doctest
import importlib
import json
import pathlib
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from qwix_kernels.chips import CHIPS

from bench import page_cells, page_files, page_summary, roofline, suites, targets
from bench.shapes import scheme

ROOT = pathlib.Path(__file__).parents[2]


def answer(chip="v5e", name="w8a8", m=1024, k=4096, n=4096, **other) -> dict:
    """One of bench.price: 100 us at 1.10x the best floor, XLA's bfloat16 takes 200."""
    return {
        "chip": chip,
        "scheme": name,
        "m": m,
        "k": k,
        "n": n,
        "batch": 1,
        "implementation": "mosaic_tpu",
        "compute_us": 90.0,
        "memory_us": 100.0,
        "static_us": 100.0,
        "floor_us": 80.0,
        "ratio_to_floor": 1.25,
        "best_floor_us": 100 / 1.1,
        "best_floor_of": "scales once, int8 unit",
        "ratio_to_best_floor": 1.10,
        "hbm_floor_us": 98.0,
        "xla_bf16_us": 200.0,
        "xla_same_op_us": 150.0,
        "static_kcycles": 150.0,
        "units": {"MXU": 0.9, "VALU": 0.3},
        "mxu_busy": 0.9,
        "binds": "MXU",
        "spills": 0.0,
        "note": "",
    } | other


ANSWERS = [
    answer(),
    answer(name="w8a8_static", static_us=80.0),
    answer(name="w8a8_g128", ratio_to_best_floor=1.5, static_us=250.0, static_kcycles=200.0, spills=0.4),
    answer(name="w4a16_g128", m=16, hbm_floor_us=50.0),
    answer(name="wmxfp4a16", m=16, implementation="xla", binds="XLA", note="not mosaic_tpu: too slow"),
    answer("v6e", "wf8af8", m=16),
    {"chip": "v6e", "scheme": "w4a4", "m": 1, "k": 8, "n": 8, "error": "RuntimeError: the compiler died"},
]


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return page_files.build(ANSWERS)


def line_of(text: str, start: str) -> list[str]:
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def section(text: str, title: str) -> str:
    return text.split(f"{title}\n", 1)[1].split("\n#", 1)[0]


@pytest.mark.parametrize("module", ["page_cells", "targets"])
def test_examples_in_docstrings(module):
    assert doctest.testmod(importlib.import_module(f"bench.{module}")).failed == 0


def test_the_files(files):
    assert set(files) == {
        "performance.md",
        *(f"performance_{chip}.md" for chip in ("v5e", "v6e")),
        *(f"figures/roofline_{chip}.svg" for chip in ("v5e", "v6e")),
    }
    page = files["performance.md"]
    for name in files:
        assert name == "performance.md" or f"({name})" in page, f"nothing leads to {name}"


def test_the_summary_comes_first_and_says_what_is_missing(files):
    page = files["performance.md"]
    assert page.index("## Summary") < page.index("## v5e") < page.index("## v6e")
    assert "The suite is incomplete" in page and "cells of v7x" in page
    whole = len(suites.suite("matmul", ["v5e"]).cells)
    summary = line_of(page, "v5e")
    assert summary[1].startswith("5 of ")
    assert int(summary[1].split()[-1]) == whole
    assert summary[2] == f"{(1.1 * 1.1 * 1.5) ** (1 / 3):.2f}"
    assert summary[-2:] == ["1", "1"]  # w8a8_g128 is slower than XLA's bfloat16; one cell fell back


def test_losing_rows_are_there_with_their_reason(files):
    lost = section(files["performance.md"], "### v5e: what misses a target")
    floor = next(line for line in lost.splitlines() if line.startswith("| w8a8_g128 | prefill | floor"))
    assert "1.20x what is allowed" in floor and "the matrix units bind" in floor
    assert "| w8a8_g128 | prefill | bf16 | 1 | 1.25x what is allowed; 1024 x 4096 x 4096: 250.0 us" in lost
    assert "| w8a8 | prefill | dynamic | 1 | 1.14x" in lost
    died = section(files["performance.md"], "### v6e: what misses a target")
    assert "the compiler died" in died and "inf" not in died
    cells = files["performance_v5e.md"]
    assert "**floor, bf16" in cells and "**1.25**" in cells and "not mosaic_tpu: too slow" in cells
    assert "no price" in files["performance_v6e.md"]


def test_every_target_has_a_line(files):
    known = {miss.target for miss in targets.misses(ANSWERS)}
    assert {"floor", "bf16", "dynamic", "price", "hbm"} <= known <= page_summary.TARGETS.keys()
    met = line_of(files["performance.md"], page_summary.TARGETS["spills"])
    assert met[1:] == ["met", "met"]
    assert line_of(files["performance.md"], page_summary.TARGETS["price"])[1:] == ["met", "1"]


def test_figures_of_google_qwix_where_there_are_some(files):
    prefill = section(files["performance.md"], "### v5e: Prefill, M >= 512")
    assert line_of(prefill, "w8a8")[-1] == f"{150 / 265:.2f}"
    assert line_of(prefill, "w8a8_static")[-1] == "-"


def test_sub_channel_dynamic_and_spills(files):
    page = files["performance.md"]
    assert line_of(section(page, "### v5e: sub-channel, M >= 512"), "w8a8_g128")[4] == "2.50"
    assert line_of(section(page, "### v5e: dynamic quantization"), "w8a8")[3:5] == ["1.25", "1.25"]
    assert line_of(section(page, "### v5e: spills"), "w8a8_g128")[2:] == ["1", "40%", "0"]
    assert "No kernel's fills" in section(page, "### v6e: spills")


def test_measured_parts_say_that_they_are(monkeypatch):
    ratio = {"median": 0.5, "low": 0.4, "high": 0.6}
    row = {"scheme": "w8a8", "m": 16, "k": 64, "n": 32, "dtype": "float32", "ratio_to_float32": ratio}
    cpu = {
        "cpu": [row | {"ratio_to_bfloat16": ratio, "ratio_to_reference": None}],
        "targets": [{"met": False, "said": "w4a8 takes 9.00x"}, {"met": True, "said": "fine"}],
    }
    compiled = {"scheme": "w8a8", "target": "v5e", "ratio": 1.1, "low": 1.0, "high": 1.2}
    compile_time = {"rows": [compiled | {"instructions_ratio": 1.5, "kernels": 210}]}
    recorded = {"cpu": cpu, "compile_time": compile_time}
    monkeypatch.setattr(page_files, "recorded", recorded.get)
    page = page_files.build(ANSWERS)["performance.md"]
    assert "0.50 (0.40-0.60)" in section(page, "## CPU, measured")
    assert "1 of 2 met" in page and "- w4a8 takes 9.00x" in page and "fine" not in page
    assert line_of(section(page, "## Compile time, measured"), "w8a8")[2:4] == ["1.10", "1.00-1.20"]


def test_points_of_the_roofline_by_hand():
    chip, a = CHIPS["v5p"], answer("v5p", hbm_floor_us=10.0, static_us=50.0)
    across, up = roofline.point(chip, a)
    work = 2 * 1024 * 4096 * 4096
    assert up == pytest.approx(work / 50e-6)
    assert across == pytest.approx(work / (10e-6 * 2765e9))
    assert roofline.roofs(chip) == pytest.approx({"bf16": 459e12, "int8": 918e12, "int4": 1840e12})


def test_plots_are_the_same_every_time(files):
    text = files["figures/roofline_v5e.svg"]
    assert page_files.build(ANSWERS)["figures/roofline_v5e.svg"] == text
    assert ET.fromstring(text).tag.endswith("svg")
    assert "w8a8" in text and "static" in text and "<dc:date>" not in text


def test_all_main_schemes_can_be_drawn():
    answers = [answer(name=name) for name in suites.MAIN_SCHEMES]
    assert all(scheme(name).name in roofline.svg("v5e", answers) for name in suites.MAIN_SCHEMES)


def test_nothing_priced_on_a_chip():
    failed = [{"chip": "v7x", "scheme": "w8a8", "m": 1, "k": 8, "n": 8, "error": "no TPU compiler"}]
    files = page_files.build(failed)
    assert "Nothing has a price: no TPU compiler" in files["performance.md"]
    assert "figures/roofline_v7x.svg" not in files


def command(*arguments: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "bench.performance_page", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_writing_and_checking(tmp_path):
    suite, docs = tmp_path / "suite.json", tmp_path / "docs"
    suite.write_text(json.dumps(ANSWERS))
    given = ("--json", str(suite), "--docs", str(docs))
    stale = command(*given, "--check")
    assert stale.returncode == 1 and "Out of date: performance.md" in stale.stderr
    assert not docs.exists()
    written = command(*given)
    assert written.returncode == 0 and "5 files" in written.stdout
    assert "v7x: " in written.stderr and "are not priced" in written.stderr
    assert command(*given, "--check").returncode == 0
    (docs / "performance.md").write_text("by hand")
    assert "Out of date: performance.md." in command(*given, "--check").stderr


@pytest.mark.parametrize("text", ["", "[]", "{", '[{"chip": "v5e"}]', "[1]"])
def test_files_that_are_not_of_bench_price(tmp_path, text):
    path = tmp_path / "suite.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"suite\.json"):
        page_files.load(str(path))
    with pytest.raises(ValueError, match="Cannot read"):
        page_files.load(str(tmp_path / "none.json"))


def test_one_answer_is_a_suite_too(tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(answer()))
    assert page_files.load(str(path)) == [answer()]


def test_shapes_with_a_batch():
    assert page_cells.shape(answer(batch=8, m=4)) == "8 x 4 x 4096 x 4096"
