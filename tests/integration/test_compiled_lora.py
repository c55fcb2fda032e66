"""A training step of QLoRA as the TPU's compiler leaves it: one kernel per pass, and no float weight."""

import jax
import jax.numpy as jnp
from flax import nnx

import qwix
from bench.compiled import instructions, kernels
from bench.tpu_compile import compile_for

ROWS, WIDTH, HIDDEN = 128, 256, 512


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        linear = lambda *shape: nnx.Linear(
            *shape, use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs
        )
        self.up, self.down = linear(WIDTH, HIDDEN), linear(HIDDEN, WIDTH)

    def __call__(self, x):
        return self.down(nnx.silu(self.up(x)))


def test_base_adapter_and_gradient_are_three_kernels_that_read_four_bits():
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16)
    provider = qwix.LoraProvider(rank=16, alpha=32.0, weight_qtype="nf4", tile_size=64)
    model = nnx.eval_shape(lambda: qwix.apply_lora_to_model(Mlp(nnx.Rngs(0)), provider, x, rngs=nnx.Rngs(1)))
    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)

    def step(adapters, rest, x):
        loss = lambda adapters: jnp.sum(nnx.merge(graphdef, adapters, rest)(x).astype(jnp.float32) ** 2)
        return jax.value_and_grad(loss)(adapters)

    text = compile_for("v6e", step, adapters, rest, x).as_text()
    # Forward through both layers; backward through the second, since nobody wants the gradient of x.
    assert sum(kernels(text).values()) == 3
    floats = [i for i in instructions(text) if i.dtype in ("f32", "bf16", "f16")]
    assert floats and not [i.text for i in floats if i.elements >= WIDTH * HIDDEN]
