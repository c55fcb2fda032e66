"""dot_general_qt: gradients against integers and within analytic bounds, and what is kept for them."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwix
from qwix._src.core import dot_general as dot_lib
from qwix._src.core import numerics, qarray, qt_scaling, qt_vjp, sparsity, stochastic_rounding
from qwix._src.core.dot_general_qt import DotGeneralQtConfig, _Dot, dot_general_qt

DENSE = (((1,), (0,)), ((), ()))
W8A8 = {"lhs_qtype": "int8", "rhs_qtype": "int8"}
INT8 = W8A8 | {"dlhs_grad_qtype": "int8", "drhs_grad_qtype": "int8"}
FP8 = (
    {"lhs_qtype": "float8_e4m3fn", "rhs_qtype": "float8_e4m3fn"}
    | {
        f"d{side}_{name}": value
        for side in ("lhs", "rhs")
        for name, value in {"grad_qtype": "float8_e5m2", "grad_disable_channelwise_axes": True}.items()
    }
    | {"lhs_disable_channelwise_axes": True, "rhs_disable_channelwise_axes": True}
)


def _vjp(config, x, w, g, numbers=DENSE):
    @jax.jit
    def run(x, w, g):
        out, pull = jax.vjp(lambda x, w: dot_general_qt(x, w, numbers, config), x, w)
        return out, *pull(g)

    return run(x, w, g)


@pytest.fixture(scope="module")
def dense(normal):
    return normal(0, 24, 32), normal(1, 32, 16), normal(2, 24, 16)


def test_the_default_config_is_lax(dense):
    x, w, g = dense
    out, pull = jax.vjp(lambda x, w: jax.lax.dot_general(x, w, DENSE), x, w)
    for ours, lax in zip(_vjp(DotGeneralQtConfig(), x, w, g), (out, *pull(g)), strict=True):
        np.testing.assert_array_equal(ours, lax)


@st.composite
def dots(draw):
    """(subscripts, dimension numbers, shapes): up to two axes in each group, in any order."""
    groups = {c: draw(st.sampled_from([1, 2, 3, 4])) for c in "abcdefgh"}
    batch, contracting = "ab"[: draw(st.integers(0, 2))], "cd"[: draw(st.integers(0, 2))]
    terms = [
        "".join(draw(st.permutations(batch + contracting + free[: draw(st.integers(0, 2))])))
        for free in ("ef", "gh")
    ]
    numbers = tuple(tuple(tuple(t.index(c) for c in chars) for t in terms) for chars in (contracting, batch))
    free = "".join(c for t in terms for c in t if c not in batch + contracting)
    return f"{terms[0]},{terms[1]}->{batch}{free}", numbers, [tuple(groups[c] for c in t) for t in terms]


@settings(max_examples=8)
@given(case=dots(), seed=st.integers(0, 9))
def test_integers_are_exact_for_any_axes(case, seed, exact_training):
    subscripts, numbers, shapes = case
    operand, config = exact_training
    rng = np.random.default_rng(seed)
    ndims = tuple(map(len, shapes))
    x, w = (
        operand(
            rng,
            shape,
            dot_lib.get_how_to_quantize(
                dimension_numbers=numbers, ndims=ndims, for_lhs=not side, tile_size=None, qtype="int8"
            ),
        )
        for side, shape in enumerate(shapes)
    )
    left, right, out = subscripts.replace("->", ",").split(",")
    whole = lambda v: np.asarray(v).astype(np.int64)
    product = np.einsum(subscripts, whole(x), whole(w))
    g = rng.integers(-3, 4, product.shape)
    result = _vjp(config, x, w, jnp.array(g, jnp.float32), numbers)
    np.testing.assert_array_equal(result[0], product)
    np.testing.assert_array_equal(result[1], np.einsum(f"{out},{right}->{left}", g, whole(w)))
    np.testing.assert_array_equal(result[2], np.einsum(f"{left},{out}->{right}", whole(x), g))


FORMATS = [
    W8A8,
    {"rhs_qtype": "int4", "tile_size": 8},
    {"lhs_qtype": "int8", "rhs_qtype": "nf4", "tile_size": 8},
    {"lhs_qtype": "int6", "rhs_qtype": "int3"},
    W8A8 | {"lhs_calibration_method": "minmax", "rhs_calibration_method": "minmax"},
    {"lhs_qtype": "float8_e4m3fn", "rhs_qtype": "int4", "lhs_tile_size": 16, "rhs_tile_size": 1 / 4},
    W8A8 | {"lhs_disable_channelwise_axes": True, "rhs_disable_channelwise_axes": True},
    {"lhs_qtype": "int8", "rhs_qtype": "int8", "lhs_tile_size": {0: 8, 1: 8}, "rhs_tile_size": {0: 8, 1: 4}},
]


OP = _Dot((((1,), (0,)), ((), ())), (24, 32), (32, 16), None, None)


def _stored(config, x, side):
    """An operand as the forward op quantizes it: rows of lhs as kernels do, where they can."""
    how = qt_vjp.forward_how(OP, config, side)
    if how is None:
        return x
    rows = side == "lhs" and OP.on_the_way(x, jnp.zeros((32, 16)), how)
    return qt_scaling.quantize_rows(x, how) if rows else qarray.quantize(x, how)


@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_gradients_multiply_with_what_the_forward_op_stored(options, dense, check_einsum):
    """Straight through: the gradients of the product of the represented values."""
    config = DotGeneralQtConfig(**options, disable_gradient_clipping=True)
    x, w, g = dense
    _, dx, dw = _vjp(config, x, w, g)
    check_einsum(dx, "mn,kn->mk", g, _stored(config, w, "rhs"))
    check_einsum(dw, "mk,mn->kn", _stored(config, x, "lhs"), g)


@pytest.mark.parametrize("grad", ["int8", "float8_e5m2"])
@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_quantized_gradients_are_as_good_as_their_grid(options, grad, dense):
    """|dx - g w| <= sum of |w / s| times half a step of the grid of g s, and rounding; the same for dw."""
    config = DotGeneralQtConfig(
        **options, dlhs_grad_qtype=grad, drhs_grad_qtype=grad, disable_gradient_clipping=True
    )
    x, w, g = dense
    _, dx, dw = _vjp(config, x, w, g)
    for out, other, g_side in ((dx, _stored(config, w, "rhs").T, g), (dw.T, _stored(config, x, "lhs"), g.T)):
        represented = lambda v: np.asarray(v.dequantize() if isinstance(v, qwix.QArray) else v, np.float64)
        values = represented(other)
        bound = _grid_error(g_side, other, values, grad) + 1e-5 * (np.abs(g_side) @ np.abs(values))
        assert (np.abs(out - np.asarray(g_side, np.float64) @ values) <= bound).all()


def _grid_error(g, other, values, qtype):
    """[a, c] the greatest error of rounding g [a, b] before it is multiplied by other [b, c]."""
    scale = np.ones((1, 1))
    if isinstance(other, qwix.QArray):
        shared = other.scale.shape[1] == 1
        scale = np.asarray(other.scale, np.float64).reshape(1, -1) if shared else scale
    folded = np.asarray(g, np.float64) * scale
    absmax = np.abs(folded).max(1, keepdims=True)
    if "int" in qtype:
        step = absmax / numerics.get_symmetric_bound(qtype) / 2
        error = np.broadcast_to(step, folded.shape)
    else:
        info = jnp.finfo(qtype)
        unit = absmax / float(info.max) * float(info.smallest_subnormal)
        error = np.maximum(np.abs(folded) * float(info.eps) / 2, unit / 2)
    return (error * 1.001) @ np.abs(values / scale.T)


@pytest.mark.parametrize("side", ["lhs", "rhs"])
@pytest.mark.parametrize("method", ["fixed,0.5", "rms,1", "absmax,0.5", "minmax,0.5", "percentile,80", "mse"])
def test_gradients_stop_outside_of_a_range_that_clips(method, side, dense):
    x, w, g = dense
    options = {f"{side}_qtype": "int4", f"{side}_calibration_method": method, f"{side}_tile_size": 8}
    clipped = _vjp(DotGeneralQtConfig(**options), x, w, g)
    free = _vjp(DotGeneralQtConfig(**options, disable_gradient_clipping=True), x, w, g)
    operand, index = (x, 1) if side == "lhs" else (w, 2)
    how = qt_vjp.forward_how(OP, DotGeneralQtConfig(**options), side)
    ranges = qarray.calibrate(operand, how)
    expected = qarray.clip_gradient_to_calibration(free[index], operand, ranges, method)
    np.testing.assert_array_equal(clipped[index], expected)
    np.testing.assert_array_equal(clipped[3 - index], free[3 - index])
    if method != "mse":
        assert 0 < float((clipped[index] == 0).mean()) < 1


# --- what is kept for the backward pass


def _kept(config, x, w, argnums=(0, 1), f=None):
    """{dtype: [shapes]} of the arrays that a forward pass leaves."""
    dot = f or (lambda x, w: dot_general_qt(x, w, DENSE, config))
    args = [x, w]

    def of(*some):
        full = list(args)
        for i, v in zip(argnums, some, strict=True):
            full[i] = v
        return jax.vjp(
            lambda *some: dot(*[some[argnums.index(i)] if i in argnums else full[i] for i in (0, 1)]), *some
        )[1]

    kept = collections.defaultdict(list)
    for leaf in jax.tree.leaves(jax.eval_shape(of, *(args[i] for i in argnums))):
        if leaf.size > 100:  # not scales
            kept[leaf.dtype.name].append(leaf.shape)
    return {dtype: sorted(shapes) for dtype, shapes in kept.items()}


def test_only_what_the_backward_pass_multiplies_with_is_kept(normal):
    x, w = normal(3, 64, 48), normal(4, 48, 40)
    kept = lambda argnums=(0, 1), **options: _kept(DotGeneralQtConfig(**options), x, w, argnums)
    assert kept(**INT8) == {"int8": [(48, 40), (64, 48)]}
    assert kept(**W8A8) == {"int8": [(48, 40), (64, 48)]}
    assert kept(**W8A8, use_original_residuals=True) == {"float32": [(48, 40), (64, 48)]}
    assert kept(**INT8, tile_size=8)["int8"] == [(48, 40), (64, 48)]
    assert kept(rhs_qtype="int4") == {"float32": [(64, 48)], "int4": [(48, 40)]}
    assert kept(drhs_grad_qtype="int8", drhs_residual_qtype="int8") == {
        "float32": [(48, 40)],
        "int8": [(64, 48)],
    }
    clipping = kept(**INT8, lhs_calibration_method="rms,2")
    assert clipping == {"int8": [(48, 40), (64, 48)], "bool": [(64, 48)]}
    # An operand that needs no gradient (an input, a frozen weight) has the other one not kept.
    assert kept((0,), **INT8) == {"int8": [(48, 40)]}
    assert kept((1,), **INT8) == {"int8": [(64, 48)]}


def test_a_compiled_step_holds_no_float_copy_of_what_it_multiplies():
    """Of a chain of layers, what lives from forward to backward is int8: under half of the float chain's."""
    w = jax.ShapeDtypeStruct((6, 64, 64), jnp.float32)
    x = jax.ShapeDtypeStruct((4096, 64), jnp.float32)

    def temporary(config):
        def loss(w, x):
            layer = lambda x, w: (jax.lax.optimization_barrier(dot_general_qt(x, w, DENSE, config)), None)
            return jax.lax.scan(layer, x, w)[0].sum()

        return jax.jit(jax.grad(loss)).lower(w, x).compile().memory_analysis().temp_size_in_bytes

    activations = 6 * 4096 * 64 * 4
    quantized, floats = temporary(DotGeneralQtConfig(**INT8)), temporary(DotGeneralQtConfig())
    assert floats > activations
    assert quantized < 0.75 * floats


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for sub in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(sub, "jaxpr", sub)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def _step_equations(config, x, w):
    step = jax.grad(lambda x, w: dot_general_qt(x, w, DENSE, config).sum(), (0, 1))
    return list(_equations(jax.make_jaxpr(step)(x, w).jaxpr))


