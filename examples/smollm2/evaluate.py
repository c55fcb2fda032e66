"""How good and how large a model is: perplexity on a text that every Python has, and bytes on the device."""

import functools
import hashlib
import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from tqdm import tqdm

from examples.smollm2.model import SmolLM2

TOKENS, WINDOW = 4096, 256
# Logits are [windows, 256, 49152] in float32: 200 MB for four windows.
WINDOWS_AT_ONCE = 4
# The documentation is rewritten a little with every Python; perplexities compare on one text only.
PYTHON_312_TOKENS = "840b78eb41c028d7"


def documentation(tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    """Token ids of Python's own documentation: sorted topics joined by newlines."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    return np.array(tokenizer.encode(text).ids, np.int32)


def windows(tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    """The first 4096 tokens of the documentation, `[16, 256]`: what perplexity is measured on."""
    return documentation(tokenizer)[:TOKENS].reshape(-1, WINDOW)


def later_windows(tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    """All whole windows after those, `[windows, 256]`: what may be trained on."""
    rest = documentation(tokenizer)[TOKENS:]
    return rest[: len(rest) // WINDOW * WINDOW].reshape(-1, WINDOW)


def is_python_312(tokens: np.ndarray) -> bool:
    """Whether the windows are those of the text that the schemes' limits were set on."""
    return hashlib.sha256(tokens.tobytes()).hexdigest()[:16] == PYTHON_312_TOKENS


@functools.partial(jax.jit, static_argnums=0)
def negative_log_likelihood(graphdef: nnx.GraphDef, state: nnx.State, tokens: jax.Array) -> jax.Array:
    """Summed over `tokens` `[batch, length]`, of each token but the first given those before it; in nats."""
    logits, _ = nnx.merge(graphdef, state)(tokens)
    scores = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1).sum()


def perplexity(model: SmolLM2, tokens: np.ndarray, *, progress: bool = True) -> float:
    """`exp` of the mean negative log-likelihood per predicted token.

    Args:
      model: float or quantized.
      tokens: int `[windows, length]`; every window starts afresh.
      progress: show a bar.
    """
    graphdef, state = nnx.split(model)
    batches = np.split(tokens, range(WINDOWS_AT_ONCE, len(tokens), WINDOWS_AT_ONCE))
    bar = tqdm(batches, desc="perplexity", unit="batch", disable=None if progress else True, leave=False)
    total = sum(float(negative_log_likelihood(graphdef, state, jnp.asarray(batch))) for batch in bar)
    return float(np.exp(total / tokens[:, 1:].size))


def device_bytes(tree: object) -> int:
    """Bytes that the arrays of `tree` take on the device; two int4 values share one."""
    return sum(
        leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)
    )


def linear_bytes(model: SmolLM2) -> int:
    """Bytes on the device of the kernels of all linear layers, scales included."""
    leaves = nnx.to_flat_state(nnx.state(model))
    return sum(device_bytes(leaf) for path, leaf in leaves if "kernel" in path)
