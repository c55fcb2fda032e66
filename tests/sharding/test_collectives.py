"""Quantized collectives on eight devices: within the derived bound of float64, and narrow on the wire."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import qwix
from bench import scale_hlo
from qwix import collectives

EPS = float(np.finfo(np.float32).eps)
DEVICES = 8
ALL = ("data", "model")
SAME = P()
# Half a step in units of the scale, and the bound that the greatest magnitude is mapped to.
INTEGERS = {"int8": 127.5, "int4": 7.5}
FLOATS = {"float8_e4m3fn": (448.0, 2.0**-4, 2.0**-10), "float8_e5m2": (57344.0, 2.0**-3, 2.0**-17)}


@pytest.fixture(scope="module")
def mesh(devices):
    return jax.make_mesh((4, 2), ALL, axis_types=(AxisType.Auto,) * 2, devices=devices)


@pytest.fixture(scope="module")
def tree():
    """Of every device, in front. Odd sizes, very different magnitudes, zeros."""
    key = jax.random.key(0)
    return {
        "w": jax.random.normal(key, (DEVICES, 33, 17)),
        "b": 1e-3 * jax.random.normal(key, (DEVICES, 5), jnp.bfloat16),
        "zero": jnp.zeros((DEVICES, 40)),
        "scalar": jnp.arange(1.0, 1 + DEVICES),
    }


def on_all(mesh, fn, *, out=SAME, check_vma=True):
    """`fn` of one device's trees, each given with an axis of devices in front."""
    local = lambda *trees: fn(*(jax.tree.map(lambda x: x[0], t) for t in trees))
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(ALL), out_specs=out, check_vma=check_vma))


def blocks(x, size):
    """[n, ...] as float64 [n, blocks, size]."""
    flat = np.asarray(x, np.float64).reshape(len(x), -1)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % size)))
    return flat.reshape(len(x), -1, size)


def bound(x, qtype, stochastic=False):
    """Largest error of quantizing blocks, elementwise; with float32's in scale, quotient and product."""
    greatest = abs(x).max(-1, keepdims=True)
    if qtype in INTEGERS:
        off = np.broadcast_to(greatest / INTEGERS[qtype] / 2, x.shape)
    else:
        largest, relative, least = FLOATS[qtype]
        off = np.maximum(abs(x) * relative, greatest / largest * least)
    return off * (2 if stochastic else 1) + 4 * EPS * greatest


def reduced_bound(x, qtype, size, *, mean=False, stochastic=False, requantized=True):
    """Of one array, [devices, ...]: the devices' errors, float32's in the sum, and the sum's own."""
    each = blocks(x, size)
    off = bound(each, qtype, stochastic).sum(0) + DEVICES * EPS * abs(each).sum(0)
    total = each.sum(0)
    if mean:
        off, total = off / DEVICES, total / DEVICES
    if requantized:
        off = off + bound(abs(total) + off, qtype, stochastic)
    return total, off


def check_reduced(got, x, qtype, size, **how):
    total, off = reduced_bound(x, qtype, size, **how)
    error = abs(blocks(np.asarray(got, np.float64)[None], size)[0] - total)
    assert (error <= off + abs(total) * 2.0**-8 * (got.dtype == jnp.bfloat16)).all()


CASES = [
    ("int8", 32),
    ("float8_e4m3fn", 31),
    *(pytest.param(*c, marks=pytest.mark.large) for c in (("int4", 32), ("float8_e5m2", 31), ("int8", 256))),
]


@pytest.mark.parametrize("qtype, size", CASES)
def test_all_reduce_is_within_its_bound_and_the_same_everywhere(qtype, size, mesh, tree):
    reduce = lambda t: collectives.all_reduce(t, ALL, qtype=qtype, block_size=size)
    everywhere = on_all(
        mesh, lambda t: jax.tree.map(lambda x: x[None], reduce(t)), out=P(ALL), check_vma=False
    )
    got = everywhere(tree)
    for name, x in tree.items():
        assert got[name].dtype == x.dtype and (got[name] == got[name][:1]).all()
        check_reduced(got[name][0], x, qtype, size)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), got, everywhere(tree)))
    assert not got["zero"].any()