def test_all_three_products_are_of_int8(dense):
    x, w, _ = dense
    dots = [e for e in _step_equations(DotGeneralQtConfig(**INT8), x, w) if e.primitive.name == "qwix_matmul"]
    used = lambda p: (p.quantize_lhs.dtype if p.quantize_lhs else p.lhs.dtype, p.rhs.dtype)
    assert [used(e.params["problem"]) for e in dots] == [("int8", "int8")] * 3
    # Scales stand outside of every sum: integers are added up.
    assert all(p.lhs.tile_k in (0, p.k) and p.rhs.tile_k == p.k for p in (e.params["problem"] for e in dots))


def test_the_gradient_is_quantized_once_for_both_where_it_is_the_same(dense):
    x, w, _ = dense

    def roundings(**options):
        equations = _step_equations(DotGeneralQtConfig(**options), x, w)
        return sum(
            e.primitive.name == "convert_element_type" and e.params["new_dtype"] == jnp.float8_e5m2
            for e in equations
        ) + sum(
            e.primitive.name == "qwix_matmul" and "e5m2" in str(e.params["problem"].quantize_lhs)
            for e in equations
        )

    assert roundings(**FP8) == 1
    assert roundings(**FP8 | {"drhs_grad_calibration_method": "fixed,2"}) == 2
    channelwise = {"lhs_disable_channelwise_axes": False, "dlhs_grad_disable_channelwise_axes": False}
    assert roundings(**FP8 | channelwise) == 2
    tiles = {"dlhs_tile_size": {0: 8, 1: 8}, "drhs_tile_size": {0: 8, 1: 8}}
    assert roundings(**FP8 | tiles) == 1


