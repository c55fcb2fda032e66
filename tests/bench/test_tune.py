"""The tuner: what it would compile, how a search goes, what it writes, and that it goes on where it was."""

import dataclasses
import doctest
import importlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import warnings
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwix_kernels import chips, dispatch, tuning, tuning_files
from qwix_kernels.matmul import tpu_estimate
from qwix_kernels.matmul.tpu_config import Config

from bench import pool, problems, shapes, tune, tune_ops, tune_report, tune_search, tune_space, tune_verify
from bench.cells import Cell

ROOT = pathlib.Path(__file__).parents[2]
V5E = chips.CHIPS["v5e"]


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """No tables but those that a test writes, and a user's file of its own."""
    monkeypatch.setattr(tuning, "_TABLES", tmp_path / "packaged")
    monkeypatch.setenv("QWIX_TUNING_CACHE", str(tmp_path / "user.json"))
    return tmp_path


def command(*arguments, timeout=300):
    drop = ("JAX_", "TPU_", "LIBTPU", "XLA_", "ALLOW_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    command = [sys.executable, "-m", "bench.tune", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


def search_of(chip="v5e", scheme="w8a8", m=1024, k=4096, n=4096, limit=8):
    (found,), refused = tune_search.searches([Cell(chip, scheme, m, k, n)], limit)
    assert not refused
    return found


def answer(cell, us, floor=1.0):
    ratios = {"ratio_to_floor": us / floor, "ratio_to_best_floor": us / floor}
    return {**dataclasses.asdict(cell), "static_us": us, "estimate_us": us, **ratios}


def pricer(us, floor=1.0):
    """A price list instead of a compiler: `us(config)`, an exception's name for one that does not compile."""
    asked = []

    def price(cells):
        for index, cell in enumerate(cells):
            config = Config(**json.loads(cell.config))
            asked.append(config)
            value = us(config)
            failed = {**dataclasses.asdict(cell), "error": value}
            yield index, failed if isinstance(value, str) else answer(cell, value, floor)

    price.asked = asked
    return price


@pytest.mark.parametrize("module", ["tune_ops", "tune_report"])
def test_examples_in_docstrings(module):
    assert doctest.testmod(importlib.import_module(f"bench.{module}")).failed == 0


@pytest.mark.parametrize(
    ("chip", "scheme", "m", "k", "n"),
    [
        ("v5e", "w8a8", 1024, 4096, 4096),
        ("v5p", "w4a16_g128", 16, 28672, 8192),
        ("v7x", "w8a8_g128", 64, 14336, 4096),
        ("v6e", "wf8af8", 1000, 576, 192),
        ("v5e", "w8a8", 3, 576, 200),
    ],
)
def test_candidates_fit_and_hold_the_heuristics(chip, scheme, m, k, n):
    problem = problems.problem(shapes.scheme(scheme), m, k, n)
    spec = chips.CHIPS[chip]
    space = tune_space.space(problem, spec)
    own = tpu_estimate.heuristic_config(problem, spec)
    assert own in [c.config for c in space] and len({c.config for c in space}) == len(space)
    estimates = [c.estimate_us for c in space]
    assert estimates == sorted(estimates) and estimates[-1] <= tune_space.HOPELESS * estimates[0]
    for candidate in space:
        tpu_estimate.estimate(problem, spec, candidate.config)  # raises for one that does not fit
    spread = list(tune_space.diverse(space, own, tune_ops.OPS["matmul"].kind))
    assert spread[0] == own and set(spread) == {c.config for c in space} and len(spread) == len(space)


@pytest.mark.parametrize(
    ("op", "chip"), [("conv", "v6e"), ("conv", "v7x"), ("ragged", "v5e"), ("ragged", "v7x")]
)
def test_other_ops_are_searched_and_their_tables_are_taken(op, chip, files, capsys):
    """With a price list: the winner is written, looked up by dispatch, and verified."""
    scheme = {"conv": "w8a8_static", "ragged": "w4a16_g128"}[op]
    cells, left_out = tune_ops.layer_cells(op, [chip], [scheme], ["canonical"])
    (search,), refused = tune_search.searches(cells, 6, op)
    assert not left_out and not refused and len({*search.planned()}) == 7
    us = lambda config: 100.0 if config == search.heuristic else 50.0

    def price(cells):
        for index, cell in enumerate(cells):
            config = type(search.heuristic)(**json.loads(cell.config))
            yield index, answer(cell, us(config), floor=10.0)

    tune.run([search], price)
    assert len(search.answers) == 7 and tune.write([search], None, False)
    table = files / "packaged"
    got = dispatch.explain(search.problem, chip, implementation="mosaic_tpu")
    assert (got.config, got.config_source) == (search.best, "packaged")
    tune_report.show([search])
    assert tune_verify.verify([chip], lambda c: table / f"{c.name}.json", price) == 0
    assert "1 entries, 0 have lost" in capsys.readouterr().out


def test_the_first_guesses_differ_in_kind():
    search = search_of("v7x", "w8a8_g128", limit=6)
    kinds = {(c.strategy, c.block_k == 4096, c.block_n > c.block_m) for c in search.planned()}
    assert {strategy for strategy, *_ in kinds} == {"after", "before"} and len(kinds) >= 5


def test_neighbours_differ_by_one_step():
    space, sizes = search_of()._space, ("block_m", "block_n", "block_k")
    for config in [c.config for c in space[:20]]:
        for near in tune_space.neighbours(space, config, sizes):
            assert sum(getattr(near, f) != getattr(config, f) for f in sizes) == 1


def test_a_search_follows_the_prices_downhill():
    search = search_of(limit=20)
    price = pricer(lambda c: 1e6 / c.block_n)
    tune.run([search], price)
    assert price.asked[0] == search.heuristic and len(price.asked) == 21
    assert search.best.block_n > search.heuristic.block_n
    assert set(price.asked) != set(search.planned())  # the estimates alone would have asked others
    assert search.entry()["config"]["block_n"] == search.best.block_n


def test_a_price_next_to_the_floor_ends_a_search():
    search = search_of()
    price = pricer(lambda c: 1.01)
    tune.run([search], price)
    assert price.asked == [search.heuristic] and search.entry()["heuristic_us"] == 1.01
    assert "config" not in search.entry()


@pytest.mark.parametrize(("gain", "written"), [(0.03, True), (0.01, False), (-0.5, False)])
def test_an_entry_has_blocks_only_where_they_win(gain, written):
    search = search_of(limit=4)
    tune.run([search], pricer(lambda c: 1000.0 * (1 - gain * (c != search.heuristic))))
    assert ("config" in search.entry()) == written
    assert search.entry()["kernel"] == tune_search.kernel_digest() and search.entry()["scheme"] == "w8a8"


def test_one_block_that_hides_nothing_does_not_win():
    """The static price leaves out the first fetch; the tuner does not."""
    search = search_of("v5e", "w8a16", 16, 1024, 4096, limit=60)
    tune.run([search], pricer(lambda c: 5.0 if c.block_n == 4096 else 5.2))
    assert search.best.block_n < 4096


def test_what_does_not_compile_loses():
    search = search_of(limit=4)
    tune.run([search], pricer(lambda c: "no" if c == search.heuristic else 7.0))
    assert search.entry()["static_us"] == 7.0 and "heuristic_us" not in search.entry()
    search = search_of(limit=4)
    tune.run([search], pricer(lambda c: "no"))
    assert search.entry() is None and search.best is None and tune_report.regrets([search]) == []


def test_a_budget_serves_all_problems_alike(monkeypatch):
    searches = [search_of(k=k) for k in (1024, 2048, 4096)]
    clock = itertools.count()
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(clock) / 2)
    tune.run(searches, pricer(lambda c: 50.0), deadline=5)
    counts = [len(s.answers) for s in searches]
    assert max(counts) - min(counts) <= 1 and 0 < sum(counts) < 27
    assert all(s.entry() is None for s in searches)  # unfinished, and nothing better found