@pytest.mark.large
def test_over_one_axis_of_several_the_others_keep_their_own(mesh, tree):
    fn = lambda w: collectives.all_reduce(w[0], "data", mean=True, block_size=64)[None]
    specs = {"in_specs": P(ALL), "out_specs": P("model")}
    got = jax.jit(jax.shard_map(fn, mesh=mesh, **specs))(tree["w"])
    exact = np.asarray(tree["w"], np.float64).reshape(4, 2, 33, 17).mean(0)
    step = abs(tree["w"]).max() / 127.5
    assert (abs(np.asarray(got) - exact) <= step + 1e-5).all() and got.shape == exact.shape


@pytest.mark.parametrize("dimension", [pytest.param(0, marks=pytest.mark.large), 1])
def test_reduce_scatter_gives_each_device_its_part(dimension, mesh):
    x = jax.random.normal(jax.random.key(1), (DEVICES, 16, 24))
    scatter = functools.partial(collectives.reduce_scatter, scatter_dimension=dimension, block_size=24)
    spec = P(*[None] * dimension, ALL)
    got = on_all(mesh, lambda x: scatter(x, ALL, mean=True), out=spec)(x)
    parts = np.moveaxis(np.asarray(x, np.float64), 1 + dimension, 1)
    rows = parts.reshape(DEVICES, DEVICES, -1, *parts.shape[2:])  # device, owner, ...
    for owner in range(DEVICES):
        mine = np.moveaxis(np.asarray(got), dimension, 0).reshape(rows.shape[1:])[owner]
        check_reduced(jnp.asarray(mine), rows[:, owner], "int8", 24, mean=True, requantized=False)
    how = qwix.HowToQuantize(qtype="int8", channelwise_axes=(0,))
    again = on_all(
        mesh, lambda x: scatter(x, ALL, mean=True, out=how), out=spec if not dimension else P(None, ALL)
    )
    stored = again(x)
    assert stored.qvalue.shape == got.shape and stored.qvalue.dtype == jnp.int8
    assert (abs(stored.dequantize() - got) <= abs(got).max() * (1 / 255 + 4 * EPS)).all()


STORED = {
    "int8": {"qtype": "int8", "channelwise_axes": (1,)},
    "int4, odd": {"qtype": "int4", "channelwise_axes": (0,)},
    "nf4, tiles": {"qtype": "nf4", "channelwise_axes": (1,), "tiled_axes": {0: 4}},
    "fp8": {"qtype": "float8_e4m3fn", "channelwise_axes": (0, 1)},
    "zero points": {"qtype": "int8", "channelwise_axes": (1,), "calibration_method": "minmax"},
}


@pytest.mark.parametrize("axis", [pytest.param(0, marks=pytest.mark.large), -1])
@pytest.mark.parametrize(
    "name", [n if n == "int4, odd" else pytest.param(n, marks=pytest.mark.large) for n in STORED]
)
def test_qarrays_are_gathered_bit_for_bit(name, axis, mesh):
    x = jax.random.normal(jax.random.key(2), (DEVICES, 8, 5))
    local = lambda x: qwix.quantize(x, **STORED[name])
    gather = lambda x: collectives.all_gather(local(x), ALL, axis=axis, to="invarying")
    compiled = on_all(mesh, gather).lower(x).compile()
    got = compiled(x)
    each = [local(shard) for shard in x]
    join = lambda *parts: jnp.concatenate(parts, axis)
    want = jax.tree.map(join, *each)
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), got, want)
    assert jax.tree.all(same) and got.qtype == want.qtype
    for c in scale_hlo.collectives(compiled.as_text()):
        assert c.op == "all-gather" and c.dtypes[0] in ("u8", "s8", "f32")


@pytest.mark.parametrize("qtype", ["int8", pytest.param("float8_e4m3fn", marks=pytest.mark.large)])
def test_floats_are_gathered_as_each_device_rounded_them(qtype, mesh):
    x = {
        "w": jax.random.normal(jax.random.key(3), (DEVICES, 4, 7)),
        "b": jnp.ones((DEVICES, 3), jnp.bfloat16),
    }
    gather = functools.partial(collectives.all_gather, qtype=qtype, block_size=16)
    got = on_all(mesh, lambda t: gather(t, ALL, to="invarying"))(x)
    assert got["w"].shape == (32, 7) and got["b"].shape == (24,) and got["b"].dtype == jnp.bfloat16
    each = blocks(x["w"], 16)
    error = abs(blocks(np.asarray(got["w"]).reshape(DEVICES, 4, 7), 16) - each)
    assert (error <= bound(each, qtype)).all() and error.max() > 0


