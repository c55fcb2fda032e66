"""Pallas calls on QArrays: derived block specs, TPU layouts, whole kernels in the simulator and real
compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

import qwix.pallas as qpl
from qwix._src.core import pallas_specs, pallas_tpu_layout

EPS = float(jnp.finfo(jnp.float32).eps)
SIMULATOR = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True, out_of_bounds_reads="raise")
TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
RNG = np.random.default_rng(0)
F32 = jnp.float32


def normal(*shape, dtype=F32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def sds(shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


def shaped(shape, scale_shape, zero_point=False):
    """A QArray of shapes only."""
    zero = sds(scale_shape, jnp.int8) if zero_point else None
    return qpl.QArray(sds(shape, jnp.int8), sds(scale_shape), zero)


def derived(block, shape, scale_shape, grid=None, index_map=lambda *i: i):
    spec = pl.BlockSpec(block, index_map)
    return pallas_specs.update_block_specs_for_qarray(spec, shaped(shape, scale_shape, True), grid)


class TestSpecs:
    @pytest.mark.parametrize(
        ("block", "shape", "scale_shape", "expected", "index"),
        [
            ((256, 256), (1024, 1024), (32, 8), (8, 2), (3, 2)),
            ((None, 256), (1024, 1024), (1024, 8), (None, 2), (3, 2)),
            ((None, 256), (1024, 1024), (32, 8), (None, 2), (0, 2)),
            ((pl.Squeezed(), 256), (1024, 1024), (512, 1024), (pl.Squeezed(), 256), (1, 2)),
            ((256, 256), (1024, 1024), (1, 1024), (1, 256), (0, 2)),
            ((64, 256), (1024, 1024), (8, 1), (1, 1), (1, 0)),  # two blocks to a tile
            ((pl.Blocked(256), 1024), (1024, 1024), (8, 1024), (pl.Blocked(2), 1024), (3, 2)),
            ((256,), (1024,), (8,), (2,), (3,)),
            ((768, 256), (1024, 1024), (8, 1), (6, 1), (3, 0)),  # hangs over the end
        ],
    )
    def test_blocks(self, block, shape, scale_shape, expected, index):
        spec = derived(block, shape, scale_shape)
        assert spec.scale.block_shape == spec.zero_point.block_shape == expected
        assert spec.scale.index_map(3, 2)[: len(shape)] == index if len(shape) > 1 else True
        assert spec.qvalue.block_shape == block

    def test_index_of_rank_one(self):
        spec = derived((32,), (1024,), (8,), index_map=lambda i: i)
        assert spec.scale.block_shape == (1,)
        assert [spec.scale.index_map(i) for i in (0, 3, 4, 31)] == [(0,), (0,), (1,), (7,)]

    def test_elements(self):
        block = (pl.Element(256), pl.Element(64, (0, 32)))
        spec = derived(block, (1024, 1024), (8, 1024), (2, 3), lambda i, j: (i * 128, j * 5))
        assert spec.scale.block_shape == (pl.Element(2), pl.Element(64, (0, 32)))
        assert spec.scale.index_map(1, 2) == (1, 10)

    def test_elements_that_start_within_a_tile(self):
        block = (pl.Element(256), pl.Element(1024))
        with pytest.raises(ValueError, match="along axis 0 must start at multiples of the tile, 128"):
            derived(block, (1024, 1024), (8, 1), (4, 1), lambda i, j: (i * 64, 0))
        with pytest.raises(ValueError, match="needs a static grid"):
            derived(block, (1024, 1024), (8, 1), None, lambda i, j: (i * 128, 0))

    @pytest.mark.parametrize(
        ("block", "message"),
        [
            (
                (96, 1024),
                r"block of 96 along axis 0 cuts tiles of 64 .*multiples of 64 \(64, 128, 192, 256, \.\.\.\)",
            ),
            ((48, 1024), r"its divisors \(1, 2, 4, 8, 16, 32\)"),
            ((pl.Element(32), pl.Element(1024)), "multiples of 64"),
            ((pl.BoundedSlice(64), 1024), "only Blocked .* follow a tiled axis"),
            ((64,), "as many dimensions as the QArray's values"),
        ],
    )
    def test_blocks_that_do_not_work(self, block, message):
        with pytest.raises(ValueError, match=message):
            derived(block, (1024, 1024), (16, 1), (16, 1), lambda i, j: (i * 64, j))

    def test_whole_arrays(self):
        """`pl.ANY` and a missing spec stand for the whole of each part."""
        arg = shaped((1024, 256), (8, 256), zero_point=True)
        for spec in (pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(), pl.no_block_spec):
            parts = pallas_specs.update_block_specs_for_qarray(spec, arg)
            assert jax.tree.leaves(parts) == [spec, spec, spec]

    def test_memory_space_and_pipelining_go_with_every_part(self):
        spec = pl.BlockSpec(
            (256, 256), lambda i: (i, 0), memory_space=pltpu.SMEM, pipeline_mode=pl.Buffered(3)
        )
        scale = pallas_specs.update_block_specs_for_qarray(spec, shaped((1024, 256), (8, 1))).scale
        assert (scale.memory_space, scale.pipeline_mode) == (pltpu.SMEM, pl.Buffered(3))

    def test_plain_arguments_keep_their_specs(self):
        spec = pl.BlockSpec((8, 8), lambda i: (i, 0))
        specs = pallas_specs.update_block_specs_for_qarray(
            {"a": spec, "b": [spec, pl.no_block_spec]}, {"a": sds((8, 8)), "b": [sds((8, 8)), sds((3,))]}
        )
        assert specs["a"] is spec and specs["b"] == [spec, pl.no_block_spec]


class TestTpuLayout:
    @pytest.mark.parametrize(
        ("shape", "block", "new_block", "index"),
        [
            ((4, 128, 16), (None, 128, 8), (None, 8, 128), ((1, 2, 3), (1, 3, 2))),
            ((256, 1), (128, 1), (1, 128), ((1, 0), (0, 1))),
            ((32, 32), (8, 8), (1, 1, 1, 64), ((1, 2), (1, 2, 0, 0))),
            ((1536,), (384,), (1, 1, 384), ((2,), (2, 0, 0))),
            ((256, 8), (128, 4), (None, 4, 128), ((1, 1), (1, 0, 1))),
            ((512, 12), (256, None), (None, None, 256), ((1, 5), (5, 0, 1))),
        ],
    )
    def test_rewritten(self, shape, block, new_block, index):
        """The new block is legal, and restores to what the old one cut out."""
        arg = jnp.arange(np.prod(shape), dtype=F32).reshape(shape)
        spec, new_arg, restore = pallas_tpu_layout.transform_block_specs_for_tpu(
            pl.BlockSpec(block, lambda *i: i), arg
        )
        assert spec.block_shape == new_block
        assert spec.index_map(*index[0]) == index[1]
        sizes = [size or 1 for size in new_block]
        assert pallas_tpu_layout._can_fit_tpu_requirements(sizes, new_arg.shape)
        np.testing.assert_array_equal(restore(cut(new_arg, new_block, index[1])), cut(arg, block, index[0]))

    @pytest.mark.parametrize(
        ("shape", "block"),
        [
            ((1024, 1024), (256, 256)),
            ((8, 1024), (8, 128)),
            ((4, 1024), (4, 128)),
            ((32,), (32,)),
            ((4096,), (1024,)),
            ((4, 16, 32), (None, 16, 32)),
        ],
    )
    def test_left_alone(self, shape, block):
        spec, arg = pl.BlockSpec(block, lambda *i: i), jnp.zeros(shape)
        new_spec, new_arg, restore = pallas_tpu_layout.transform_block_specs_for_tpu(spec, arg)
        assert new_spec is spec and new_arg is arg and restore("ref") == "ref"

    def test_only_blocks_in_vector_memory(self):
        arg = jnp.zeros((32, 32))
        for spec in (
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec((8, 8), lambda i, j: (i, j), memory_space=pltpu.SMEM),
            pl.BlockSpec((pl.Element(8), pl.Element(8)), lambda i, j: (i, j)),
        ):
            assert pallas_tpu_layout.rewrite(spec, arg)[2] is None

    def test_a_padded_but_legal_block_of_values_stays(self):
        spec, arg = pl.BlockSpec((128, 1), lambda i: (i, 0)), jnp.zeros((256, 1))
        assert pallas_tpu_layout.rewrite(spec, arg, only_illegal=True)[0] is spec

    def test_last_block_that_hangs_over_the_end(self):
        arg = jnp.arange(20.0).reshape(5, 4)
        spec, rows, restore = pallas_tpu_layout.transform_block_specs_for_tpu(
            pl.BlockSpec((2, 2), lambda *i: i), arg
        )
        block = restore(cut(rows, spec.block_shape, (2, 1, 0, 0)))
        np.testing.assert_array_equal(block, [[18, 19], [0, 0]])


def cut(array, block, index):
    """The block of an array, as Pallas defines it."""
    where = tuple(
        i if size is None else slice(i * size, (i + 1) * size) for i, size in zip(index, block, strict=True)
    )
    return np.asarray(array[where])


def float64(x):
    return np.asarray(qpl.dequantize(x) if isinstance(x, qpl.QArray) else x, np.float64)


def matmul(x, w, blocks, **kwargs):
    """[M, K] x [K, N] in blocks (bm, bk, bn), accumulated in scratch memory."""
    bm, bk, bn = blocks
    (m, k), n = x.shape, w.shape[1]

    def kernel(x_ref, w_ref, out_ref, acc_ref):
        @pl.when(pl.program_id(2) == 0)
        def _():
            acc_ref[...] = jnp.zeros_like(acc_ref)

        acc_ref[...] += qpl.dot(x_ref[...], w_ref[...], preferred_element_type=F32)

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            out_ref[...] = acc_ref[...]

    return qpl.pallas_call(
        kernel,
        sds((m, n)),
        grid=(m // bm, n // bn, k // bk),
        in_specs=[
            pl.BlockSpec((bm, bk), lambda i, j, k: (i, k)),
            pl.BlockSpec((bk, bn), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((bm, bn), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((bm, bn), F32)],
        **kwargs,
    )(x, w)


def assert_is_product(out, x, w):
    a, b = float64(x), float64(w)
    bound = (a.shape[1] + 4) * EPS * (np.abs(a) @ np.abs(b))
    np.testing.assert_array_less(np.abs(np.asarray(out, np.float64) - a @ b), bound)


X, W = normal(16, 256), normal(256, 256)
MATMULS = {
    "int8 x int8": (
        qpl.quantize(X, "int8", channelwise_axes=[0]),
        qpl.quantize(W, "int8", channelwise_axes=[1]),
    ),
    "int8 with zero points, tiled on both sides": (
        qpl.quantize(X, "int8", channelwise_axes=[0], tiled_axes={1: 32}, calibration_method="minmax"),
        qpl.quantize(W, "int8", channelwise_axes=[1], tiled_axes={0: 64}, calibration_method="minmax"),
    ),
    "bfloat16 x int4 in tiles of both axes": (
        X.astype(jnp.bfloat16),
        qpl.quantize(W, "int4", tiled_axes={0: 128, 1: 128}),
    ),
    "bfloat16 x nf4": (
        X.astype(jnp.bfloat16),
        qpl.quantize(W, "nf4", channelwise_axes=[1], tiled_axes={0: 64}),
    ),
}


@pytest.mark.parametrize("name", MATMULS)
def test_matmul_in_the_simulator(name):
    x, w = MATMULS[name]
    assert_is_product(matmul(x, w, (8, 128, 128), interpret=SIMULATOR), x, w)


def compile_matmul(chip, args):
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    mesh = jax.sharding.Mesh(np.array([device]), ("x",))
    sharding = jax.sharding.SingleDeviceSharding(device)
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(lambda x, w: matmul(x, w, (128, 256, 128))).lower(*args).compile().as_text()


@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_matmul_compiles_for_the_chip(chip):
    """Sub-channel scales and zero points on both sides: every rewrite of a layout but one is in it."""
    x = shaped((256, 512), (256, 8), zero_point=True)
    w = shaped((512, 256), (4, 256), zero_point=True)
    assert "tpu_custom_call" in compile_matmul(chip, (x, w))


@pytest.mark.large
@pytest.mark.parametrize("qtype", ["int4", "int2", "uint8", "int16", "nf4", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_formats_compile_for_the_chip(chip, qtype):
    quantize = lambda w: qpl.quantize(w, qtype, channelwise_axes=[1], tiled_axes={0: 64})
    w = jax.eval_shape(quantize, sds((512, 256)))
    assert "tpu_custom_call" in compile_matmul(chip, (sds((256, 512), jnp.bfloat16), w))


def copy_kernel(q_ref, out_ref):
    out_ref[...] = qpl.dequantize(q_ref[...])


def test_without_specs_arrays_arrive_whole():
    w = qpl.quantize(W, "int8", tiled_axes={0: 32}, calibration_method="minmax")

    def kernel(x_ref, w_ref, out_ref):
        out_ref[...] = qpl.einsum("mk,kn->mn", x_ref[...], w_ref[...])

    out = qpl.pallas_call(kernel, sds((16, 256)), interpret=SIMULATOR)(X, w)
    assert_is_product(out, X, w)


@pytest.mark.parametrize(
    ("block", "shape", "grid"),
    [
        ((256,), (1024,), 4),
        ((None, 128), (16, 128), 16),
        ((pl.Squeezed(), 128), (16, 128), 16),
        ((8, 8), (32, 8), 4),
        ((2, 8), (32, 8), 16),  # within a tile
        ((24, 128), (64, 128), 3),  # hangs over the end
    ],
)
def test_kinds_of_blocks(block, shape, grid):
    """Each block of values comes with the scales and zero points that belong to it."""
    q = qpl.quantize(normal(*shape), "int8", tiled_axes={0: 8}, calibration_method="minmax")
    spec = pl.BlockSpec(block, lambda i: (i, 0)[: len(shape)])
    call = qpl.pallas_call(
        copy_kernel, sds(shape), grid=(grid,), in_specs=[spec], out_specs=spec, interpret=True
    )
    np.testing.assert_array_equal(call(q), qpl.dequantize(q))


def test_blocks_that_overlap():
    """`pl.Element` counts starts in elements: here each block shares half of its rows with the next."""
    q = qpl.quantize(normal(64, 128), "int8", tiled_axes={0: 8})
    call = qpl.pallas_call(
        copy_kernel,
        sds((96, 128)),
        grid=(3,),
        in_specs=[pl.BlockSpec((pl.Element(32), pl.Element(128)), lambda i: (i * 16, 0))],
        out_specs=pl.BlockSpec((32, 128), lambda i: (i, 0)),
        interpret=True,
    )
    x = qpl.dequantize(q)
    np.testing.assert_array_equal(call(q), jnp.concatenate([x[0:32], x[16:48], x[32:64]]))


def test_memory_space_any():
    """The kernel copies what it wants from HBM itself."""
    q = qpl.quantize(normal(64, 128), "int8", tiled_axes={0: 32}, calibration_method="minmax")

    def kernel(q_ref, out_ref, values, scale, zero_point):
        pltpu.sync_copy(q_ref.qvalue, values)
        pltpu.sync_copy(q_ref.scale, scale)
        pltpu.sync_copy(q_ref.zero_point, zero_point)
        out_ref[...] = qpl.dequantize(qpl.QArray(values[...], scale[...], zero_point[...]))

    parts = (q.qvalue, q.scale, q.zero_point)
    out = qpl.pallas_call(
        kernel,
        sds(q.shape),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype) for x in parts],
        interpret=SIMULATOR,
    )(q)
    np.testing.assert_array_equal(out, qpl.dequantize(q))


def test_scalar_prefetch_and_an_untouched_grid_spec():
    q = qpl.quantize(normal(64, 128), "int8", channelwise_axes=[0])
    order = jnp.array([3, 0, 2, 1], jnp.int32)
    in_spec = pl.BlockSpec((16, 128), lambda i, order_ref: (order_ref[i], 0))
    out_spec = pl.BlockSpec((16, 128), lambda i, order_ref: (i, 0))
    grid_spec = pltpu.PrefetchScalarGridSpec(1, (4,), [in_spec], out_spec)

    def kernel(order_ref, q_ref, out_ref):
        del order_ref
        copy_kernel(q_ref, out_ref)

    call = qpl.pallas_call(kernel, sds(q.shape), grid_spec=grid_spec, interpret=SIMULATOR)
    expected = np.asarray(qpl.dequantize(q)).reshape(4, 16, 128)[np.asarray(order)].reshape(64, 128)
    np.testing.assert_array_equal(call(order, q), expected)
    assert grid_spec.in_specs == (in_spec,) and grid_spec.out_specs is out_spec


def test_an_output_may_be_a_qarray():
    x = normal(64, 256)

    def kernel(x_ref, q_ref):
        q = qpl.quantize(x_ref[...], "int8", tiled_axes={1: 128}, channelwise_axes=[0])
        q_ref.qvalue[...] = q.qvalue
        q_ref.scale[...] = q.scale

    out = qpl.pallas_call(
        kernel,
        qpl.QArray(sds(x.shape, jnp.int8), sds((64, 2))),
        grid=(2,),
        in_specs=[pl.BlockSpec((32, 256), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((32, 256), lambda i: (i, 0)),
        interpret=SIMULATOR,
    )(x)
    expected = qpl.quantize(x, "int8", tiled_axes={1: 128}, channelwise_axes=[0])
    assert jax.tree.structure(out) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, out, expected)


def test_arguments_in_a_tree_and_under_jit_and_vmap():
    q = qpl.quantize(normal(3, 64, 128), "int8", channelwise_axes=[0], tiled_axes={1: 32})

    def kernel(args_ref, out_ref):
        out_ref[...] = qpl.dequantize(args_ref["q"][...]) + args_ref["bias"][...]

    spec = pl.BlockSpec((32, 128), lambda i: (i, 0))
    call = qpl.pallas_call(
        kernel,
        sds((64, 128)),
        grid=(2,),
        in_specs=[{"q": spec, "bias": spec}],
        out_specs=spec,
        interpret=True,
    )
    bias = normal(64, 128)
    out = jax.jit(jax.vmap(lambda q, bias: call({"q": q, "bias": bias}), (0, None)))(q, bias)
    expected = float64(q) + float64(bias)
    # Compiled together, the scale's product and the sum may round once.
    bound = 2 * EPS * (np.abs(float64(q)) + np.abs(float64(bias)))
    np.testing.assert_array_less(np.abs(np.asarray(out, np.float64) - expected), bound)


def test_plain_arrays_are_left_to_pallas():
    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref.at[0:8][...]  # a ref, whatever its block

    spec = pl.BlockSpec((8, 8), lambda i: (i, 0))
    x = normal(32, 16)
    call = qpl.pallas_call(kernel, sds((32, 8)), grid=(4,), in_specs=[spec], out_specs=spec, interpret=True)
    np.testing.assert_array_equal(call(x), x[:, :8])


def test_a_grid_spec_excludes_its_parts():
    with pytest.raises(ValueError, match="With grid_spec given, grid, in_specs"):
        qpl.pallas_call(copy_kernel, sds((8, 128)), grid_spec=pl.GridSpec((1,)), grid=(2,))


def test_a_block_that_cuts_a_tile():
    q = qpl.quantize(normal(64, 128), "int8", tiled_axes={0: 32})
    spec = pl.BlockSpec((24, 128), lambda i: (i, 0))
    call = qpl.pallas_call(copy_kernel, sds(q.shape), grid=(3,), in_specs=[spec], out_specs=spec)
    with pytest.raises(
        ValueError, match=r"24 along axis 0 cuts tiles of 32 .*\(32, 64, \.\.\.\) and its divisors"
    ):
        call(q)


def test_no_rule_outside_of_a_model():
    assert qpl.get_current_rule("gmm") is None