class FakeChild:
    """Answers like a worker process, and is gone after a while."""

    asked: ClassVar[list] = []
    alive = 10**9

    def __init__(self, folder, cache):
        pass

    def ask(self, cell):
        if len(FakeChild.asked) >= FakeChild.alive:
            raise KeyboardInterrupt
        FakeChild.asked.append(cell)
        return answer(cell, 100.0 + Config(**json.loads(cell.config)).block_m)

    def close(self):
        pass

    kill = close


def test_an_interrupted_run_goes_on_where_it_was(files, monkeypatch):
    monkeypatch.setattr(pool, "_Child", FakeChild)
    cache = str(files / "cache")
    price = lambda cells: pool.price_unordered(cells, jobs=1, cache=cache)
    FakeChild.asked, FakeChild.alive = [], 5
    first = search_of()
    with pytest.raises(KeyboardInterrupt):
        tune.run([first], price)
    assert len(FakeChild.asked) == 5 and tune.write([first], files, False) is not None
    with (files / "cache" / "prices.jsonl").open("a") as file:
        file.write('["cell {\\"chip\\": \\"v5')  # killed in the middle of a line
    FakeChild.alive = 10**9
    second = search_of()
    tune.run([second], price)
    assert len(FakeChild.asked) == len(set(FakeChild.asked)) == 9  # none twice
    third = search_of()
    tune.run([third], price)
    assert len(FakeChild.asked) == 9 and third.entry() == second.entry()