@pytest.mark.parametrize(
    "qtype, bits",
    [("int8", 8), *(pytest.param(*c, marks=pytest.mark.large) for c in (("int4", 4), ("float8_e4m3fn", 8)))],
)
def test_no_float_but_scales_on_the_wire(qtype, bits, mesh):
    """Whole blocks for each device, so nothing is filled up: bits / 32 + 1 / block of float32's bytes."""
    x = jnp.ones((DEVICES, 64, 128))
    size = 128

    def sent(fn, out=SAME):
        return scale_hlo.collectives(on_all(mesh, fn, out=out).lower(x).compile().as_text())

    def check(quantized, exact):
        allowed = (bits / 32 + 1 / size) * scale_hlo.wire_bytes(exact)
        assert 0 < scale_hlo.wire_bytes(quantized) <= allowed
        for c in quantized:
            assert set(c.dtypes) <= {"s8", "u8"} or c.result_bytes * size <= 8 * 64 * 128 * 4

    how = {"qtype": qtype, "block_size": size}
    check(sent(lambda x: collectives.all_reduce(x, ALL, **how)), sent(lambda x: jax.lax.psum(x, ALL)))
    scatter = lambda x: jax.lax.psum_scatter(x, ALL, tiled=True)
    check(sent(lambda x: collectives.reduce_scatter(x, ALL, **how), P(ALL)), sent(scatter, P(ALL)))
    gather = lambda x: jax.lax.all_gather(x, ALL, tiled=True)
    check(sent(lambda x: collectives.all_gather(x, ALL, **how), P(ALL)), sent(gather, P(ALL)))


def test_a_tree_travels_in_two_collectives_each_way(mesh, tree):
    text = on_all(mesh, lambda t: collectives.all_reduce(t, ALL)).lower(tree).compile().as_text()
    assert scale_hlo.counted(scale_hlo.collectives(text)) == {"all-gather": 2, "all-to-all": 2}


@pytest.mark.large
def test_stochastic_rounding_is_unbiased_repeats_and_differs_between_devices(mesh):
    x = jnp.broadcast_to(jnp.linspace(-1, 1, 64), (DEVICES, 64))
    reduce = lambda x, key: collectives.all_reduce(x, ALL, qtype="int4", block_size=64, mean=True, key=key)

    def many(x, keys):
        return jax.lax.map(lambda k: reduce(x, k), keys[0] if keys.ndim > 1 else keys)

    run = jax.jit(jax.shard_map(lambda x, k: many(x[0], k), mesh=mesh, in_specs=(P(ALL), P()), out_specs=P()))
    keys = jax.random.split(jax.random.key(4), 400)
    got = np.asarray(run(x, keys), np.float64)
    np.testing.assert_array_equal(got, run(x, keys))
    total, off = reduced_bound(x, "int4", 64, mean=True, stochastic=True)
    assert (abs(got - total.reshape(-1)) <= off.reshape(-1)).all()
    # Each call is off by less than 2 * off; 6 standard deviations of a mean of 400. The ends clip.
    inner = slice(8, 56)
    assert (abs(got.mean(0) - np.asarray(x[0]))[inner] <= 6 * off.reshape(-1)[inner] / np.sqrt(400)).all()
    # If all devices rounded alike, the mean of eight would lie on the grid of one.
    first = jax.jit(
        jax.shard_map(
            lambda x, k: collectives.reduce_scatter(x[0], ALL, qtype="int4", block_size=8, mean=True, key=k),
            mesh=mesh,
            in_specs=(P(ALL), P()),
            out_specs=P(ALL),
        )
    )(x[:, :64], keys[0])
    steps = np.asarray(first, np.float64).reshape(8, 8) / (
        abs(np.asarray(x[0])).reshape(8, 8).max(1, keepdims=True) / 7.5
    )
    assert (abs(steps - steps.round()) > 0.05).any()


