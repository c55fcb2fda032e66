"""Small GPU kernels, as (function, shapes), whose machine code is known: see test_gpu_compile.py."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

TILE = 128


def _lies(dtype, columns=TILE):
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(columns * bits)
    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)


def product(dtype, tile_n=TILE, k=512, others=()):
    """[256, K] times the transpose of [512, K], a tile a block, by WGMMA; after it the products `others`."""
    m, n = 256, 512
    acc_type = jnp.int32 if dtype == "int8" else jnp.float32

    def kernel(a_g, b_g, o_g, o_s):
        row = pl.ds(TILE * jax.lax.axis_index("m"), TILE)
        column = pl.ds(tile_n * jax.lax.axis_index("n"), tile_n)

        def multiplied(acc):
            def step(_, a_s, b_s):
                plgpu.wgmma(acc, a_s, b_s.transpose((1, 0)))
                plgpu.wgmma_wait(0)

            specs = [
                plgpu.BlockSpec((rows, TILE), lambda k: (0, k), transforms=_lies(dtype))
                for rows in (TILE, tile_n)
            ]
            pipeline = plgpu.emit_pipeline(step, grid=(k // TILE,), in_specs=specs, max_concurrent_steps=2)
            pipeline(a_g.at[row], b_g.at[column])
            return acc[...]

        o_s[...] = pl.run_scoped(multiplied, plgpu.ACC((TILE, tile_n), acc_type)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_s, o_g.at[row, column])
        plgpu.wait_smem_to_gmem(0)

    out = _lies("bfloat16", min(tile_n, 64))
    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((m, n), jnp.bfloat16),
        grid=(m // TILE, n // tile_n),
        grid_names=("m", "n"),
        scratch_types=[plgpu.SMEM((TILE, tile_n), jnp.bfloat16, transforms=out)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    shapes = [jax.ShapeDtypeStruct((size, k), jnp.dtype(dtype)) for size in (m, n)]
    calls = [call, *(product(dtype, other, k)[0] for other in others)]
    return (lambda a, b: [one(a, b) for one in calls] if others else call(a, b)), shapes
