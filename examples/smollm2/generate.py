"""Greedy answers with a key-value cache.

Tokens are fed in chunks of a fixed size, the last one padded, and the cache has a fixed capacity: one
compiled program reads the prompt and writes the answer. What padding leaves in the cache lies behind its end,
where nothing attends to it and the next chunk overwrites it. The weights are an argument of the compiled
function; baked in, they would be constant-folded.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from tqdm import tqdm

from examples.smollm2.model import Cache, SmolLM2

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
END = "<|im_end|>"
CHUNK = 16


def chat(question: str) -> str:
    """A question in the chat template that the model was trained with."""
    turns = [("system", SYSTEM), ("user", question)]
    said = "".join(f"<|im_start|>{role}\n{text}{END}\n" for role, text in turns)
    return said + "<|im_start|>assistant\n"


@functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
def step(graphdef: nnx.GraphDef, state: nnx.State, tokens: jax.Array, count: jax.Array, cache: Cache):
    """Feeds the first `count` of `tokens` `[1, CHUNK]`; returns the likeliest next token and the cache."""
    logits, fed = nnx.merge(graphdef, state)(tokens, cache)
    return jnp.argmax(logits[0, count - 1]), dataclasses.replace(fed, length=cache.length + count)


def padded(chunk: Sequence[int]) -> tuple[np.ndarray, np.int32]:
    """A chunk as `step` takes it, and how much of it counts."""
    tokens = np.zeros((1, CHUNK), np.int32)
    tokens[0, : len(chunk)] = chunk
    return tokens, np.int32(len(chunk))


def feed(
    graphdef: nnx.GraphDef, state: nnx.State, tokens: Sequence[int], cache: Cache
) -> tuple[jax.Array, Cache]:
    """Feeds one token or more; returns the likeliest next one and the cache."""
    *chunks, last = itertools.batched(tokens, CHUNK)
    for chunk in chunks:
        _, cache = step(graphdef, state, *padded(chunk), cache)
    return step(graphdef, state, *padded(last), cache)


def answer(
    model: SmolLM2,
    tokenizer: tokenizers.Tokenizer,
    question: str,
    *,
    max_tokens: int = 16,
    capacity: int = 128,
    progress: bool = True,
) -> str:
    """The model's answer to `question`, at most `max_tokens` long; prompt and answer fit in `capacity`."""
    prompt = tokenizer.encode(chat(question)).ids
    needed = len(prompt) + max_tokens + CHUNK
    if needed > capacity:
        raise ValueError(
            f"{len(prompt)} tokens of prompt, {max_tokens=} and {CHUNK} of padding do not "
            f"fit in {capacity=}; it takes {needed}."
        )
    graphdef, state = nnx.split(model)
    end, said = tokenizer.token_to_id(END), []
    token, cache = feed(graphdef, state, prompt, Cache.empty(model.config, 1, capacity))
    with tqdm(total=max_tokens, desc="answer", unit="token", disable=None if progress else True) as bar:
        while (latest := int(token)) != end and len(said) < max_tokens:
            said.append(latest)
            bar.update()
            token, cache = feed(graphdef, state, [latest], cache)
    return tokenizer.decode(said).strip()
