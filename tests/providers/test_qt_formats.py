"""Formats and ops that a model trains with: fp8 in Linen and NNX, weights alone, ragged dots."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax._src.core import jaxprs_in_params

import qwix
from qwix._src.core.dot_general_qt import DotGeneralQtConfig, dot_general_qt
from qwix._src.core.ragged_dot_qt import ragged_dot_qt

LARGE = pytest.mark.large
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
DOT = (((1,), (0,)), ((), ()))
X = jax.random.normal(jax.random.key(0), (8, 16))
W = jax.random.normal(jax.random.key(1), (16, 8))
G = jax.random.normal(jax.random.key(2), (8, 8))


class Op(nnx.Module):
    def __init__(self, op, w):
        self.op, self.w = nnx.static(op), nnx.Param(w)

    def __call__(self, x):
        return self.op(x, self.w[...])


def trained(kind, rule, op=lambda x, w: lax.dot_general(x, w, DOT), w=W):
    """(x, w) -> the result of a model with one op."""
    if kind == "linen":
        model = qwix.quantize_model(nn.Dense(8, use_bias=False), qwix.QtProvider(rule))
        return lambda x, w: model.apply({"params": {"kernel": w}}, x)
    graphdef, _ = nnx.split(qwix.quantize_model(Op(op, w), qwix.QtProvider(rule)))
    return lambda x, w: nnx.merge(graphdef, {"w": nnx.Param(w)})(x)


def results(fn, x, w, g):
    out, pull = jax.vjp(fn, x, w)
    return out, *pull(g)


def problems(jaxpr):
    """Of all kernels in a program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "qwix_matmul":
            yield eqn.params["problem"]
        for inner in jaxprs_in_params(eqn.params):
            yield from problems(inner)


@pytest.mark.parametrize(
    "kind, forward", [("linen", E4M3), ("nnx", E4M3), pytest.param("nnx", "int8", marks=LARGE)]
)
def test_forward_and_gradients_have_formats_of_their_own(kind, forward):
    """e4m3 (or int8) forward and e5m2 gradients: three products, of these formats, within their steps."""
    fn = trained(kind, qwix.QtRule(weight_qtype=forward, act_qtype=forward, bwd_qtype=E5M2))
    config = DotGeneralQtConfig(
        lhs_qtype=forward, rhs_qtype=forward, dlhs_grad_qtype=E5M2, drhs_grad_qtype=E5M2
    )
    run = lambda fn: jax.jit(lambda x, w, g: results(fn, x, w, g))
    got, expected = (run(f)(X, W, G) for f in (fn, lambda x, w: dot_general_qt(x, w, DOT, config)))
    for ours, reference in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, reference)
    used = lambda p: (p.quantize_lhs.dtype if p.quantize_lhs else p.lhs.dtype, p.rhs.dtype)
    formats = sorted(used(p) for p in problems(jax.make_jaxpr(run(fn))(X, W, G).jaxpr))
    assert formats == sorted([(forward, forward), (E5M2, forward), (forward, E5M2)])
    # An eighth for e5m2, a sixteenth for e4m3, half a step for int8, of what stands in each sum.
    step = {E4M3: abs(X).max() / 16, "int8": abs(X).max() / 255}[forward] + abs(W).max() / 16
    size = abs(G) @ abs(W).T
    assert (abs(got[1] - G @ W.T) <= size / 8 + step * abs(G).sum(1, keepdims=True) + 1e-5).all()


ROWS = jnp.array([5, 0, 3])
EXPERTS = jax.random.normal(jax.random.key(3), (3, 16, 8))


@pytest.mark.parametrize(
    "weight, bwd", [("int8", None), pytest.param("int5", "int8", marks=LARGE), ("nf4", E5M2)]
)
def test_weights_of_experts_are_quantized_alone(weight, bwd):
    op = lambda x, w: lax.ragged_dot(x, w, ROWS)
    fn = trained("nnx", qwix.QtRule(weight_qtype=weight, bwd_qtype=bwd), op, EXPERTS)
    config = DotGeneralQtConfig(
        rhs_qtype=weight, dlhs_grad_qtype=bwd, drhs_grad_qtype=bwd, use_original_residuals=bwd is None
    )
    run = lambda fn: jax.jit(lambda x, w, g: results(fn, x, w, g))(X, EXPERTS, G)
    got, expected = run(fn), run(lambda x, w: ragged_dot_qt(x, w, ROWS, config))
    for ours, reference in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, reference)
    assert (got[0] != op(X, EXPERTS)).any()


BY_BATCH = jnp.array([[2, 0, 1], [0, 4, 0]])


def general(contracting, batch, ragged, groups, sizes=ROWS):
    numbers = lax.RaggedDotDimensionNumbers((contracting, batch), ragged, groups)
    return lambda x, w: lax.ragged_dot_general(x, w, sizes, numbers)


