"""PtqProvider(prepack=True): weights stored as kernels read them; all else stays the same."""

import doctest

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qwix
from qwix._src import prepack
from qwix._src.core.qarray import QArray
from qwix._src.core.transposed_qarray import TransposedQArray

RULES = {
    "int8": {"weight_qtype": "int8", "act_qtype": "int8"},
    "int4": {"weight_qtype": "int4", "tile_size": 4},
    "nf4": {"weight_qtype": "nf4", "tile_size": 8},
    "minmax": {"weight_qtype": "int8", "weight_calibration_method": "minmax"},
}
X = jax.random.normal(jax.random.key(0), (2, 5, 16))


class Attention(nnx.Module):
    """Weights of two and three axes, contracted over one and two, the heads in front and in the middle."""

    def __init__(self, rngs):
        self.heads = nnx.LinearGeneral(16, (2, 8), use_bias=False, rngs=rngs)
        self.out = nnx.LinearGeneral((2, 8), 16, axis=(-2, -1), rngs=rngs)
        self.first = nnx.Einsum("btd,ndh->btnh", (2, 16, 8), None, rngs=rngs)
        self.plain = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        x = x + self.out(self.heads(x))
        return self.plain(x + self.first(x).reshape(x.shape))


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.DenseGeneral((2, 8), use_bias=False, name="heads")(x)
        return nn.DenseGeneral(16, axis=(-2, -1), name="out")(y)


def rules(name: str) -> list[qwix.QuantizationRule]:
    return [qwix.QuantizationRule(module_path=".*", **RULES[name])]


def in_nnx(name: str, **kwargs) -> Attention:
    return qwix.quantize_model(Attention(nnx.Rngs(0)), qwix.PtqProvider(rules(name), **kwargs), X)


def test_examples_in_docstrings():
    assert doctest.testmod(prepack).failed == 0


@pytest.mark.parametrize("name", RULES)
def test_the_same_weights_and_the_same_results(name):
    plain, packed = in_nnx(name), in_nnx(name, prepack=True)
    kinds = {}
    for layer in ("heads", "out", "first", "plain"):
        one, other = (getattr(model, layer).kernel for model in (plain, packed))
        kinds[layer] = type(other.array)
        assert other.shape == one.shape and other.dtype == one.dtype and other.size == one.size
        assert isinstance(other.unboxed, QArray)
        jax.tree.map(np.testing.assert_array_equal, other.unboxed, one.unboxed)
    assert kinds["plain"] is QArray
    assert {kinds[layer] for layer in ("heads", "out", "first")} == {TransposedQArray}
    np.testing.assert_array_equal(packed(X), plain(X))
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(packed, X), nnx.jit(lambda m, x: m(x))(plain, X))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_linen_by_init_and_by_quantize_params(name):
    model = LinenAttention()
    params = model.init(jax.random.key(1), X)["params"]
    plain, packed = (
        qwix.quantize_model(model, qwix.PtqProvider(rules(name), prepack=p)) for p in (False, True)
    )
    stored = []
    for quantized in (plain, packed):
        abstract = jax.eval_shape(quantized.init, jax.random.key(1), X)["params"]
        stored.append(qwix.quantize_params(params, abstract))
        assert jax.tree.structure(stored[-1]) == jax.tree.structure(abstract)
    assert isinstance(stored[1]["heads"]["kernel"].array, TransposedQArray)
    expected = plain.apply({"params": stored[0]}, X)
    np.testing.assert_array_equal(packed.apply({"params": stored[1]}, X), expected)
    fresh = packed.init(jax.random.key(1), X)
    np.testing.assert_array_equal(packed.apply(fresh, X), expected)


def test_nnx_by_quantize_params():
    packed, other = in_nnx("int8", prepack=True), Attention(nnx.Rngs(5))
    params = nnx.to_pure_dict(nnx.state(other, nnx.Param))
    nnx.update(packed, qwix.quantize_params(params, packed))
    expected = qwix.quantize_model(other, qwix.PtqProvider(rules("int8")), X)(X)
    np.testing.assert_array_equal(packed(X), expected)


def test_without_data():
    abstract = nnx.eval_shape(lambda: in_nnx("int4", prepack=True))
    kernel = abstract.heads.kernel
    assert isinstance(kernel.array, TransposedQArray) and kernel.shape == (16, 2, 8)
    assert kernel.unboxed.qvalue.shape == (16, 2, 8)


def test_the_report_is_the_same():
    plain, packed = (str(qwix.report(in_nnx("int8", prepack=p))) for p in (False, True))
    assert plain == packed


def test_partition_names_follow_a_weight_where_its_pieces_stay_pieces():
    class Sharded(nnx.Module):
        def __init__(self, rngs):
            make = lambda *names: nnx.LinearGeneral(
                16,
                (2, 8),
                use_bias=False,
                kernel_init=nnx.with_metadata(nnx.initializers.lecun_normal(), out_sharding=names),
                rngs=rngs,
            )
            self.heads, self.dims = make(None, "model", None), make(None, None, "model")

        def __call__(self, x):
            return self.heads(x) + self.dims(x)

    with jax.set_mesh(jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))):
        model = qwix.quantize_model(Sharded(nnx.Rngs(0)), qwix.PtqProvider(rules("int8"), prepack=True), X)
    packed = model.heads.kernel.array
    for part in (packed.qvalue, packed.scale):
        assert part.get_metadata("out_sharding") == (None, None, "model")
        assert part.get_value().sharding.spec == jax.sharding.PartitionSpec(None, None, "model")
    assert isinstance(model.dims.kernel.array, QArray)  # pieces of the last axis are no piece of both
