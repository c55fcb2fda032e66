"""The report: its facts against the model's own arrays, its forms, and what it says of odd models."""

import builtins
import dataclasses
import io
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from qwix_kernels import dispatch
from rich.console import Console

import qwix
from qwix._src import report_records, report_render, report_rows


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(64, 128, rngs=rngs)
        self.down = nnx.Linear(128, 64, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class Net(nnx.Module):
    """A tied embedding around three blocks."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(96, 64, rngs=rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(3)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(x)


RULES = [
    {"module_path": "layers/./up", "weight_qtype": "int4", "tile_size": 32},
    {"module_path": "layers/0/down", "weight_qtype": "int8", "act_qtype": "int8"},
    {"module_path": "layers/1/down", "weight_qtype": "int8", "act_qtype": "int8", "act_static_scale": True},
    {"module_path": "embed", "weight_qtype": "int8"},
    {"module_path": "decoder", "weight_qtype": "int8"},
]
TOKENS = jnp.zeros((2, 4), jnp.int32)


@pytest.fixture(scope="module")
def net():
    return Net(nnx.Rngs(0))


@pytest.fixture(scope="module")
def quantized(net):
    provider = qwix.PtqProvider(qwix.load_rules(RULES))
    with pytest.warns(UserWarning, match="decoder"):
        return qwix.quantize_model(net, provider, TOKENS)


@pytest.fixture(scope="module")
def report(quantized, net):
    return qwix.report(quantized, params=net)


def row_of(report, path, op="dot_general"):
    (row,) = [row for row in report.rows if (row.path, row.op) == (path, op)]
    return row


class TestFacts:
    def test_every_op_has_a_row(self, report):
        paths = [row.path for row in report.rows if row.op == "dot_general"]
        blocks = [f"layers/{i}/{name}" for i in range(3) for name in ("up", "down")]
        assert sorted(paths) == sorted([*blocks, "embed"])
        assert row_of(report, "embed", "take").schema == "weight-only"

    def test_schemas_and_schemes(self, report):
        found = {path: row_of(report, path) for path in ("layers/0/up", "layers/0/down", "layers/1/down")}
        assert [row.schema for row in found.values()] == ["weight-only", "dynamic-range", "static-range"]
        assert [row.scheme for row in found.values()] == ["w4a32_g32", "w8a8", "w8a8"]
        assert [row.rule for row in found.values()] == [
            "#0 layers/./up",
            "#1 layers/0/down",
            "#2 layers/1/down",
        ]

    def test_a_float_op_says_why(self, report):
        row = row_of(report, "layers/2/down")
        assert (row.schema, row.reason, row.kernels) == ("float", "no rule matches", ())
        assert row.bytes_before == row.bytes_after == 128 * 64 * 4

    def test_bytes_are_device_bytes(self, report):
        row = row_of(report, "layers/0/up")
        assert row.shape == (64, 128)
        assert row.bytes_before == 64 * 128 * 4
        assert row.bytes_after == 64 * 128 // 2 + 2 * 128 * 4  # half a byte a value; two tiles a column

    def test_sqnr(self, report, net):
        """Against quantization written down again in numpy."""
        w = np.asarray(net.layers[0].up.kernel.get_value(), np.float32)
        tiles = w.reshape(2, 32, 128)
        scale = np.abs(tiles).max(1, keepdims=True) / np.float32(7.5)
        back = np.clip(np.round(tiles / scale), -8, 7) * scale
        expected = 10 * math.log10(
            np.sum(np.square(tiles, dtype=float)) / np.sum((tiles - back) ** 2, dtype=float)
        )
        assert row_of(report, "layers/0/up").sqnr_db == pytest.approx(expected, abs=0.01)

    def test_kernels_are_those_of_dispatch(self, quantized, report):
        for record in type(quantized)._qwix_provider.records.values():
            row = next(r for r in report.rows if (r.path, r.op_id) == (record.path, record.op_id))
            if record.problem is None:
                continue
            assert [kernel.chip for kernel in row.kernels] == ["here", "v5e", "v6e", "v7x"]
            for kernel in row.kernels:
                found = dispatch.explain(record.problem, None if kernel.chip == "here" else kernel.chip)
                assert kernel.implementation == found.chosen
                assert kernel.static_us == found.estimate.static_us
                assert kernel.rejected == found.rejected

    def test_totals_count_a_tied_weight_once(self, report):
        weights = {(row.path, row.weight): row for row in report.rows}.values()
        assert len(weights) == len(report.rows) - 1
        totals = report.totals
        assert (totals.ops, totals.quantized_ops) == (8, 7)
        assert totals.bytes_before == sum(row.bytes_before for row in weights) == 4 * 64 * (96 + 6 * 128)
        assert totals.bytes_after == sum(row.bytes_after for row in weights)
        biases = 3 * (128 + 64) * 4
        assert totals.other_bytes >= biases  # and the static range of an activation

    def test_rules(self, report):
        assert len(report.rules) == 4
        assert report.rules[0] == "#0 layers/./up: weights int4 by absmax, tiles of 32."
        assert report.rules[2].endswith("activations static int8 by absmax.")
        assert report.unused_rules == ("#4 decoder: weights int8 by absmax.",)

    def test_from_the_provider_alone(self, quantized, report):
        other = qwix.report(type(quantized)._qwix_provider, chips=())
        assert [row.path for row in other.rows] == [row.path for row in report.rows]
        assert other.totals.other_bytes is None
        assert all(len(row.kernels) == (row.reason is None) for row in other.rows)


class TestForms:
    def test_text_folds_like_layers(self, report):
        text = str(report)
        assert "layers/{0..2}/up" in text and "layers/0/down" in text
        assert "float: no rule matches" in text
        assert "MATCHED NOTHING" in text and "static estimates" in text
        assert text.count("\n") < 30

    def test_print_fits_a_terminal(self, report):
        """One table where it fits; else one of facts and one of kernels."""
        outputs = {}
        for width in (300, 120):
            console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
            report.print(console)
            outputs[width] = console.file.getvalue()
            # The summary wraps; no line of a table is longer than the terminal.
            assert max(map(len, outputs[width].splitlines())) <= width
            assert "…" not in outputs[width]
        assert ["What runs it" in text for text in outputs.values()] == [False, True]

    def test_print_to_a_file_is_the_text(self, report):
        console = Console(file=io.StringIO(), width=80)
        report.print(console)
        assert console.file.getvalue() == str(report) + "\n"

    def test_markdown(self, report):
        row = dataclasses.replace(report.rows[0], path="(a|b)")
        lines = dataclasses.replace(report, rows=(row,)).to_markdown().splitlines()
        assert lines[0] == "## Quantization of Net"
        table = [line for line in lines if line.startswith("|")]
        assert len(table) == 3 and "(a\\|b)" in table[2]
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1

    def test_dict_is_json(self, report):
        rows = (dataclasses.replace(report.rows[0], sqnr_db=math.inf), report.rows[1])
        data = json.loads(json.dumps(dataclasses.replace(report, rows=rows).to_dict(), allow_nan=False))
        assert data["rows"][0]["sqnr_db"] == "inf"
        assert data["rows"][1]["path"] == report.rows[1].path
        assert data["totals"]["ops"] == 8 and data["chips"] == ["v5e", "v6e", "v7x"]

    @pytest.mark.parametrize("name", ["report.png", "report.svg"])
    def test_plot(self, report, tmp_path, name):
        report.plot(tmp_path / name)
        start = (tmp_path / name).read_bytes()[:8]
        assert start == (b"\x89PNG\r\n\x1a\n" if name.endswith("png") else b"<?xml ve")

    def test_plot_without_weights(self, report):
        with pytest.raises(ValueError, match="nothing to plot"):
            dataclasses.replace(report, rows=()).plot("nowhere.png")

    def test_plot_without_matplotlib(self, report, monkeypatch):
        real_import = builtins.__import__

        def no_matplotlib(name, *args, **kwargs):
            if name.startswith("matplotlib"):
                raise ImportError(name)
            return real_import(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", no_matplotlib)
        with pytest.raises(ImportError, match=r"extra `examples` .*pip install 'qwix\[examples\]'"):
            report.plot("nowhere.png")


class TestFolding:
    @pytest.mark.parametrize(
        ("paths", "pattern"),
        [
            (["a/0/b"], "a/0/b"),
            (["a/0/b", "a/1/b"], "a/{0,1}/b"),
            (["a/9/b", "a/10/b", "a/11/b"], "a/{9..11}/b"),
            (["a_3/b2", "a_7/b2"], "a_{3,7}/b2"),
            (["e/0/1", "e/0/2", "e/1/1", "e/1/2"], "e/{0,1}/{1,2}"),
            (["a", "a"], "a"),
        ],
    )
    def test_patterns(self, paths, pattern):
        assert report_render.path_pattern(paths) == pattern

    def test_only_like_rows_fold(self, report):
        row = row_of(report, "layers/0/up")
        rows = [
            row,
            dataclasses.replace(row, path="layers/1/up", sqnr_db=30.0),
            dataclasses.replace(row, path="layers/2/up", bytes_after=1),
            dataclasses.replace(row, path="layers/3/up", reason="odd"),
        ]
        folded = report_render.fold(rows)
        assert [f.path for f in folded] == ["layers/{0,1}/up", "layers/2/up", "layers/3/up"]
        assert [f.count for f in folded] == [2, 1, 1]
        assert folded[0].bytes_after == 2 * row.bytes_after
        assert folded[0].sqnr_db == (row.sqnr_db, 30.0)

    def test_a_module_called_twice_has_its_bytes_once(self, report):
        row = row_of(report, "layers/0/up")
        (folded,) = report_render.fold([row, dataclasses.replace(row, op_id="dot_general1")])
        assert (folded.count, folded.bytes_before) == (2, row.bytes_before)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, carry, _):
                return nn.Dense(32, name="dense")(carry), None

        x = nn.Dense(32, name="first")(x)
        step = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return step(name="steps")(x, None)[0]


class TestLinen:
    def test_before_and_after_it_is_traced(self):
        model, x = Scanned(), jnp.ones((4, 32))
        provider = qwix.PtqProvider(qwix.load_rules({"weight_qtype": "int8"}))
        quantized = qwix.quantize_model(model, provider)
        with pytest.raises(ValueError, match=r"seen no op yet.*jax\.eval_shape"):
            qwix.report(quantized)
        jax.eval_shape(quantized.init, jax.random.key(0), x)
        report = qwix.report(quantized)
        assert [(row.path, row.shape) for row in report.rows] == [
            ("first", (32, 32)),
            ("steps/dense", (3, 32, 32)),
        ]
        assert [row.bytes_after for row in report.rows] == [32 * 32 + 32 * 4, 3 * (32 * 32 + 32 * 4)]
        assert all(row.sqnr_db is None for row in report.rows)

        floats = model.init(jax.random.key(0), x)
        with_floats = qwix.report(quantized, params=floats)
        assert all(45 < row.sqnr_db < 48 for row in with_floats.rows)
        assert [row.bytes_after for row in with_floats.rows] == [row.bytes_after for row in report.rows]

        stored = qwix.report(quantized, params=quantized.init(jax.random.key(0), x)["params"])
        assert [row.bytes_after for row in stored.rows] == [row.bytes_after for row in report.rows]
        assert stored.totals.other_bytes == 4 * 32 * 4


class TestMistakes:
    def test_not_quantized(self, net):
        with pytest.raises(
            TypeError, match=r"needs a quantized model or a provider, not Net: .*quantize_model"
        ):
            qwix.report(net)

    def test_unknown_chip(self, quantized):
        with pytest.raises(ValueError, match="v6f"):
            qwix.report(quantized, chips=("v6f",))

    def test_params_of_a_wrong_kind(self, quantized):
        with pytest.raises(
            TypeError, match=r"params must be a nested dict, an nnx\.State or an nnx.Module, got list"
        ):
            qwix.report(quantized, params=[1])


class TestQuality:
    def test_edges(self):
        zeros, ones = jnp.zeros(4), jnp.ones(4)
        assert report_records.sqnr_db(zeros, zeros) == math.inf
        assert report_records.sqnr_db(ones, ones) == math.inf
        assert report_records.sqnr_db(jnp.zeros(0), jnp.zeros(0)) == math.inf
        assert math.isnan(report_records.sqnr_db(ones.at[0].set(jnp.nan), ones))
        with pytest.raises(ValueError, match=r"one shape, got weight\.shape=\(4,\)"):
            report_records.sqnr_db(ones, jnp.ones((2, 2)))

    @pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
    def test_does_not_depend_on_the_size(self, size):
        w = jnp.array([3.0, 4.0]) * size
        assert report_records.sqnr_db(w, w - jnp.array([0.0, 0.5]) * size) == pytest.approx(20.0, abs=1e-3)

    def test_unknown_under_a_trace(self):
        found = []
        jax.jit(lambda w: found.append(report_records.sqnr_db(w, w)) or w)(jnp.ones(2))
        assert found == [None]


def test_ops_without_a_weight_or_a_rule():
    """Rows of activations times activations, of lookups in fp8 and of the root module."""
    record = report_records.OpRecord(
        path="", op="take", op_id="take0", rhs_shape=(2, 3), act_qtype="int8", weight_dtype="int8"
    )
    (row,) = report_rows.make_rows([record], [], ["v6e"])
    assert (row.shape, row.rule, row.scheme) == ((2, 3), None, "int8, activations int8")
    assert [kernel.implementation for kernel in row.kernels] == ["xla", "xla"]
    (folded,) = report_render.fold([row])
    assert report_render.facts(folded)[0] == "(root)"


class TestAdapters:
    @pytest.mark.parametrize("rule", [{}, {"weight_qtype": "int8"}])
    def test_an_adapter_is_in_its_row_and_in_its_kernel(self, rule):
        provider = qwix.LoraProvider(rank=4, alpha=1.0, **rule)
        linear = nnx.Linear(512, 256, use_bias=False, rngs=nnx.Rngs(0))
        model = qwix.apply_lora_to_model(linear, provider, jnp.ones((8, 512)), rngs=nnx.Rngs(1))
        report = qwix.report(model)
        (row,) = report.rows
        assert row.adapter_rank == 4 and "adapters of rank 4" in str(report)
        assert "+rank 4" in str(report)
        if rule:
            (record,) = provider.records.values()
            assert record.problem.low_rank.rank == 4 and row.reason is None
