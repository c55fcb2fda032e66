"""One block of a Llama-3 8B, in Flax: what `--suite train` prices a training step of.

RMSNorm, q/k/v/o projections with grouped queries, rotary positions, causal attention, gated SiLU MLP. Nothing
is allocated: `step` gives a function and the shapes of its arguments.

Attention is jax's own flash attention kernel for TPUs, in bfloat16 in all programs: the materialised scores
of XLA's attention (2 GiB in float32 at these sizes, moved several times) would hide the matmuls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention

import qwix

_THETA = 500_000.0


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a block and of its batch. Defaults: Llama-3 8B with 4 sequences of 2048 tokens."""

    batch: int = 4
    length: int = 2048
    hidden: int = 4096
    mlp: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head: int = 128

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def weights(self) -> int:
        """Values in the weights of the linear layers."""
        return self.hidden * (2 * self.heads + 2 * self.kv_heads) * self.head + 3 * self.hidden * self.mlp


class Block(nn.Module):
    """x [batch, length, hidden] in bfloat16, and the same again."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self._attention(RMSNorm(name="attention_norm")(x))
        return x + self._mlp(RMSNorm(name="mlp_norm")(x))

    def _attention(self, x: jax.Array) -> jax.Array:
        s = self.sizes
        heads = lambda x, n: x.reshape(*x.shape[:2], n, s.head).swapaxes(1, 2)
        q = rotated(heads(_dense(s.heads * s.head, "q_proj")(x), s.heads))
        k = rotated(heads(_dense(s.kv_heads * s.head, "k_proj")(x), s.kv_heads))
        v = heads(_dense(s.kv_heads * s.head, "v_proj")(x), s.kv_heads)
        k, v = (jnp.repeat(a, s.heads // s.kv_heads, axis=1) for a in (k, v))
        out = flash_attention.flash_attention(
            q, k, v, causal=True, sm_scale=s.head**-0.5, block_sizes=_blocks(s.length)
        )
        return _dense(s.hidden, "o_proj")(out.swapaxes(1, 2).reshape((*x.shape[:2], -1)))

    def _mlp(self, x: jax.Array) -> jax.Array:
        gate, up = _dense(self.sizes.mlp, "gate_proj")(x), _dense(self.sizes.mlp, "up_proj")(x)
        return _dense(self.sizes.hidden, "down_proj")(nn.silu(gate) * up)


def _dense(features: int, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, name=name)


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv 1910.07467), in float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        root = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
        return (wide * root * weight).astype(x.dtype)


def rotated(x: jax.Array) -> jax.Array:
    """Rotary positions (arXiv 2104.09864), x [batch, heads, length, head]."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[2])[:, None] * _THETA ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _blocks(length: int) -> flash_attention.BlockSizes:
    b = min(512, length)
    return flash_attention.BlockSizes(
        block_q=b,
        block_k_major=b,
        block_k=b,
        block_b=1,
        block_q_major_dkv=b,
        block_k_major_dkv=b,
        block_k_dkv=b,
        block_q_dkv=b,
        block_k_major_dq=b,
        block_k_dq=b,
        block_q_dq=b,
    )


def step(model: nn.Module, sizes: Sizes) -> tuple[Callable, tuple[Any, ...]]:
    """Forward and backward pass of the block: (function, shapes of its arguments).

    The function takes params, x and the gradient of the result; it gives the result, which the next block
    needs, and the gradients of params and of x.
    """
    x = jax.ShapeDtypeStruct((sizes.batch, sizes.length, sizes.hidden), jnp.bfloat16)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]

    def forward_backward(params: Any, x: jax.Array, g: jax.Array) -> Any:
        out, pull = jax.vjp(lambda params, x: model.apply({"params": params}, x), params, x)
        return out, *pull(g)

    return forward_backward, (params, x, x)


# Formats of the forward pass and of the gradients.
FORMATS = {"int8": ("int8", "int8"), "fp8": ("float8_e4m3fn", "float8_e5m2")}
PROGRAMS = ("bf16", *FORMATS)


def program(name: str, sizes: Sizes = Sizes()) -> tuple[Any, ...]:
    """A step in one of `PROGRAMS`: its function, then the shapes of its arguments."""
    model: nn.Module = Block(sizes)
    if name != "bf16":
        forward, backward = FORMATS[name]
        rule = qwix.QtRule(module_path=".*_proj", weight_qtype=forward, act_qtype=forward, bwd_qtype=backward)
        model = qwix.quantize_model(model, qwix.QtProvider([rule]))
    function, arguments = step(model, sizes)
    return function, *arguments
