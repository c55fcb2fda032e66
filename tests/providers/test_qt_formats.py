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


def general(contracting, batch, ragged, groups):
    numbers = lax.RaggedDotDimensionNumbers((contracting, batch), ragged, groups)
    return lambda x, w: lax.ragged_dot_general(x, w, ROWS, numbers)


@pytest.mark.parametrize(
    "op, w",
    {
        "rows, transposed weights": (general(((1,), (2,)), ((), ()), (0,), (0,)), EXPERTS.mT),
        "the sum": (general(((1,), (0,)), ((), ()), (1,), ()), EXPERTS[0, :8]),
        "a batch": (general(((1,), (1,)), ((0,), (0,)), (0,), ()), EXPERTS.reshape(8, 16, 3)),
    }.values(),
)
def test_other_ragged_dots_stay_float_and_say_what_is_trained(op, w):
    x = X[:, :8] if w.shape[0] == 8 and w.ndim == 2 else X
    rule = qwix.QtRule(weight_qtype="int8", act_qtype="int8", bwd_qtype="int8")
    with pytest.warns(UserWarning) as seen:
        model = qwix.quantize_model(Op(op, w), qwix.QtProvider(rule), x)
    allowed = "of ragged dots, only [m, k] x [g, k, n] with ragged m is trained quantized"
    first = str(seen[0].message)
    assert all(words in first for words in ("The weight 'w'", allowed, "Call jax.lax.ragged_dot"))
    assert (model(x) == op(x, w)).all()
    (row,) = qwix.report(model).rows
    assert row.reason == allowed
