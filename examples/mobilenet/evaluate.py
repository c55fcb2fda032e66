"""How near a quantized model is to the float one, and how large it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.mobilenet.model import MobileNetV2


@functools.partial(jax.jit, static_argnums=0)
def _scores(graphdef: nnx.GraphDef, state: nnx.State, images: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state)(images)


def logits(model: MobileNetV2, images: np.ndarray) -> np.ndarray:
    """Scores of all classes, float32 `[images, classes]`, in one batch."""
    graphdef, state = nnx.split(model)
    return np.asarray(_scores(graphdef, state, jnp.asarray(images)))


def agreement(scores: np.ndarray, reference: np.ndarray) -> float:
    """The share of images whose likeliest class is the same.

    Example:
      >>> agreement(np.array([[1.0, 2.0], [4.0, 3.0]]), np.array([[0.0, 1.0], [0.0, 1.0]]))
      0.5
    """
    return float((scores.argmax(-1) == reference.argmax(-1)).mean())


def sqnr_db(scores: np.ndarray, reference: np.ndarray) -> float | None:
    """Signal to quantization noise of all scores, `10 log10(sum r^2 / sum (r - s)^2)`, in dB.

    None where there's no noise.

    Example:
      >>> sqnr_db(np.array([3.0, 3.5]), np.array([3.0, 4.0]))
      20.0
    """
    noise = np.square(scores.astype(np.float64) - reference).sum()
    signal = np.square(reference.astype(np.float64)).sum()
    return float(10 * np.log10(signal / noise)) if noise else None


def device_bytes(tree: object) -> int:
    """Bytes that the arrays of `tree` take on the device; two int4 values share one."""
    return sum(
        leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)
    )


def weight_bytes(model: MobileNetV2) -> int:
    """Bytes on the device of the kernels of all layers, scales included."""
    leaves = nnx.to_flat_state(nnx.state(model))
    return sum(device_bytes(leaf) for path, leaf in leaves if "kernel" in path)