def tuned(limit=4):
    search = search_of("v6e", limit=limit)
    tune.run([search], pricer(lambda c: 1000.0 - 100 * (c != search.heuristic)))
    return search


def test_what_is_written_is_what_dispatch_takes(files):
    search = tuned()
    assert tune.write([search], None, False) == {files / "packaged" / "v6e.json": 1}
    got = dispatch.explain(search.problem, "v6e", implementation="mosaic_tpu")
    assert (got.config, got.config_source, got.tuned) == (search.best, "packaged", "exact")
    text = (files / "packaged" / "v6e.json").read_text()
    assert text.count("\n") == 5 and json.loads(text)["mosaic_tpu"][search.key] == search.entry()


def test_writing_to_the_users_file(files):
    search = tuned()
    assert tune.write([search], None, True) == {files / "user.json": 1}
    got = dispatch.explain(search.problem, "v6e", implementation="mosaic_tpu")
    assert (got.config, got.config_source) == (search.best, "user cache")


def verify(files, us, capsys):
    table = lambda chip: files / f"{chip.name}.json"
    lost = tune_verify.verify(["v6e", "v5e"], table, pricer(us))
    return lost, capsys.readouterr().out


def test_verifying(files, capsys):
    search = tuned()
    tune.write([search], files, False)
    same = lambda c: 1000.0 - 100 * (c != search.heuristic)
    assert verify(files, same, capsys) == (0, "1 entries, 0 have lost.\n")
    lost, said = verify(files, lambda c: 1000.0 + 100 * (c != search.heuristic), capsys)
    assert lost == 1 and "1100.00 us, the heuristic 1000.00 us" in said
    lost, said = verify(files, lambda c: "refused" if c != search.heuristic else 1000.0, capsys)
    assert lost == 1 and "has no price: refused" in said
    lost, said = verify(files, lambda c: same(c) / 2, capsys)
    assert lost == 0 and "900.00 us then, 450.00 us now" in said
    lost, said = verify(files, lambda c: 890.0, capsys)
    assert lost == 0 and "no longer worth an entry" in said


@pytest.mark.parametrize("key", ["nonsense", None])
def test_a_table_of_other_problems_cannot_be_verified(files, key, capsys):
    search = tuned()
    entry = search.entry() | {"scheme": "w4a8"}
    tuning_files.update(files / "v6e.json", {("mosaic_tpu", key or search.key): entry})
    with pytest.raises(ValueError, match=r"no sizes or no scheme|is not w4a8; that is"):
        verify(files, lambda c: 1.0, capsys)


def test_regret_by_hand():
    first, second = search_of(limit=4), search_of(k=2048, limit=4)
    tune.run([first], pricer(lambda c: 110.0 if c == first.heuristic else 100.0))
    tune.run([second], pricer(lambda c: 100.0))
    (line,) = tune_report.regrets([first, second])
    assert (line.chip, line.scheme, line.problems, line.wins) == ("v5e", "w8a8", 2, 1)
    assert line.worst == pytest.approx(0.1) and line.worst_at == "1024 x 4096 x 4096"
    assert line.mean == pytest.approx(1.1**0.5 - 1)


def test_correlation_by_hand():
    search = search_of(limit=4)
    for i, (config, us) in enumerate(zip(search.planned(), (1.0, 2.0, 3.0, 5.0, 4.0), strict=True)):
        search.answers[config] = answer(search.cell, us) | {"estimate_us": float(i)}
    assert tune_report.correlation(search) == pytest.approx(0.9)
    search.answers = dict(itertools.islice(search.answers.items(), 3))
    assert tune_report.correlation(search) is None


