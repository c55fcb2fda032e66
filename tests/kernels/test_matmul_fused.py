"""What is fused round a matmul: the same on every path, its gradients, its transformations, bad input."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from qwix_kernels import dispatch
from qwix_kernels.chips import CHIPS
from qwix_kernels.matmul import (
    Extras,
    RowQuantize,
    Tensor,
    elementwise,
    matmul,
    problem_of,
    reference,
    tpu,
    tpu_split,
)
from qwix_kernels.problem import ACTIVATIONS

from bench.tpu_compile import compile_for

INTERPRET = pltpu.InterpretParams(detect_races=True)
INT8 = RowQuantize("int8", 127.5)
STATIC = RowQuantize("int8", 127.5, static=True)
FP8 = RowQuantize("float8_e4m3fn", 448.0)
MX = RowQuantize("float8_e4m3fn", 448.0, 32, scale_dtype="float8_e8m0fnu")
EPS = 2.0**-24


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    yield
    pltpu.reset_tpu_interpret_mode_state()


def floats(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def weight(k, n, dtype="int8", tiles=1, batch=1, seed=1):
    rng = np.random.default_rng(seed)
    if dtype == "float32":
        return Tensor(floats(batch, k, n, seed=seed))
    values = jnp.asarray(rng.integers(-7, 8, (batch, k, n)), jnp.int32).astype(dtype)
    return Tensor(values, jnp.asarray(rng.uniform(0.01, 0.1, (batch, tiles, n)), jnp.float32))


def all_extras(m, k, n, w, only=None, **changes):
    """Every array that a problem can have, or those in `only`."""
    given = {
        "norm_weight": 1 + floats(1, 1, k, seed=2) / 4,
        "bias": floats(1, 1, n, seed=3),
        "gate": dataclasses.replace(w, values=jnp.flip(w.values, 2)),
        "gate_bias": floats(1, 1, n, seed=4),
        "residual": floats(1, m, n, seed=5),
    }
    names = given if only is None else only
    return Extras(**{name: given[name] for name in names} | changes)


def assert_right(got, problem, x, w, extras, multiplied=None):
    want = reference.run(problem, Tensor(x), w, extras)
    allowed = reference.error_bound(problem, Tensor(x), w, extras, multiplied=multiplied)
    if problem.epilogue and problem.epilogue.quantize:
        assert_quantized(got, want, allowed, problem, extras)
        return
    got = np.asarray(got).astype(np.float64)
    assert got.shape == want.shape
    assert (np.abs(got - want) <= allowed).all(), f"{np.max(np.abs(got - want) / allowed)} times the bound"


def assert_quantized(got, want, allowed, problem, extras):
    """Values times scales are off by half a step of the stored type, besides the error before."""
    how = problem.epilogue.quantize
    stored = reference.quantize_rows(want, how, Extras(lhs_scale=extras.out_scale))
    assert got.values.dtype == how.dtype and got.values.shape == want.shape
    assert got.scale.shape == stored.scale.shape
    scale = np.repeat(np.asarray(got.scale, np.float64), want.shape[2] // got.scale.shape[2], 2)
    represented = np.asarray(got.values).astype(np.float64) * scale
    step = 1.0 if jnp.issubdtype(how.dtype, jnp.integer) else float(jnp.finfo(how.dtype).eps)
    rounding = step / 2 * np.maximum(1, np.abs(represented / scale) if step < 1 else 1) * scale
    inside = np.abs(want / scale) <= how.limits[1]
    error = np.abs(represented - want)
    assert (error <= allowed + rounding * (1 + 8 * EPS))[inside].all()
    assert (error <= allowed + scale)[~inside | how.static].all() or how.static


# --- the kernel


KERNEL_CASES = {
    "bias": ("int8", 1, INT8, ["bias"], None),
    "relu_residual": ("int8", 1, INT8, ["bias", "residual"], "relu"),
    "relu6": ("int4", 2, None, [], "relu6"),
    "gelu": ("int4", 2, None, ["bias"], "gelu"),
    "gelu_tanh_gate": ("int8", 2, dataclasses.replace(INT8, tile_k=128), ["gate"], "gelu_tanh"),
    "silu_gate_all": ("int8", 1, INT8, ["bias", "gate", "gate_bias", "residual"], "silu"),
    "gate_alone": ("int4", 2, None, ["gate"], None),
}


@pytest.mark.parametrize("case", KERNEL_CASES)
def test_epilogue_in_the_kernel(case):
    dtype, tiles, how, only, activation = KERNEL_CASES[case]
    m, k, n = 40, 256, 300
    x, w = floats(1, m, k, dtype="bfloat16"), weight(k, n, dtype, tiles)
    extras = all_extras(m, k, n, w, only)
    problem = problem_of(x, w, extras, quantize_lhs=how, activation=activation, out_dtype="float32")
    strategy = "once" if tiles == 1 else "after" if how else "before"
    config = tpu.Config(32, 128, 256 if tiles == 1 else 128, strategy)
    got = tpu.run(problem, Tensor(x), w, extras, config=config, chip=CHIPS["v6e"], interpret=INTERPRET)
    assert_right(got, problem, x, w, extras, "bfloat16")


@pytest.mark.parametrize(
    ("out", "chip"),
    [
        (INT8, "v6e"),
        (dataclasses.replace(INT8, tile_k=128), "v5e"),
        (dataclasses.replace(STATIC, tile_k=1), "v5e"),
        (dataclasses.replace(FP8, tile_k=256), "v7x"),
        (RowQuantize("int4", 7.5, static=True), "v6e"),
    ],
    ids=str,
)
def test_requantized_integers_are_exact(out, chip):
    """Sums, scales and bias are small multiples of a power of two, so that nothing rounds before the end."""
    m, k, n = 40, 256, 512
    rng = np.random.default_rng(0)
    x = Tensor(jnp.asarray(rng.integers(-8, 9, (1, m, k)), jnp.int8), jnp.full((1, m, 1), 0.5, jnp.float32))
    w = Tensor(jnp.asarray(rng.integers(-8, 9, (1, k, n)), jnp.int8), jnp.full((1, 1, n), 0.25, jnp.float32))
    shape = (1, 1, n // (out.tile_k or n))
    scale = jnp.asarray(rng.uniform(1, 2, shape), jnp.float32) if out.static else None
    extras = Extras(bias=jnp.asarray(rng.integers(-9, 9, (1, 1, n)), jnp.float32), out_scale=scale)
    problem = problem_of(x, w, extras, activation="relu", quantize_out=out)
    config = tpu.Config(32, n if out == INT8 else 256, k)
    got = tpu.run(problem, x, w, extras, config=config, chip=CHIPS[chip], interpret=INTERPRET)
    want = reference.quantize_rows(reference.run(problem, x, w, extras), out, Extras(lhs_scale=scale))
    on_cpu = matmul(x, w, extras, activation="relu", quantize_out=out)
    for result in (got, on_cpu):
        np.testing.assert_array_equal(np.asarray(result.values).astype(np.float32), want.values)
        np.testing.assert_array_equal(result.scale, want.scale)


@pytest.mark.parametrize("tile", [0, 32])
def test_what_the_kernel_leaves_out_is_done_by_xla(tile):
    """A wide result whose rows are quantized whole, or by tiles narrower than a register."""
    m, k, n = 16, 128, 256
    x, w = floats(1, m, k), weight(k, n)
    extras = all_extras(m, k, n, w)
    out = dataclasses.replace(INT8, tile_k=tile)
    problem = problem_of(x, w, extras, quantize_lhs=INT8, activation="silu", quantize_out=out)
    config = tpu.Config(16, 128, k)
    got = tpu_split.run(problem, Tensor(x), w, extras, config=config, chip=CHIPS["v6e"], interpret=INTERPRET)
    assert_right(got, problem, x, w, extras, "bfloat16")
    explained = dispatch.explain(problem, "v6e", implementation="mosaic_tpu", config=config)
    assert "by XLA" in explained.estimate.note and f"->int8:{tile}" in explained.estimate.note


def test_the_kernel_refuses_what_it_cannot_fuse():
    x, w = floats(1, 8, 128), weight(128, 512)
    problem = problem_of(x, w, quantize_out=INT8)
    with pytest.raises(NotImplementedError, match="whole rows, so block_n must be N=512"):
        tpu.estimate(problem, CHIPS["v6e"], tpu.Config(8, 256, 128))
    problem = problem_of(x, w, Extras(residual=floats(1, 8, 512, dtype="float16")))
    with pytest.raises(NotImplementedError, match="residuals in bfloat16 or float32, not float16"):
        tpu.check(problem, CHIPS["v6e"])


def test_vmem_and_cost_count_the_gate():
    x, w = floats(1, 256, 2048, dtype="bfloat16"), weight(2048, 1024)
    plain = problem_of(x, w, quantize_lhs=INT8, out_dtype="bfloat16")
    gated = problem_of(x, w, Extras(gate=w), quantize_lhs=INT8, activation="silu", out_dtype="bfloat16")
    config, chip = tpu.Config(256, 256, 2048), CHIPS["v6e"]
    one, two = (tpu.estimate(p, chip, config) for p in (plain, gated))
    dots = 2 * 256 * 2048 * 1024 / (chip.int8 * 1e6)  # the rows are prepared once for both
    assert dots < two.compute_us - one.compute_us < 2 * dots
    assert two.memory_us - one.memory_us == pytest.approx((2048 * 1024 + 4 * 1024) / 1640e3)
    assert two.floor_us > one.floor_us


COMPILED = {
    "gate_to_int8": ("int8", 1, INT8, ["bias", "gate", "gate_bias", "residual"], "silu", INT8, 128),
    "gelu_to_fp8": ("int4", 2, None, ["norm_weight", "residual"], "gelu", FP8, 0),
    "static_to_int4": ("int8", 1, STATIC, ["bias"], "gelu_tanh", RowQuantize("int4", 7.5, static=True), 0),
}


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "v7x"])
@pytest.mark.parametrize("case", COMPILED)
def test_compiles_for_every_chip_as_one_kernel(chip, case):
    dtype, tiles, how, only, activation, out, tile = COMPILED[case]
    out, m, k, n = dataclasses.replace(out, tile_k=tile), 64, 256, 256
    x, w = floats(1, m, k, dtype="bfloat16"), weight(k, n, dtype, tiles)
    one = jnp.ones((1, 1, 1))
    scales = {"lhs_scale": one if how and how.static else None, "out_scale": one if out.static else None}
    extras = all_extras(m, k, n, w, only, **scales)
    f = functools.partial(
        matmul, quantize_lhs=how, activation=activation, quantize_out=out, implementation="mosaic_tpu"
    )
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (x, w, extras))
    text = compile_for(chip, f, *shapes).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    # Operands of the size of the weight or the rows go in as they lie in memory.
    assert not re.search(rf"= \w+\[(1,)?({k},{n}|{m},{k}|{m},{n})\]\S* (copy|transpose|convert)\(", text)


# --- the portable path


@pytest.mark.parametrize("how", [None, INT8, MX, dataclasses.replace(STATIC, tile_k=32)], ids=str)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_portable(activation, how):
    m, k, n = 6, 64, 32
    dtype = "float32" if activation in ("relu", "silu") else "int4"
    x, w = floats(1, m, k), weight(k, n, dtype, 2)
    scale = jnp.full((1, 1, 2), 0.03) if how and how.static else None
    extras = all_extras(m, k, n, w, lhs_scale=scale)
    if activation in ("relu", "gelu"):
        extras = dataclasses.replace(extras, gate=None, gate_bias=None)
    problem = problem_of(x, w, extras, quantize_lhs=how, activation=activation)
    got = matmul(x, w, extras, quantize_lhs=how, activation=activation)
    assert_right(got, problem, x, w, extras)


def test_a_quantized_result_is_the_next_lhs():
    x, w, v = floats(1, 8, 64), weight(64, 32), weight(32, 16, tiles=2, seed=9)
    out = dataclasses.replace(INT8, tile_k=16)
    hidden = matmul(x, w, activation="relu", quantize_out=out)
    assert (hidden.values.dtype, hidden.scale.shape) == (jnp.int8, (1, 8, 2))
    whole = matmul(matmul(x, w, activation="relu"), v, quantize_lhs=out)
    np.testing.assert_array_equal(matmul(hidden, v, out_dtype="float32"), whole)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
def test_powers_of_two(dtype):
    """OCP MX 6.3, bit for bit; zeros and what is too small give 1, what is not finite NaN."""
    bound = {"int8": 127.5}.get(dtype) or float(jnp.finfo(dtype).max)
    how = RowQuantize(dtype, bound, 4, scale_dtype="float8_e8m0fnu")
    x = np.random.default_rng(0).standard_normal((1, 6, 8)).astype(np.float32) * 2.0 ** np.arange(-4, 4)
    x[0, 0] = 0
    x[0, 1, :4], x[0, 1, 4:] = 1e-40, 2.0**-60
    x[0, 2, 0], x[0, 2, 4] = np.inf, np.nan
    x[0, 3, :4], x[0, 3, 4:] = [1, -2, 4, 0.5], 2.0**127
    got, want = elementwise.quantize_rows(jnp.asarray(x), how), reference.quantize_rows(x, how)
    np.testing.assert_array_equal(got.scale, want.scale)
    np.testing.assert_array_equal(np.asarray(got.values).astype(np.float32), want.values.astype(np.float32))
    scale = np.asarray(got.scale)[0]
    assert (scale[0] == 1).all() and scale[1, 0] == 1 and np.isnan(scale[2]).all()
    assert scale[3, 0] == 2.0 ** (2 - how.emax)
    mantissa, _ = np.frexp(scale[np.isfinite(scale)])
    assert (mantissa == 0.5).all()


# --- gradients


def exact_gradients(x, w, extras, activation, g, eps_norm=1e-6):
    """(gradients in float64, how far off float32 may be), by name, of plain float operands.

    Forward errors follow reference.py; each sum of n products is off by (n + 8) eps times the sum of their
    magnitudes; derivatives of activations are bounded by 1.13 and change by at most 1.1 per unit.
    """
    f = lambda a: None if a is None else np.asarray(a, np.float64)
    x, wv, g = f(x), f(w.values), f(g)
    k = x.shape[2]
    y, y_err, root = x, 0 * x, None
    if extras.norm_weight is not None:
        root = 1 / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps_norm)
        y = x * root * f(extras.norm_weight)
        y_err = (k / 2 + 24) * EPS * np.abs(y)
    dot = lambda a, b: a @ b

    def product(a, a_err, b):
        return dot(a, b), (a.shape[-1] + 8) * EPS * dot(np.abs(a), np.abs(b)) + dot(a_err, np.abs(b))

    z, z_err = product(y, y_err, wv)
    z = z if extras.bias is None else z + f(extras.bias)
    z_err = z_err + 4 * EPS * np.abs(z)
    act = functools.partial(reference.activate, name=activation)
    slope = lambda v: f(
        jax.vmap(jax.grad(lambda t: elementwise.activate(t, activation)))(jnp.asarray(v.ravel()))
    ).reshape(v.shape)
    out = {}
    if extras.gate is None:
        s = slope(z)
        dz, dz_err = g * s, np.abs(g) * (1.1 * z_err * (activation is not None) + 64 * EPS)
    else:
        gate, gate_err = product(y, y_err, f(extras.gate.values))
        gate = gate if extras.gate_bias is None else gate + f(extras.gate_bias)
        gate_err = gate_err + 4 * EPS * np.abs(gate)
        s = slope(gate)
        dz, dz_err = g * act(gate), np.abs(g) * (1.13 * gate_err + 64 * EPS * (1 + np.abs(gate)))
        dgate = g * z * s
        dgate_err = np.abs(g) * (1.13 * z_err + np.abs(z) * (1.1 * gate_err + 64 * EPS))
        out["gate"] = product(y.swapaxes(1, 2), y_err.swapaxes(1, 2), dgate)
        out["gate"] = out["gate"][0], out["gate"][1] + np.abs(y).swapaxes(1, 2) @ dgate_err
        out["gate_bias"] = (
            dgate.sum(1, keepdims=True),
            (dgate_err + 64 * EPS * np.abs(dgate)).sum(1, keepdims=True),
        )
    out["rhs"] = product(y.swapaxes(1, 2), y_err.swapaxes(1, 2), dz)
    out["rhs"] = out["rhs"][0], out["rhs"][1] + np.abs(y).swapaxes(1, 2) @ dz_err
    out["bias"] = dz.sum(1, keepdims=True), (dz_err + 64 * EPS * np.abs(dz)).sum(1, keepdims=True)
    out["residual"] = g, 0 * g
    dy, dy_err = product(dz, dz_err, wv.swapaxes(1, 2))
    if extras.gate is not None:
        more = product(dgate, dgate_err, f(extras.gate.values).swapaxes(1, 2))
        dy, dy_err = dy + more[0], dy_err + more[1] + 4 * EPS * (np.abs(dy) + np.abs(more[0]))
    if root is None:
        out["lhs"] = dy, dy_err
        return out
    u = f(extras.norm_weight)

    def pull(d):
        return u * root * d - x * root**3 / k * (x * u * d).sum(-1, keepdims=True)

    size = np.abs(u) * root * np.abs(dy) + np.abs(x) * root**3 / k * np.abs(x * u * dy).sum(-1, keepdims=True)
    spread = np.abs(u) * root * dy_err + np.abs(x) * root**3 / k * (np.abs(x * u) * dy_err).sum(
        -1, keepdims=True
    )
    out["lhs"] = pull(dy), spread + 4 * (k + 8) * EPS * size
    out["norm_weight"] = (
        (x * root * dy).sum((0, 1), keepdims=True),
        (np.abs(x) * root * (dy_err + (k + 32) * EPS * np.abs(dy))).sum((0, 1), keepdims=True),
    )
    return out


@pytest.mark.parametrize("activation", [None, "gelu", "silu", "relu"])
@pytest.mark.parametrize(
    "only",
    [["bias"], ["norm_weight", "bias", "residual"], ["norm_weight", "bias", "gate", "gate_bias", "residual"]],
    ids=["bias", "norm", "gate"],
)
def test_gradients(only, activation):
    m, k, n = 5, 32, 16
    x, w = floats(1, m, k), weight(k, n, "float32")
    extras, g = all_extras(m, k, n, w, only), floats(1, m, n, seed=8)

    def loss(x, w, extras):
        return (matmul(x, w, extras, activation=activation) * g).sum()

    dx, dw, dextras = jax.jit(jax.grad(loss, (0, 1, 2)))(x, w, extras)
    got = {"lhs": dx, "rhs": dw.values} | {name: getattr(dextras, name) for name in only}
    want = exact_gradients(x, w, extras, activation, g)
    for name, value in got.items():
        value = value.values if isinstance(value, Tensor) else value
        exact, allowed = want[name]
        error = np.abs(np.asarray(value, np.float64) - exact)
        assert (error <= allowed + 1e-30).all(), (
            f"{name}: {np.max(error / (allowed + 1e-30))} times the bound"
        )


@pytest.mark.parametrize("how", [INT8, STATIC], ids=str)
def test_gradients_pass_through_row_quantization(how):
    """To the normalised rows as if nothing was rounded; scales get none."""
    x, w = floats(1, 4, 64), weight(64, 16)
    scale = jnp.full((1, 1, 1), 0.03) if how.static else None
    extras = all_extras(4, 64, 16, w, ["norm_weight", "residual"], lhs_scale=scale)
    quantized = lambda x, e: matmul(x, w, e, quantize_lhs=how).sum()
    plain = lambda x, e: matmul(x, w, dataclasses.replace(e, lhs_scale=None)).sum()
    got, dextras = jax.grad(quantized, (0, 1))(x, extras)
    want, _ = jax.grad(plain, (0, 1))(x, extras)
    np.testing.assert_array_equal(got, want)
    if how.static:
        np.testing.assert_array_equal(dextras.lhs_scale, jnp.zeros_like(scale))


def test_a_quantized_result_has_no_gradient():
    x, w = floats(1, 4, 64), weight(64, 16)
    with pytest.raises(ValueError, match=r"quantize_out.*has no gradient"):
        jax.grad(lambda x: matmul(x, w, quantize_out=INT8).scale.sum())(x)


# --- transformations


def primitives(fun, *args):
    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn.primitive.name
            for inner in jaxprs_in_params(eqn.params):
                yield from walk(inner)

    return list(walk(jax.make_jaxpr(fun)(*args).jaxpr))


NAMES = ("lhs", "rhs", "lhs_scale", "norm_weight", "bias", "gate", "gate_bias", "residual", "out_scale")


MAPPED = [
    ("lhs",),
    ("rhs",),
    ("gate",),
    ("bias",),
    ("lhs_scale", "norm_weight"),
    ("residual", "out_scale"),
    NAMES,
]


@pytest.mark.parametrize("mapped", MAPPED, ids="-".join)
@pytest.mark.parametrize("batches", [(2, 1), (1, 2)])
def test_vmap_is_one_batched_kernel(mapped, batches):
    m, k, n = 4, 32, 8
    left, right = batches
    x, w = floats(left, m, k), weight(k, n, batch=right)
    one = all_extras(m, k, n, w, lhs_scale=jnp.full((1, 1, 1), 0.03), out_scale=jnp.full((1, m, 2), 0.02))
    out = dataclasses.replace(STATIC, tile_k=4)
    operands = {"lhs": x, "rhs": w} | {f.name: getattr(one, f.name) for f in dataclasses.fields(one)}

    def f(given):
        given = dict(given)
        x, w = given.pop("lhs"), given.pop("rhs")
        how = {"quantize_lhs": STATIC, "activation": "relu", "quantize_out": out}
        return matmul(x, w, Extras(**given), **how).values

    def vary(a):
        if jnp.issubdtype(a.dtype, jnp.integer):
            return jnp.stack([a, jnp.flip(a, 1), -a])
        return jnp.stack([a, a * 1.5, a / 2])

    many = {name: jax.tree.map(vary, x) if name in mapped else x for name, x in operands.items()}
    axes = {
        name: jax.tree.map(lambda _, n=name: 0 if n in mapped else None, x) for name, x in operands.items()
    }
    batched = jax.vmap(f, in_axes=(axes,))
    pick = lambda i: {
        name: jax.tree.map(lambda a: a[i], x) if name in mapped else x for name, x in many.items()
    }
    want = np.stack([f(pick(i)) for i in range(3)])
    got = np.asarray(batched(many))
    # Another batch may be added up in another order, and a value on a rounding boundary become the next one.
    assert (np.abs(got.astype(int) - want) <= 1).all() and (got != want).mean() < 0.01
    used = primitives(batched, many)
    assert used.count("qwix_matmul") == 1 and not {"while", "scan"} & {*used}


def test_dynamic_scales_are_batched_too():
    x, w = floats(3, 4, 32), weight(32, 8)
    f = lambda x: matmul(x[None], w, activation="relu", quantize_out=INT8)
    got = jax.vmap(f)(x)
    for i in range(3):
        want = f(x[i])
        np.testing.assert_array_equal(got.values[i], want.values)
        np.testing.assert_array_equal(got.scale[i], want.scale)


def test_no_recompilation_on_a_second_call():
    m, k, n = 4, 32, 8
    w = weight(k, n)
    f = jax.jit(functools.partial(matmul, quantize_lhs=INT8, activation="silu", quantize_out=INT8))
    for seed in (0, 1):
        f(floats(1, m, k, seed=seed), w, all_extras(m, k, n, w))
    assert f._cache_size() == 1


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_operands(axis_type):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    m, k, n = 4, 32, 8
    x, w = floats(2, m, k), weight(k, n)
    extras = all_extras(m, k, n, w)
    f = functools.partial(matmul, quantize_lhs=INT8, activation="silu", quantize_out=INT8)
    want = f(x, w, extras)
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    columns = lambda t: jax.tree.map(lambda a: put(a, P(None, None, "y")), t)
    split = dataclasses.replace(
        columns(dataclasses.replace(extras, norm_weight=None)), norm_weight=put(extras.norm_weight, P())
    )
    with jax.set_mesh(mesh):
        got = jax.jit(f)(put(x, P("x", None, None)), columns(w), split)
        if axis_type == AxisType.Explicit:
            assert jax.typeof(got.values).sharding.spec == P("x", None, "y")
            assert jax.typeof(got.scale).sharding.spec == P("x", None, None)
    # The parts are compiled otherwise; a value on a rounding boundary may become the next one.
    off = np.abs(np.asarray(got.values, int) - np.asarray(want.values, int))
    assert off.max() <= 1 and off.mean() < 0.05
    np.testing.assert_allclose(got.scale, want.scale, rtol=1e-6)


def test_empty_operands():
    w = weight(0, 8, "float32")
    bias = jnp.arange(-4.0, 4)
    got = matmul(jnp.zeros((1, 3, 0)), w, Extras(bias=bias), activation="relu")
    np.testing.assert_array_equal(got[0], np.tile(np.maximum(bias, 0), (3, 1)))
    assert matmul(jnp.zeros((1, 0, 64)), weight(64, 8), quantize_out=INT8).values.shape == (1, 0, 8)


# --- bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation": "swish"}, ValueError, "Unknown activation 'swish'; known: relu"),
        ({"bias": jnp.zeros(7)}, ValueError, r"bias has shape \(7,\); it must be \(N,\) = \(8,\)"),
        ({"bias": jnp.zeros(8, jnp.int32)}, TypeError, "bias has dtype int32; it must be a float"),
        ({"residual": jnp.zeros((1, 8, 4))}, ValueError, r"residual has shape \(1, 8, 4\)"),
        ({"gate": weight(32, 4)}, ValueError, "The gate must be quantized and shaped like rhs"),
        ({"gate_bias": jnp.zeros(8)}, ValueError, "gate_bias is given without a gate"),
        ({"norm_weight": jnp.zeros(8)}, ValueError, r"norm_weight has shape \(8,\); it must be \(K,\)"),
        ({"lhs_scale": jnp.ones((1, 1, 1))}, ValueError, "lhs_scale is given, but quantize_lhs is None"),
        ({"quantize_lhs": STATIC}, ValueError, "lhs_scale is not given"),
        ({"quantize_lhs": STATIC, "lhs_scale": jnp.ones((1, 1, 2))}, ValueError, r"has shape \(1, 1, 2\)"),
        ({"quantize_out": dataclasses.replace(INT8, tile_k=3)}, ValueError, "does not divide N=8"),
        ({"quantize_out": INT8, "out_dtype": "bfloat16"}, ValueError, "quantize_out stores int8"),
        ({"quantize_lhs": dataclasses.replace(INT8, scale_dtype="bfloat16")}, ValueError, "scale_dtype is"),
        ({"norm_eps": -1.0, "norm_weight": jnp.zeros(32)}, ValueError, "norm_eps is -1.0"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    names = {f.name for f in dataclasses.fields(Extras)}
    extras = Extras(**{k: v for k, v in change.items() if k in names})
    options = {k: v for k, v in change.items() if k not in names}
    with pytest.raises(error, match=message):
        matmul(jnp.zeros((1, 4, 32)), weight(32, 8), extras, **options)
