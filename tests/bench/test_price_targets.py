"""What prices are held to, the list of known misses, the cache, and the table that is printed."""

import json
import math
import os

import pytest
from qwix_kernels.chips import CHIPS

from bench import misses, pool, price_table, reference_figures, shapes, suites, targets
from bench.cache import Cache, digest_of_files
from bench.cells import Cell


def answer(**changes):
    """A prefill that misses nothing."""
    given = {
        **{"chip": "v5e", "scheme": "w8a8", "m": 1024, "k": 4096, "n": 4096, "batch": 1},
        **{"implementation": "mosaic_tpu", "compute_us": 100.0, "memory_us": 40.0, "static_us": 100.0},
        **{"floor_us": 87.0, "best_floor_us": 87.0, "hbm_floor_us": 40.0},
        **{"ratio_to_floor": 1.1, "ratio_to_best_floor": 1.1, "best_floor_of": "scales once, int8 unit"},
        **{"xla_bf16_us": 185.0, "xla_same_op_us": None, "static_kcycles": 150.0, "binds": "MXU"},
        "units": {"MXU": 0.9, "XLU": 0.0, "VALU": 0.3, "VLOAD": 0.4, "FILL": 0.1},
        **{"mxu_busy": 0.95, "spills": 0.25, "note": ""},
    }
    return {**given, **changes}


def decode(**changes):
    """A weight-only decode that misses nothing."""
    times = {"compute_us": 10.0, "memory_us": 20.0, "static_us": 20.0, "hbm_floor_us": 20.0, "floor_us": 20.0}
    scheme = {"scheme": "w4a16_g128", "m": 16, "n": 8192, "binds": "HBM", "ratio_to_best_floor": 1.0}
    return answer(**{**scheme, **times, **changes})


def missed(*answers):
    return {(m.target, m.rows): pytest.approx(m.excess) for m in targets.misses(answers)}


def test_what_holds():
    assert missed(answer(), decode()) == {}


@pytest.mark.parametrize(
    ("answers", "held"),
    [
        ([answer()], {"floor", "reference"}),
        ([answer(n=64)], {"floor"}),
        ([answer(scheme="w8a8_g128")], {"floor", "reference", "speedup"}),
        ([answer(n=64), answer(n=64, scheme="w8a8_static")], {"floor", "dynamic"}),
        ([{"chip": "v5e", "error": "lost"}], {"floor"}),
        ([], set()),
    ],
)
def test_a_target_that_nothing_is_held_to_is_not_met(answers, held):
    asked = ("floor", "reference", "speedup", "dynamic")
    assert {target for target in asked if targets.is_held_to(target, answers)} == held


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (answer(ratio_to_best_floor=1.5), {("floor", "prefill"): 1.2, ("geomean", "prefill"): 1.5 / 1.15}),
        (answer(ratio_to_best_floor=1.2), {("geomean", "prefill"): 1.2 / 1.15}),
        (
            answer(n=64, floor_us=4.9, static_us=370.0, static_kcycles=1.0),
            {("bf16", "prefill small"): 2.0},
        ),
        (answer(m=256, ratio_to_best_floor=9.0), {}),
        (answer(static_us=370.0), {("bf16", "prefill"): 2.0}),
        (answer(static_us=370.0, implementation="xla", binds="XLA"), {}),
        (answer(static_kcycles=530.0), {("reference", "prefill"): 2.0}),
        (answer(static_kcycles=530.0, n=4097), {}),
        (answer(static_kcycles=530.0, batch=8), {}),
        (decode(static_us=42.0), {("hbm", "decode"): 2.0}),
        (decode(compute_us=20.5, static_us=20.5), {("hbm", "decode"): 20.5 / 20}),
        (decode(m=64, static_us=24.0), {}),
        (decode(m=64, static_us=50.0), {("hbm", "batch"): 2.0}),
        (decode(scheme="w8a8", static_us=42.0), {}),
        (decode(scheme="w4a16_g128", n=4096, static_kcycles=97.5), {("speedup", "any"): 1.5}),
        (answer(error="The compiler's process died"), {("price", "prefill"): math.inf}),
    ],
)
def test_what_does_not_hold(changed, expected):
    assert missed(changed) == expected


