"""Greedy answers with a key-value cache.

The cache has a fixed capacity, so that a model compiles twice for a question: once for the prompt, once
for one token. The weights are an argument of the compiled function; baked in, they would be constant-folded.
"""

import functools

import jax
import jax.numpy as jnp
import tokenizers
from flax import nnx
from tqdm import tqdm

from examples.smollm2.model import Cache, SmolLM2

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
END = "<|im_end|>"


def chat(question: str) -> str:
    """A question in the chat template that the model was trained with."""
    turns = [("system", SYSTEM), ("user", question)]
    said = "".join(f"<|im_start|>{role}\n{text}{END}\n" for role, text in turns)
    return said + "<|im_start|>assistant\n"


@functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
def step(graphdef: nnx.GraphDef, state: nnx.State, tokens: jax.Array, cache: Cache):
    """Feeds `tokens` `[1, length]`; returns the likeliest next token, `[1, 1]`, and the cache."""
    logits, cache = nnx.merge(graphdef, state)(tokens, cache)
    return jnp.argmax(logits[:, -1:], axis=-1), cache


def answer(
    model: SmolLM2,
    tokenizer: tokenizers.Tokenizer,
    question: str,
    *,
    max_tokens: int = 32,
    capacity: int = 128,
    progress: bool = False,
) -> str:
    """The model's answer to `question`, at most `max_tokens` long; prompt and answer fit in `capacity`."""
    prompt = tokenizer.encode(chat(question)).ids
    if len(prompt) + max_tokens > capacity:
        raise ValueError(
            f"{len(prompt)} tokens of prompt and {max_tokens=} do not fit in {capacity=}: raise the capacity."
        )
    graphdef, state = nnx.split(model)
    end, said = tokenizer.token_to_id(END), []
    token, cache = step(graphdef, state, jnp.array([prompt]), Cache.empty(model.config, 1, capacity))
    with tqdm(
        total=max_tokens, desc="answer", unit="token", disable=None if progress else True, leave=False
    ) as bar:
        while (latest := int(token[0, 0])) != end and len(said) < max_tokens:
            said.append(latest)
            bar.update()
            token, cache = step(graphdef, state, token, cache)
    return tokenizer.decode(said).strip()
