"""`qwix.odml.export` and `calibrate`: signatures, names, and what they refuse."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwix
from qwix import odml

RULE = qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8")
RNG = np.random.default_rng(0)
X = RNG.uniform(-1, 1, (4, 8)).astype(np.float32)
FLOAT_LINE = r"sin0 in '': "


class Net(nn.Module):
    @nn.compact
    def __call__(self, image, train: bool = False, wave: bool = False):
        x = nn.relu(nn.Dense(6)(image))
        x = jnp.sin(x) if wave else x
        return {"logits": nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))}


class Coder(nnx.Module):
    def __init__(self):
        self.down, self.up = nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 8, rngs=nnx.Rngs(1))

    def encode(self, image):
        return nnx.relu(self.down(image))

    def decode(self, code):
        return {"image": self.up(code), "doubled": [2 * self.up(code)]}

    def __call__(self, image):
        return self.up(self.encode(image))


@pytest.fixture(scope="module")
def net():
    """A Linen module, its params and statistics; all of numpy, which is accepted everywhere."""
    model = qwix.quantize_model(Net(), qwix.OdmlQatProvider([RULE], strict=False))
    params = jax.device_get(model.init(jax.random.key(0), X)["params"])
    stats = odml.calibrate(model, [X, 2 * X], {"params": params}, progress=False)
    return model, params, jax.device_get(stats)


@pytest.fixture(scope="module")
def coder():
    methods = ("__call__", "encode", "decode")
    model = qwix.quantize_model(Coder(), qwix.OdmlQatProvider([RULE]), methods=methods)
    odml.calibrate(model, [X], progress=False)
    odml.calibrate(model, (x for x in [X[:, :4]]), method="decode", progress=False)
    odml.calibrate(model, [(X,)], method="encode", progress=False)
    return model


def test_statistics_are_means_over_batches(net):
    model, params, stats = net
    found = stats["Dense_0"]["dot_general0_lhs"]
    assert found["count"] == 2
    np.testing.assert_allclose(found["sum_of_max"].item(), 3 * X.max(1).mean(), rtol=1e-6)
    more = odml.calibrate(model, [(X,)], {"params": params, "quant_stats": stats}, progress=False)
    assert more["Dense_0"]["dot_general0_lhs"]["count"] == 3 and found["count"] == 2
    assert jax.tree.structure(more) == jax.tree.structure(stats)


def test_names_are_those_of_the_model_and_the_file_agrees(net):
    model, params, stats = net
    file = odml.export(model, params, stats, X, strict=True)
    assert file.signatures == {"serving_default": (("image",), ("logits",))}
    want = model.apply({"params": params, "quant_stats": stats}, X)["logits"]
    got = file.run({"image": X})["logits"]
    step = odml.with_integer_io(file).quantization()["logits"][0].item()
    assert abs(got - want).max() <= 1.001 * step
    renamed = odml.export(model, params, stats, (X,), input_names=["x"], output_names=["y"], integer_io=True)
    assert renamed.signatures == {"serving_default": (("x",), ("y",))}
    assert {op.name for op in renamed.summary().ops} == {"FULLY_CONNECTED"}


def test_static_arguments_are_part_of_the_program(net):
    model, params, stats = net
    with pytest.warns(UserWarning, match=r"Not all of the model is integer:\n.*SIN in 'serving_default'"):
        file = odml.export(model, params, stats, X, static={"wave": True})
    assert "SIN" in {op.name for op in file.summary().float_ops}
    with pytest.raises(ValueError, match=r"(?s)SIN in 'serving_default'.*sin0 in '':.*Leave out strict"):
        odml.export(model, params, stats, X, static={"wave": True}, strict=True)


def test_several_methods_are_several_signatures(coder):
    shape = jax.ShapeDtypeStruct((2, 8), np.float32)
    inputs = {"serving_default": X, "encode": X, "decode": X[:, :4], "small": (shape,)}
    file = odml.export(coder, sample_inputs=inputs, methods={"small": "encode"}, strict=True)
    assert file.signatures == {
        "serving_default": (("image",), ("output",)),
        "encode": (("image",), ("output",)),
        "decode": (("code",), ("doubled_0", "image")),
        "small": (("image",), ("output",)),
    }
    code = file.run({"image": X}, "encode")["output"]
    assert np.array_equal(file.run({"image": X[:2]}, "small")["output"], code[:2])
    coder.set_attributes(disable_quant_stats_update=True, raise_if_not_found=False)
    for name, got in (("encode", code), ("__call__", file.run({"image": X}, "serving_default")["output"])):
        want = getattr(coder, name)(X)
        assert abs(got - want).max() <= abs(want).max() * 1.001 / 127


def test_a_failed_calibration_changes_nothing(coder):
    before = nnx.to_pure_dict(nnx.state(coder, qwix.QuantStat))
    with pytest.raises(TypeError, match="dot_general"):
        odml.calibrate(coder, [X, X[:, :3]], progress=False)
    after = nnx.to_pure_dict(nnx.state(coder, qwix.QuantStat))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))


def test_statistics_of_nothing_are_refused(net):
    model, params, stats = net
    with pytest.raises(ValueError, match="quant_stats is not initialized for Dense_0/dot_general0_lhs"):
        odml.export(model, params, {}, X)
    zeros = jax.tree.map(np.zeros_like, stats)
    with pytest.raises(ValueError, match=r"quant_stats is not initialized for .* count is 0"):
        odml.export(model, params, zeros, X)
    with pytest.raises(ValueError, match="Invalid scale"):
        odml.export(model, params, jax.tree.map(lambda x: x * np.nan if x.ndim else x, stats), X)
    broken = {**params, "Dense_0": {**params["Dense_0"], "kernel": params["Dense_0"]["kernel"] * np.inf}}
    with pytest.raises(ValueError, match="Invalid scale"):
        odml.export(model, broken, stats, X)
    with pytest.raises(ValueError, match="no batches"):
        odml.calibrate(model, [], {"params": params}, progress=False)


def test_arguments_that_make_no_sense_are_refused(net, coder):
    model, params, stats = net
    with pytest.raises(ValueError, match="this Net is not quantized at all"):
        odml.export(Net(), params, stats, X)
    other = qwix.quantize_model(Net(), qwix.QtProvider([RULE]))
    with pytest.raises(ValueError, match="this Net is one of QtProvider"):
        odml.calibrate(other, [X], {"params": params})
    with pytest.raises(TypeError, match="A Linen module needs params"):
        odml.export(model, sample_inputs=X)
    with pytest.raises(TypeError, match="A Linen module needs its variables"):
        odml.calibrate(model, [X])
    with pytest.raises(TypeError, match="An NNX model holds its params"):
        odml.export(coder, {}, {}, X)
    with pytest.raises(TypeError, match="an NNX model holds its own"):
        odml.calibrate(coder, [X], {})
    with pytest.raises(ValueError, match="sample_inputs of 'serving_default' are missing"):
        odml.export(coder)
    with pytest.raises(ValueError, match="Coder has no method 'encod' to quantize"):
        odml.export(coder, sample_inputs={"encod": X})
    half = qwix.quantize_model(Coder(), qwix.OdmlQatProvider([RULE]), X)
    with pytest.raises(
        ValueError, match=r"'encode' of this Coder is not quantized.*methods=\('__call__', 'enc"
    ):
        odml.calibrate(half, [X], method="encode")
    with pytest.raises(ValueError, match=r"methods names \['other'\], but the signatures are"):
        odml.export(coder, sample_inputs=X, methods={"other": "encode"})
    with pytest.raises(ValueError, match=r"Names are given for \['b'\]"):
        odml.export(coder, sample_inputs={"encode": X}, output_names={"b": ["y"]})
    with pytest.raises(ValueError, match=r"give names as \{signature: names\}"):
        odml.export(coder, sample_inputs={"encode": X, "decode": X}, output_names=["y"])
    (rows,) = jax.export.symbolic_shape("rows")
    with pytest.raises(ValueError, match="sizes must be numbers"):
        odml.export(coder, sample_inputs=jax.ShapeDtypeStruct((rows, 8), jnp.float32))


def test_a_missing_converter_is_said_before_anything_runs(net, monkeypatch):
    monkeypatch.setitem(sys.modules, "litert_converter", None)
    monkeypatch.setitem(sys.modules, "litert_converter.converter_api_ext", None)
    with pytest.raises(ImportError, match=r"qwix.odml needs litert-converter.*pip install ai-edge-litert"):
        odml.export(net[0], net[1], {}, X)


@pytest.mark.large
@pytest.mark.parametrize(
    ("rule", "types"),
    [
        ({"weight_qtype": "int8", "act_qtype": "int16"}, ("int16", "int8")),
        ({"weight_qtype": "int4", "act_qtype": "int8"}, ("int8", "int4")),
        ({"weight_qtype": "int8", "act_qtype": "int8", "act_static_scale": False}, ("float32", "int8")),
    ],
)
def test_other_types_agree_with_their_fake_quantization(rule, types):
    model = Coder()
    provider = qwix.OdmlQatProvider([qwix.QuantizationRule(**rule)])
    model = qwix.quantize_model(model, provider, X)
    odml.calibrate(model, [X], progress=False)
    model.set_attributes(disable_quant_stats_update=True)
    file = odml.export(model, sample_inputs=X)
    layers = [op for op in file.summary().ops if op.name == "FULLY_CONNECTED"]
    assert [(op.inputs, op.constants[0]) for op in layers] == [((types[0],), types[1])] * 2
    want = np.asarray(model(X))
    assert abs(file.run({"image": X})["output"] - want).max() <= 1e-6 * abs(want).max()