def test_dynamic_rows_against_rows_that_come_quantized():
    given = answer(scheme="w8a8_static", static_us=80.0)
    assert missed(answer(static_us=88.0), given) == {}
    assert missed(answer(static_us=110.0), given) == {("dynamic", "prefill"): 1.25}
    assert missed(answer(static_us=110.0), {**given, "n": 1024}) == {}


@pytest.mark.parametrize(
    ("units", "binds", "expected"),
    [
        ({"VALU": 0.5, "VLOAD": 0.9, "FILL": 0.6}, "VLOAD", True),
        ({"VALU": 0.5, "VLOAD": 0.9, "FILL": 0.2}, "VLOAD", False),
        ({"VALU": 0.95, "VLOAD": 0.9, "FILL": 0.8}, "VALU", False),
        ({"VALU": 0.2, "VSTORE": 0.9, "SPILL": 0.3}, "VSTORE", True),  # the matrix units are held longer
    ],
)
def test_spills_that_bind(units, binds, expected):
    found = missed(answer(units=units, binds=binds, mxu_busy=0.65))
    assert ("spills", "prefill") in found if expected else found == {}


LISTED = {"chip": "v5e", "scheme": "w8a8", "rows": "prefill", "target": "bf16", "count": 2, "worst": 1.5}
LISTED |= {"reason": "VALU", "ladder": "tpu_kernel.py"}


@pytest.mark.parametrize(
    ("excesses", "complete", "fails", "known"),
    [
        ([1.2, 1.5], ["v5e"], [], 2),
        ([1.5 * 1.004], [], [], 1),
        ([1.52], [], ["1.520x what is allowed, known_misses.json lists 1.5x"], 0),
        ([1.1, 1.1, 1.1], [], ["3 cells, known_misses.json lists 2"] * 3, 0),
        ([], [], [], 0),
        ([], ["v6e"], [], 0),
        ([], ["v5e"], ["no longer missed; remove the entry"], 0),
    ],
)
def test_misses_against_the_list(excesses, complete, fails, known):
    found = [targets.Miss("v5e", "w8a8", "prefill", "bf16", x, "cell", "why") for x in excesses]
    said, listed = misses.against(found, [LISTED], complete)
    assert len(said) == len(fails) and len(listed) == known
    assert all(expected in line for expected, line in zip(fails, said, strict=True))


def test_a_miss_that_is_not_listed_fails():
    said, listed = misses.against(targets.misses([answer(static_us=370.0)]), [])
    assert not listed and len(said) == 1
    assert "v5e w8a8 1024 x 4096 x 4096: bf16, 2.00x what is allowed: 370.0 us" in said[0]
    assert "not listed" in said[0]


def test_a_drafted_list_is_what_the_check_accepts(tmp_path):
    found = targets.misses([answer(static_us=370.0), decode(static_us=42.0), answer(error="x", m=8)])
    other = {**LISTED, "chip": "v6e"}
    kept = {**LISTED, "ladder": "three strategies, see there"}
    drafted = misses.draft(found, [other, kept, {**LISTED, "target": "floor"}], ["v5e"])
    path = tmp_path / "misses.json"
    misses.save(drafted, path)
    loaded = misses.load(path)
    assert loaded == drafted and other in loaded and len(loaded) == 4
    assert misses.against(found, loaded, ["v5e"]) == (
        [],
        [str(m) + _known(loaded, m) for m in _sorted(found)],
    )
    mine = next(e for e in loaded if e["target"] == "bf16" and e["chip"] == "v5e")
    assert (mine["count"], mine["worst"], mine["ladder"]) == (1, 2.0, "three strategies, see there")
    assert "the matrix units bind" in mine["reason"]


def _sorted(found):
    return sorted(found, key=lambda miss: miss.key)


def _known(entries, miss):
    entry = next(e for e in entries if tuple(e[f] for f in ("chip", "scheme", "rows", "target")) == miss.key)
    return f" [known: {entry['reason']}; {entry['ladder']}]"


def test_a_list_that_is_wrong(tmp_path):
    path = tmp_path / "misses.json"
    path.write_text(json.dumps([{"chip": "v5e"}]))
    with pytest.raises(ValueError, match="worst"):
        misses.load(path)
    misses.save([LISTED, LISTED], path)
    with pytest.raises(ValueError, match="listed twice"):
        misses.load(path)