basic = lambda x, w, sizes=ROWS: lax.ragged_dot(x, w, sizes)
BATCH_X = jax.random.normal(jax.random.key(4), (2, 4, 16))
BATCH_W = jax.random.normal(jax.random.key(5), (3, 2, 16, 8))
# A ragged dot, its operands, and the same with what core trains, of the same values in other places.
GENERAL = {
    "transposed weights": (
        general(((1,), (2,)), ((), ()), (0,), (0,)),
        X,
        EXPERTS.mT,
        lambda x, w: basic(x, w.mT),
    ),
    "groups last, and two sums": (
        general(((1, 2), (0, 1)), ((), ()), (0,), (3,)),
        X.reshape(8, 2, 8),
        jnp.moveaxis(EXPERTS, 0, 2).reshape(2, 8, 3, 8).swapaxes(2, 3),
        lambda x, w: basic(x.reshape(8, 16), w.reshape(16, 8, 3).transpose(2, 0, 1)),
    ),
    "several rows in one": (
        general(((2,), (1,)), ((), ()), (0,), (0,), jnp.array([1, 0, 2])),
        X.reshape(4, 2, 16),
        EXPERTS,
        lambda x, w: basic(x.reshape(8, 16), w, jnp.array([2, 0, 4])).reshape(4, 2, 8),
    ),
    "batches": (
        general(((2,), (2,)), ((0,), (1,)), (1,), (0,), BY_BATCH),
        BATCH_X,
        BATCH_W,
        lambda x, w: jnp.stack([basic(x[i], w[:, i], BY_BATCH[i]) for i in range(2)]),
    ),
}
TRAINED = {
    "int8": qwix.QtRule(weight_qtype="int8", act_qtype="int8", bwd_qtype="int8"),
    "tiles": qwix.QtRule(weight_qtype="int4", tile_size=0.5),
    "static": qwix.QtRule(weight_qtype="int8", act_qtype="int8", act_static_scale=True, tile_size=4),
}


@pytest.mark.parametrize(
    "kind, rule",
    [("transposed weights", "static"), ("batches", "int8")]
    + [pytest.param(kind, "int8", marks=LARGE) for kind in GENERAL if kind != "batches"]
    + [pytest.param("transposed weights", "tiles", marks=LARGE)],
)
def test_ragged_dots_of_other_layouts_are_trained_as_the_usual_one(kind, rule):
    op, x, w, usual = GENERAL[kind]
    g = jnp.cos(jnp.arange(op(x, w).size)).reshape(op(x, w).shape)

    def run(op, x, w, g):
        model = qwix.quantize_model(Op(op, w), qwix.QtProvider(TRAINED[rule]), x)
        graphdef, state = nnx.split(model)

        def fn(x, w):
            new = nnx.merge(graphdef, jax.tree.map(lambda s: s, state))
            new.w.set_value(w)
            return new(x)

        return results(fn, x, w, g)

    got, want, exact = jax.jit(lambda x, w, g: (run(op, x, w, g), run(usual, x, w, g), results(op, x, w, g)))(
        x, w, g
    )
    assert (got[0] != exact[0]).any()
    # Gradients are rounded with one scale for the rows of all batches: to half a step of 127 on both sides.
    bounds = [1e-6, 1e-6, 0.02 if kind == "batches" else 1e-6]
    for ours, reference, of_float, bound in zip(got, want, exact, bounds, strict=True):
        assert abs(ours - reference).max() <= bound * abs(reference).max()
        assert abs(ours - of_float).max() <= 0.4 * abs(of_float).max()


@LARGE
def test_a_ragged_batch_is_a_dot_of_which_a_part_counts():
    op = general(((2,), (1,)), ((0,), (0,)), (0,), (), jnp.array([2, 3]))
    x = jax.random.normal(jax.random.key(6), (8, 4, 16)).at[5:].set(jnp.nan)
    w = jax.random.normal(jax.random.key(7), (8, 16, 4))
    rule, numbers = TRAINED["int8"], (((2,), (1,)), ((0,), (0,)))
    dot = lambda x, w: lax.dot_general(x, w, numbers)
    g = jnp.ones((8, 4, 4))

    @jax.jit
    def both(x, w, g):
        whole = results(trained("nnx", rule, op, w), x, w, g)
        return whole, results(trained("nnx", rule, dot, w[:5]), x[:5], w[:5], g[:5])

    for whole, five in zip(*both(x, w, g), strict=True):
        assert (whole[5:] == 0).all() and abs(whole[:5] - five).max() <= 1e-6 * abs(five).max()


def two_sums(x, w):
    return GENERAL["groups last, and two sums"][0](x, w)


@pytest.mark.parametrize(
    "op, x, w, rule, why",
    [
        (general(((1,), (0,)), ((), ()), (1,), ()), X[:, :8], EXPERTS[0, :8], "int8", "is summed over"),
        (two_sums, *GENERAL["groups last, and two sums"][1:3], "tiles", "tiles of 0.5 are for one axis"),
    ],
    ids=["ragged sum", "tiles of two axes"],
)
def test_others_stay_float_and_say_so(op, x, w, rule, why):
    with pytest.warns(UserWarning) as seen:
        model = qwix.quantize_model(Op(op, w), qwix.QtProvider(TRAINED[rule]), x)
    words = (
        "The weight 'w'",
        "this kind of ragged dot isn't trained quantized",
        why,
        "Call jax.lax.ragged_dot",
    )
    assert all(word in str(seen[0].message) for word in words)
    assert (model(x) == op(x, w)).all()
    (row,) = qwix.report(model).rows
    assert why in row.reason