@pytest.mark.parametrize("op", ["all_reduce", pytest.param("reduce_scatter", marks=pytest.mark.large)])
def test_with_feedback_only_what_is_held_is_lost(op, mesh):
    """The sum of all results is that of all inputs, but for the last feedback: to float32's rounding."""
    steps, shape = 6, (16, 9)
    x = jax.random.normal(jax.random.key(5), (DEVICES, steps, *shape))
    fn, scattered = getattr(collectives, op), op == "reduce_scatter"

    def run(x):
        start = collectives.init_error_feedback(x[0], ALL, block_size=16, scattered=scattered)

        def step(left, x):
            got, left = fn(x, ALL, qtype="int4", block_size=16, feedback=left)
            return left, got

        return jax.lax.scan(step, start, x)

    out = (P(ALL), P(None, ALL) if scattered else P())
    left, got = on_all(mesh, run, out=out)(x)
    inputs = np.asarray(x, np.float64).sum((0, 1))
    results = np.asarray(got, np.float64).sum(0)
    held = np.asarray(left.sent, np.float64).sum(0)
    if not scattered:
        held = held + np.asarray(left.reduced, np.float64).reshape(-1)[: inputs.size].reshape(shape)
    rounding = 8 * EPS * steps * abs(np.asarray(x)).sum((0, 1))
    assert (abs(inputs - results - held) <= rounding).all()
    plain = on_all(
        mesh, lambda x: jax.lax.map(lambda x: fn(x, ALL, qtype="int4", block_size=16), x), out=out[1]
    )(x)
    assert abs(np.asarray(plain).sum(0) - inputs).max() > abs(held).max() / 4  # it isn't that small by itself


@pytest.mark.large
def test_one_bad_step_leaves_nothing_behind(mesh):
    x = jnp.ones((DEVICES, 64)).at[3, 5].set(jnp.nan).at[4, 40].set(jnp.inf)

    def run(x):
        start = collectives.init_error_feedback(x, ALL, block_size=32)
        return collectives.all_reduce(x, ALL, block_size=32, feedback=start)

    got, left = on_all(mesh, run, out=(P(), P(ALL)))(x)
    assert jnp.isnan(got).all()
    assert jnp.isfinite(left.sent).all() and jnp.isfinite(left.reduced).all()


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.large)])
def test_gradients_are_those_of_the_exact_collectives(check_vma, mesh):
    x = jax.random.normal(jax.random.key(6), (DEVICES, 16, 8))
    weigh = jnp.cos(jnp.arange(8.0))
    lax = jax.lax
    pairs = {
        "all_reduce": (lambda x: collectives.all_reduce(x, ALL), lambda x: lax.psum(x, ALL)),
        "reduce_scatter": (
            lambda x: collectives.reduce_scatter(x, ALL),
            lambda x: lax.psum_scatter(x, ALL, tiled=True),
        ),
        "all_gather": (
            lambda x: collectives.all_gather(x, ALL, qtype="int8"),
            lambda x: lax.all_gather(x, ALL, tiled=True),
        ),
    }

    def gradients(which):
        def run(x):
            return {
                name: jax.grad(lambda x, fn=pair[which]: (fn(x) * weigh).sum())(x)[None]
                for name, pair in pairs.items()
            }

        return on_all(mesh, run, out=P(ALL), check_vma=check_vma)(x)

    ours, exact = gradients(0), gradients(1)
    for name in pairs:
        np.testing.assert_array_equal(ours[name], exact[name])


@pytest.mark.large
def test_gradients_of_gathered_weights_come_back_quantized(mesh):
    """ZeRO++: int8 weights out, int8 gradients back."""
    w, g = jnp.ones((DEVICES, 4, 32)), jax.random.normal(jax.random.key(7), (DEVICES, 32, 32))

    def run(w, g):
        gather = lambda w: collectives.all_gather(w, ALL, qtype="int8", block_size=32, grad_qtype="int8")
        return jax.grad(lambda w: (gather(w) * g).sum())(w)

    compiled = on_all(mesh, run, out=P(ALL)).lower(w, g).compile()
    got = compiled(w, g)
    for owner in range(DEVICES):
        rows = slice(4 * owner, 4 * owner + 4)
        check_reduced(got[rows], g[:, rows], "int8", 32, requantized=False)
    wide = [c for c in scale_hlo.collectives(compiled.as_text()) if set(c.dtypes) - {"s8", "u8"}]
    assert all(c.result_bytes <= 8 * 4 * 32 * 4 / 32 for c in wide)  # scales