def test_the_list_is_about_cells_that_exist():
    cells = suites.suite("matmul", tpus()).cells
    groups = {(c.chip, c.scheme, targets.rows_of(c.m)) for c in cells}
    for entry in misses.load():
        if entry["scheme"] != "*":
            assert (entry["chip"], entry["scheme"], entry["rows"].removesuffix(" small")) in groups


def tpus():
    return [chip for chip in CHIPS if CHIPS[chip].platform == "tpu"]


def test_reference_figures_cover_known_cells():
    for (scheme, m), by_chip in reference_figures.KCYCLES.items():
        assert shapes.scheme(scheme) and m in suites.CANONICAL_M
        assert set(by_chip) <= set(CHIPS) and scheme in suites.CANONICAL_SCHEMES


def test_a_line_of_the_table():
    line = dict(zip(price_table.COLUMNS, price_table.row(answer()), strict=True))
    assert line["M x K x N"] == "1024 x 4096 x 4096"
    assert line["x floor"] == "1.10" and line["XLA same"] == "-" and line["spills"] == "25%"
    assert line["google/qwix"] == "1.8x slower" and line["binds"] == "MXU"
    assert line["MXU"] == "95%" and line["VALU"] == "30%" and line["EUP"] == "-"
    batched = dict(zip(price_table.COLUMNS, price_table.row(answer(batch=8)), strict=True))
    assert batched["M x K x N"] == "8 x 1024 x 4096 x 4096" and batched["google/qwix"] == "-"


def test_a_line_about_a_class():
    fast, slow = answer(ratio_to_best_floor=1.0), answer(n=1024, ratio_to_best_floor=4.0, static_us=370.0)
    line = price_table.class_row([fast, slow])
    assert line == ("2", "2.00", "4.00", "1024 x 4096 x 1024", "1.04", "2.00", "0")


def test_what_is_kept_survives_an_interruption(tmp_path):
    first = Cache(tmp_path)
    first.put("a", {"x": 1})
    with open(tmp_path / "prices.jsonl", "a") as file:
        file.write('["b", {"x"')  # and the machine went down
    second = Cache(tmp_path)
    assert second.get("a") == {"x": 1} and second.get("b") is None
    second.put("c", [2])
    third = Cache(tmp_path)
    assert third.get("a") == {"x": 1} and third.get("c") == [2]


def test_a_digest_knows_names_and_contents(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("x")
    before = digest_of_files([one, two])
    assert digest_of_files([two, one]) == before
    two.write_text("y")
    assert digest_of_files([one, two]) != before


WORKER = """
import json, sys
for line in sys.stdin:
    cell = json.loads(line)
    if cell["n"] == 13:
        sys.exit("no such compiler")
    print("noise"); print("@answer " + json.dumps({**cell, "priced": cell["n"]}), flush=True)
"""


@pytest.mark.parametrize("jobs", [1, 3])
def test_children_that_die_are_replaced_and_answers_are_kept(tmp_path, monkeypatch, jobs):
    """A stand-in for the compiler's process, which dies over some cells."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").touch()
    (tmp_path / "bench" / "worker.py").write_text(WORKER)
    monkeypatch.setattr(pool, "_ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    cells = [Cell("v5e", "w8a8", m, 8, n) for m in (1, 2) for n in (3, 13, 4)]
    kept = os.fspath(tmp_path / "kept")
    answers = list(pool.price(cells, jobs=jobs, cache=kept))
    assert [a["n"] for a in answers] == [3, 13, 4] * 2
    assert [a.get("priced") for a in answers] == [3, None, 4] * 2
    assert all("no such compiler" in a["error"] for a in answers if a["n"] == 13)
    assert pool.known(cells, kept) == 4
    (tmp_path / "bench" / "worker.py").write_text("raise SystemExit('started again')")
    again = list(pool.price(cells, cache=kept))
    assert [a.get("priced") for a in again] == [3, None, 4] * 2
    assert "started again" in again[1]["error"]
    assert list(pool.price([], jobs=2)) == []


def test_leaving_early_leaves_no_child(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(pool, "_Child", lambda folder, cache: started.append(_Stub()) or started[-1])
    answers = pool.price_unordered([Cell("v5e", "w8a8", m, 8, 8) for m in range(1, 9)], jobs=2)
    next(answers)
    answers.close()
    assert started and all(child.closed for child in started)


class _Stub:
    def __init__(self):
        self.closed = False

    def ask(self, cell):
        return {"m": cell.m}

    def kill(self):
        pass

    def close(self):
        self.closed = True
