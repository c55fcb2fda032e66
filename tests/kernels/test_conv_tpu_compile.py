"""The TPU convolutions compiled by the real compiler for chips that are not attached."""

import jax
import jax.numpy as jnp
import pytest
from qwix_kernels import dispatch
from qwix_kernels.chips import CHIPS
from qwix_kernels.conv import ConvExtras, conv, problem_of, tpu
from qwix_kernels.problem import RowQuantize, Tensor

from bench.tpu_compile import TOPOLOGY, compile_for

SAME = ((1, 1), (1, 1))
INT8 = RowQuantize("int8", 127.5)
struct = jax.ShapeDtypeStruct


def compiled(chip: str, x, shape, extras=None, weights="int8", **options) -> str:
    """The HLO of the kernel's own lowering: one custom call, and what lays out the scales."""
    w = Tensor(struct(shape, weights), struct((1, 1, 1, shape[-1]), jnp.bfloat16))
    options = {"out_dtype": jnp.bfloat16, "padding": SAME} | options
    tpu.check(problem_of(x, w, extras, **options), CHIPS[chip])
    run = lambda x, w, extras: conv(x, w, extras, implementation="mosaic_tpu", **options)
    text = compile_for(chip, run, x, w, extras).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    return text


def stored(*shape: int) -> Tensor:
    return Tensor(struct(shape, jnp.int8), struct((1, 1, 1, 1), jnp.float32))


@pytest.mark.parametrize(
    "chip", ["v6e", *(pytest.param(c, marks=pytest.mark.large) for c in TOPOLOGY if c != "v6e")]
)
def test_kernels(chip):
    """Each in one program: stored integers, odd sizes, several images, quantization on the way, depthwise."""
    extras = ConvExtras(bias=struct((64,), jnp.float32))
    compiled(chip, stored(4, 14, 14, 128), (3, 3, 128, 64), extras, activation="relu")
    compiled(chip, struct((2, 15, 13, 64), jnp.bfloat16), (3, 3, 64, 72), quantize_lhs=INT8, strides=(2, 2))
    compiled(chip, struct((1, 14, 14, 96), jnp.bfloat16), (3, 3, 1, 96), quantize_lhs=INT8, groups=96)


@pytest.mark.large
@pytest.mark.parametrize("chip", ["v5e", "v7x"])
@pytest.mark.parametrize("weights", ["int4", "float8_e4m3fn"])
def test_formats(chip, weights):
    compiled(chip, struct((1, 8, 16, 64), jnp.bfloat16), (3, 3, 64, 64), weights=weights)


@pytest.mark.parametrize("chip", ["v5e"])
def test_a_chain_of_integers(chip):
    extras = ConvExtras(out_scale=struct((1, 1, 1, 1), jnp.float32))
    how = RowQuantize("int8", 127.5, static=True)
    x = stored(2, 16, 16, 64)
    compiled(chip, x, (3, 3, 64, 64), extras, quantize_out=how, activation="silu", out_dtype=None)
    compiled(chip, x, (1, 1, 64, 64), extras, quantize_out=how, padding=((0, 0),) * 2, out_dtype=None)


@pytest.mark.large
@pytest.mark.parametrize("chip", TOPOLOGY)
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("size", [(7, 7), (28, 30), (56, 56), (33, 17)])
def test_geometry(chip, strides, size):
    compiled(chip, stored(4, *size, 96), (3, 3, 96, 200), strides=strides)
    compiled(chip, struct((2, *size, 200), jnp.bfloat16), (3, 3, 1, 200), groups=200, strides=strides)


@pytest.mark.parametrize("chip", TOPOLOGY)
def test_the_kernel_is_chosen_where_it_wins(chip):
    w = Tensor(struct((3, 3, 256, 256), jnp.int8), struct((1, 1, 1, 256), jnp.float32))
    chosen = dispatch.explain(problem_of(stored(8, 56, 56, 256), w, padding=SAME), chip)
    assert chosen.chosen == "mosaic_tpu" and chosen.estimate.static_us < 2 * chosen.estimate.floor_us


def test_what_is_slower_than_xla_is_not_chosen(monkeypatch):
    """And explain says so, with both figures."""
    monkeypatch.setattr("qwix_kernels.conv.tpu_estimate._STEP", 10**6)
    for cached in (tpu.best, tpu.heuristic_config, tpu.is_matmul):
        cached.cache_clear()
    w = Tensor(struct((3, 3, 64, 64), jnp.int8), struct((1, 1, 1, 64), jnp.float32))
    plan = dispatch.explain(problem_of(stored(1, 14, 14, 64), w, padding=SAME), "v5e")
    for cached in (tpu.best, tpu.heuristic_config, tpu.is_matmul):
        cached.cache_clear()
    assert plan.chosen == "xla" and plan.rejected[0][1].startswith("predicted slower than xla: ")