def test_rematerialization_can_save_the_quantized_residuals(normal):
    x, w = normal(5, 64, 48), normal(6, 48, 40)
    config = DotGeneralQtConfig(**INT8)
    policy = jax.checkpoint_policies.save_only_these_names(*qt_vjp.RESIDUAL_NAMES.values())
    dot = lambda x, w: jnp.tanh(dot_general_qt(jnp.tanh(x), jnp.tanh(w), DENSE, config))
    saved = _kept(config, x, w, f=jax.checkpoint(dot, policy=policy))
    assert saved["int8"] == [(48, 40), (64, 48)]
    nothing = _kept(config, x, w, f=jax.checkpoint(dot))
    assert "int8" not in nothing
    loss = lambda f: jax.jit(jax.grad(lambda x, w: f(x, w).sum(), (0, 1)))
    for ours, plain in zip(loss(jax.checkpoint(dot, policy=policy))(x, w), loss(dot)(x, w), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)


# --- static scales, results, other operands


def test_statistics_are_collected_in_the_callers_trace(dense):
    """Also in jit of grad of scan, where a hook inside of the custom derivative could not carry them out."""
    x, w, _ = dense

    def loss(w, xs):
        def step(total, x):
            seen = []
            collect = lambda stat: seen.append(stat["absmax"]) or {"absmax": jnp.full((1, 1), 4.0)}
            config = DotGeneralQtConfig(
                **W8A8, lhs_collect_quant_stat=collect, lhs_disable_channelwise_axes=True
            )
            out = dot_general_qt(x, w, DENSE, config)
            return total + out.sum(), (seen[0], out)

        total, seen = jax.lax.scan(step, 0.0, xs)
        return total, seen

    grads, (stats, out) = jax.jit(jax.grad(loss, has_aux=True))(w, jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(stats[:, 0, 0], [jnp.abs(x).max(), 2 * jnp.abs(x).max()])
    scale = np.float32(4) / np.float32(127.5)
    stored = lambda x: qarray.quantize_with_scale_zero_point(x, "int8", jnp.full((1, 1), scale), None)
    weight = qarray.quantize(w, dot_lib.HowToQuantize(qtype="int8", channelwise_axes=(1,)))
    expected = qwix.dot_general(stored(x), weight, DENSE)
    np.testing.assert_allclose(out[0], expected, rtol=1e-6, atol=1e-6)
    inside = lambda x: stored(x).dequantize().sum(0)
    np.testing.assert_allclose(grads[:, 0], inside(x) + inside(2 * x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("qtype", ["int8", "float8_e4m3fn"])
def test_training_sees_what_serving_will(qtype, normal):
    """The forward op, with and without a gradient being taken, is the op on quantized weights."""
    for dtype in (jnp.float32, jnp.bfloat16):
        x, w = normal(7, 24, 32, dtype=dtype), normal(8, 32, 16, dtype=dtype)
        config = DotGeneralQtConfig(lhs_qtype=qtype, rhs_qtype=qtype, drhs_grad_qtype=qtype)
        how = functools.partial(dot_lib.get_how_to_quantize, dimension_numbers=DENSE, ndims=(2, 2))
        weight = qarray.quantize(w, how(for_lhs=False, tile_size=None, qtype=qtype))
        act_how = how(for_lhs=True, tile_size=None, qtype=qtype)
        serving = jax.jit(lambda x: qwix.dot_general(x, weight, DENSE, act_how=act_how))(x)  # noqa: B023
        training = jax.jit(lambda x, w: dot_general_qt(x, w, DENSE, config))(x, w)  # noqa: B023
        np.testing.assert_array_equal(training, serving)
        np.testing.assert_array_equal(_vjp(config, x, w, jnp.ones_like(serving))[0], serving)


@pytest.mark.parametrize("preferred", [None, jnp.float32, jnp.bfloat16])
def test_dtypes(preferred, normal):
    x, w = normal(9, 8, 16, dtype=jnp.bfloat16), normal(10, 16, 8, dtype=jnp.float32)
    config = DotGeneralQtConfig(**INT8)
    dot = lambda x, w: dot_general_qt(x, w, DENSE, config, preferred_element_type=preferred)
    out, pull = jax.vjp(dot, x, w)
    assert out.dtype == (preferred or jnp.float32)
    dx, dw = pull(jnp.ones_like(out))
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)


def test_operands_that_are_quantized_already_are_used_as_they_are(dense):
    x, w, g = dense
    weight = qwix.quantize(w, "int4", channelwise_axes=(1,))
    config = DotGeneralQtConfig(**INT8)
    out, pull = jax.vjp(lambda x: dot_general_qt(x, weight, DENSE, config), x)
    np.testing.assert_array_equal(out, dot_general_qt(x, weight, DENSE, config.replace(dlhs_grad_qtype=None)))
    assert pull(g)[0].shape == x.shape


def test_square_operands_and_empty_ones(normal):
    x = normal(11, 8, 8)
    config = DotGeneralQtConfig(**INT8)
    out, dx, dw = _vjp(config, x, x, x)
    assert out.shape == dx.shape == dw.shape == (8, 8)
    nothing = _vjp(config, x[:0], x, x[:0])
    assert nothing[1].shape == (0, 8) and not np.asarray(nothing[2]).any()


def test_pruned_weights_neither_count_nor_learn(dense):
    x, w, g = dense
    rule = qwix.SparsityRule(weight_sparsity_n=1, weight_sparsity_m=4)
    keep = np.asarray(sparsity.get_sparsity_mask(w, 1, 4))
    sparse = _vjp(DotGeneralQtConfig(**W8A8, sparsity_rule=rule), x, w, g)
    plain = _vjp(DotGeneralQtConfig(**W8A8), x, jnp.where(keep, w, 0), g)
    np.testing.assert_array_equal(sparse[0], plain[0])
    np.testing.assert_array_equal(sparse[2], jnp.where(keep, plain[2], 0))
    nothing = _vjp(DotGeneralQtConfig(**W8A8, sparsity_rule=qwix.SparsityRule()), x, w, g)
    np.testing.assert_array_equal(nothing[2], _vjp(DotGeneralQtConfig(**W8A8), x, w, g)[2])


def test_a_field_that_does_not_exist_is_named():
    config = DotGeneralQtConfig()
    with pytest.raises(TypeError, match=r"no field 'dlhs_grad_qtpye'\. Did you mean 'dlhs_grad_qtype'"):
        config.replace(dlhs_grad_qtpye="int8")
    with pytest.raises(ValueError, match="Did you mean 'int8'"):
        config.replace(lhs_qtype="int9")
    with pytest.raises(ValueError, match=r"Unsupported calibration.*percentile"):
        config.replace(dlhs_grad_calibration_method="median")
    assert hash(config.replace(tile_size={0: 8})) == hash(config.replace(tile_size={0: 8}))


# --- transformations and stochastic rounding


def test_transformations_agree(dense):
    x, w, g = dense
    config = DotGeneralQtConfig(**INT8)
    loss = lambda x, w: (dot_general_qt(x, w, DENSE, config) * g).sum()
    both = jax.grad(loss, (0, 1))
    dx, dw = both(x, w)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    for f in (jax.jit(both), jax.grad(jax.checkpoint(loss), (0, 1))):
        jax.tree.map(close, f(x, w), (dx, dw))
    xs = jnp.stack([x, 2 * x])
    jax.tree.map(close, jax.vmap(both, (0, None))(xs, w), (jnp.stack([dx, dx]), jnp.stack([dw, 2 * dw])))
    mapped = jax.grad(lambda w: jax.vmap(loss, (0, None))(jnp.stack([x, x]), w).sum())(w)
    close(mapped, 2 * dw)
    scanned = jax.lax.scan(lambda c, x: (c, both(x, w)), 0, xs)[1]
    jax.tree.map(close, scanned, (jnp.stack([dx, dx]), jnp.stack([dw, 2 * dw])))


def test_a_second_step_compiles_nothing(normal):
    @jax.jit
    def step(x, w, key):
        noise = stochastic_rounding.get_noise_fn("uniform", key)
        config = DotGeneralQtConfig(**INT8, dlhs_stochastic_rounding_noise_fn=noise)
        return jax.grad(lambda x: dot_general_qt(x, w, DENSE, config).sum())(x)

    for seed in range(3):
        step(normal(seed, 4, 8), normal(seed, 8, 4), jax.random.key(seed))
    assert step._cache_size() == 1


def _rounded(key, x, w, g, qtype, method="uniform", axes=(0, 1), **options):
    noise = stochastic_rounding.get_noise_fn(method, key, axes)
    config = DotGeneralQtConfig(
        **W8A8,
        dlhs_grad_qtype=qtype,
        drhs_grad_qtype=qtype,
        dlhs_stochastic_rounding_noise_fn=noise,
        drhs_stochastic_rounding_noise_fn=noise,
        **options,
    )
    return _vjp(config, x, w, g)[1:]


@pytest.mark.parametrize(
    "qtype, method", [("int4", "low_bit_uniform"), ("int3", "uniform"), ("float8_e5m2", "uniform")]
)
def test_stochastic_rounding_is_right_on_average(qtype, method, dense):
    """The mean over n keys is within 6 standard errors: of one value at most half a step, of sums their root.

    8-bit noise is off by up to 1/512 of a step besides.
    """
    x, w, g = dense
    n = 400
    keys = jax.random.split(jax.random.key(0), n)
    noisy = jax.jit(jax.vmap(lambda key: _rounded(key, x, w, g, qtype, method)))(keys)
    config = DotGeneralQtConfig(**W8A8)
    for side, (mean, out) in enumerate(
        zip([v.mean(0) for v in noisy], _vjp(config, x, w, g)[1:], strict=True)
    ):
        other = _stored(config, w, "rhs").T if side == 0 else _stored(config, x, "lhs")
        values = np.asarray(other.dequantize(), np.float64)
        # The greatest distance of neighbours on g's grid, in the units of each product's terms.
        scale = np.asarray(other.scale, np.float64).reshape(1, -1)
        folded = np.abs(np.asarray(g if side == 0 else g.T, np.float64) * scale)
        bound = 57344.0 if qtype == "float8_e5m2" else numerics.get_symmetric_bound(qtype)
        step = folded.max(1, keepdims=True) / bound * (2.0**13 if qtype == "float8_e5m2" else 1)
        spread = step / 2 * np.sqrt(((values / scale.T) ** 2).sum(0))
        # the greatest magnitude lies half a step beyond the last integer and is cut to it
        cut = 0 if "float" in qtype else (folded > (bound - 1) * step) * 1.0 @ np.abs(values / scale.T) * step
        shift = step / 512 * np.abs(values / scale.T).sum(0)
        limit = 6 * spread / np.sqrt(n) + shift + cut + 1e-4
        error = np.abs(mean - out) if side == 0 else np.abs(mean - out).T
        assert (error <= limit).all(), (error / limit).max()
        assert (np.asarray(noisy[side]).std(0) > 0).any()


def test_noise_is_reproducible_and_independent_of_sharding(devices, normal):
    x, w, g = normal(12, 32, 16), normal(13, 16, 8), normal(14, 32, 8)
    key = jax.random.key(7)
    # A fixed range: the greatest value of a dynamic one lies between two integers, and the last bit decides.
    fixed = {f"{side}_calibration_method": "fixed,5" for side in ("lhs", "rhs", "dlhs_grad", "drhs_grad")}
    round_int4 = functools.partial(_rounded, qtype="int4", **fixed)
    alone = round_int4(key, x, w, g)
    for ours, again in zip(round_int4(key, x, w, g), alone, strict=True):
        np.testing.assert_array_equal(ours, again)
    other = round_int4(jax.random.key(8), x, w, g)
    assert all((np.asarray(a) != np.asarray(b)).any() for a, b in zip(other, alone, strict=True))
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = lambda v, *spec: jax.device_put(v, jax.NamedSharding(mesh, jax.P(*spec)))
    sharded = round_int4(key, place(x, "a"), place(w, None, "b"), place(g, "a", "b"))
    for ours, reference in zip(sharded, alone, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-6, atol=1e-6)


def test_a_plain_function_makes_noise_too(dense):
    x, w, g = dense
    half = lambda shape: jnp.full(shape, 0.25)
    options = {"dlhs_stochastic_rounding_noise_fn": half, "drhs_stochastic_rounding_noise_fn": half}
    noisy = _vjp(DotGeneralQtConfig(**INT8 | options), x, w, g)
    plain = _vjp(DotGeneralQtConfig(**INT8), x, w, g)
    assert all((np.asarray(a) != np.asarray(b)).any() for a, b in zip(noisy[1:], plain[1:], strict=True))
    with pytest.raises(ValueError, match="noise_fn"):
        _vjp(DotGeneralQtConfig(**INT8 | options | {"dlhs_grad_qtype": "nf4"}), x, w, g)