@settings(max_examples=25)
@given(
    st.sampled_from(["v5e", "v5p", "v6e", "v7x"]),
    st.sampled_from(["w8a8", "w4a16_g128", "wf8af8", "wnf4a16_g64"]),
    st.sampled_from([1, 16, 100, 1024]),
    st.sampled_from([256, 640, 1536]),
    st.sampled_from([128, 200, 576]),
    st.integers(0, 2**32),
)
def test_a_search_ends_and_its_entry_is_the_least(chip, scheme, m, k, n, seed):
    found, _ = tune_search.searches([Cell(chip, scheme, m, k, n)], 5)
    for search in found:
        us = lambda c: 10.0 + hash((seed, c)) % 97
        tune.run([search], pricer(us))
        assert len(search.answers) <= 6 and search.finished
        least = min(search.score(c) for c in search.answers)
        assert search.score(search.best) == least
        if config := search.entry().get("config"):
            assert Config(**config) == search.best and us(search.best) < us(search.heuristic)


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "v7x"])
def test_the_packaged_table_holds_what_it_should(chip):
    """Every entry is of the problem it names, and its blocks fit the kernel; a chip may have no table."""
    spec = chips.CHIPS[chip]
    path = pathlib.Path(tuning.__file__).parent / "tuning_tables" / f"{chip}.json"
    if not path.exists():
        some = problems.problem(shapes.scheme("w8a8"), 1024, 4096, 4096)
        assert dispatch.explain(some, spec).config_source == "heuristic"
        return
    assert set(tuning_files.load(path)) == {tune_search.IMPLEMENTATION}
    for entry in tune_verify.entries(chip, path):
        if entry.tuned:
            problem = entry.op.problem(entry.tuned)
            found = dispatch.explain(problem, spec, implementation=tune_search.IMPLEMENTATION)
            own = dict(found.config.__dict__) if found.config_source == "packaged" else {}
            assert own and own.items() >= entry.fields["config"].items(), entry.key
            assert entry.fields["static_us"] <= tune_search.WINS * entry.fields.get("heuristic_us", 1e9)


def test_a_dry_run_says_what_it_would_do_and_does_nothing(files):
    done = command("--dry-run", "--chip", "v5e,v7x", "--scheme", "w8a8,w8a8_g128", "--model", "smollm2_135m",
                   "--m", "16", "--candidates", "3", "--jobs", "2", "--out", str(files / "out"))  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "v7x w8a8 16 x 576 x 1536: 4 configs, first" in done.stdout
    assert "left out: w8a8_g128 576 x 576: the tile 128 does not divide K=576" in done.stdout
    assert "10 problems, at most 40 configs" in done.stdout and "minutes with --jobs 2" in done.stdout
    assert not (files / "out").exists()


def test_a_real_search(files):
    done = command(
        *("--chip", "v5e", "--scheme", "w8a8", "--k", "256", "--n", "512", "--m", "64", "--candidates", "1"),
        *("--out", str(files), "--cache", str(files / "cache"), "--results", str(files / "prices")),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "(heuristic)" in done.stderr and "Regret of the heuristic" in done.stdout
    lines = [json.loads(line) for line in (files / "prices").read_text().splitlines()]
    assert 1 <= len(lines) <= 2 and all(line["static_us"] >= line["floor_us"] for line in lines)
    table = json.loads((files / "v5e.json").read_text())["mosaic_tpu"]
    key = tuning.key(problems.problem(shapes.scheme("w8a8"), 64, 256, 512))
    assert list(table) == [key] and table[key]["heuristic_us"] > 0


@pytest.mark.large
@pytest.mark.parametrize(("op", "scheme"), [("conv", "w8a8_static"), ("ragged", "w8a8")])
def test_a_real_search_of_another_op(files, op, scheme):
    done = command(
        *("--op", op, "--chip", "v6e", "--scheme", scheme, "--model", "canonical", "--candidates", "1"),
        *("--out", str(files), "--cache", ""),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "(heuristic)" in done.stderr and "x the floor" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chip", "v9"], "Unknown chip 'v9'"),
        (["--scheme", "w9a9"], "Unknown scheme 'w9a9'"),
        (["--model", "gpt"], "Unknown model 'gpt'; models: canonical"),
        (["--k", "128"], "Give --k and --n, or --model"),
        (["--m", "few"], "whole numbers, got few"),
        (["--op", "conv", "--m", "16"], "--op conv tunes layers of models; leave out --m"),
        (["--op", "conv", "--model", "gpt"], "Unknown model 'gpt'; models with conv: canonical, resnet50"),
        (["--op", "conv", "--scheme", "w4a4"], "Unknown scheme 'w4a4' of conv"),
        (["--candidates", "0"], "candidates"),
        (["extra"], "Unexpected arguments: extra"),
    ],
)
def test_a_command_that_makes_no_sense(arguments, message, monkeypatch, capsys):
    from absl import app, flags

    saved = {name: flags.FLAGS[name].value for name in flags.FLAGS if flags.FLAGS[name].using_default_value}
    try:
        argv = flags.FLAGS(["tune", *arguments])
        with pytest.raises(app.UsageError, match=message.split("(")[0]):
            tune.main(argv)
    except flags.Error as error:
        assert message in str(error)
    finally:
        flags.FLAGS.unparse_flags()
        for name, value in saved.items():
            flags.FLAGS[name].value = value


def test_no_warning_at_import():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(tune_report)