def test_training_with_int4_gradients_converges_with_feedback(mesh):
    """Least squares whose gradients have one large part that hides the others in a block of 4 bits."""
    key = jax.random.key(8)
    features = jax.random.normal(key, (DEVICES * 16, 32)) * jnp.where(jnp.arange(32) == 0, 4.0, 0.3)
    target = features @ jnp.linspace(-1, 1, 32)
    step_size, steps = 0.05, 400

    def loss(w, x, y):
        return jnp.mean(jnp.square(x @ w - y))

    def train(x, y, how):
        zeros = jnp.zeros(32)
        start = collectives.init_error_feedback(zeros, ALL, block_size=32)

        def step(carry, _):
            w, left = carry
            g = jax.grad(loss)(jax.lax.pcast(w, ALL, to="varying"), x, y)
            if how == "float":
                g = jax.lax.pmean(g, ALL)
            elif how == "feedback":
                g, left = collectives.all_reduce(
                    g, ALL, qtype="int4", block_size=32, mean=True, feedback=left
                )
            else:
                g = collectives.all_reduce(g, ALL, qtype="int4", block_size=32, mean=True)
            return (w - step_size * g, left), None

        return jax.lax.scan(step, (zeros, start), length=steps)[0][0]

    last = {}
    for how in ("float", "feedback", "none"):
        run = jax.jit(
            jax.shard_map(functools.partial(train, how=how), mesh=mesh, in_specs=P(ALL), out_specs=P())
        )
        last[how] = float(loss(run(features, target), features, target))
    assert last["feedback"] <= 1.1 * last["float"], last
    assert last["none"] > 1.5 * last["float"], last


def test_one_device_sends_nothing_and_loses_nothing(devices):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:1])
    x = jax.random.normal(jax.random.key(9), (3, 5))
    fn = lambda x: (
        collectives.all_reduce(x, "data"),
        collectives.reduce_scatter(x, "data"),
        collectives.all_gather(x, "data", qtype="int4"),
    )
    for got in jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=P(), out_specs=P("data")))(x):
        np.testing.assert_array_equal(got, x)


def test_what_cannot_be_done_is_said(mesh):
    x = jnp.ones((DEVICES, 12, 6))
    reduce = collectives.all_reduce

    def fails(error, text, fn, x=x):
        with pytest.raises(error, match=text):
            on_all(mesh, fn)(x)

    with pytest.raises(ValueError, match=r"outside of jax\.shard_map, where no mesh axis 'data'"):
        reduce(x, "data")
    fails(
        ValueError,
        "no mesh axis 'dta' here; this jax.shard_map is over 'data', 'model'",
        lambda x: reduce(x, "dta"),
    )
    fails(ValueError, "several different ones", lambda x: reduce(x, ("data", "data")))
    fails(TypeError, r"got int32\[12, 6\] at \['n'\]", lambda x: reduce({"n": x}, ALL), x.astype(int))
    fails(ValueError, "Did you mean 'int8'", lambda x: reduce(x, ALL, qtype="int9"))
    fails(ValueError, "give qtype 'float8_e4m3fn' and block_size 32", lambda x: reduce(x, ALL, qtype="mxfp8"))
    fails(ValueError, "block_size is 0", lambda x: reduce(x, ALL, block_size=0))
    fails(
        ValueError,
        r"don't divide axis 0 of \(12, 6\). Pad it to 16",
        lambda x: collectives.reduce_scatter(x, ALL),
    )
    fails(ValueError, "needs the qtype", lambda x: collectives.all_gather(x, ALL))
    fails(ValueError, "out of range", lambda x: collectives.all_gather(x, ALL, qtype="int8", axis=2))
    mixed = lambda x: collectives.all_gather([x, qwix.quantize(x, "int8")], ALL, qtype="int8")
    fails(ValueError, "1 of 2 leaves are QArrays", mixed)
    other = lambda x: reduce(x, ALL, feedback=collectives.init_error_feedback(x[:2], ALL))
    fails(ValueError, r"holds \[\(1, 2, 6\)\]; .* must hold \[\(1, 12, 6\)\]", other)
    blocks = lambda x: reduce(x, ALL, feedback=collectives.init_error_feedback(x, ALL, block_size=8))
    fails(ValueError, "needs the same block_size", blocks)
