"""What compile_time.py prints: the SmolLM2 example compiled in turn, quantized and not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench.tpu_compile import TOPOLOGY

TARGETS = ("cpu", *TOPOLOGY)


def scheme_names() -> list[str]:
    """Those of the example."""
    from examples.smollm2.schemes import SCHEMES

    return list(SCHEMES)


def program(scheme: str, blocks: int, length: int) -> tuple[Callable, tuple[Any, Any]]:
    """The model's scoring as a function of (state, tokens), and the shapes of those, floats in bfloat16.

    `scheme` is one of examples/smollm2, "float" the original.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import qwix
    from examples.smollm2 import schemes
    from examples.smollm2.model import Config, SmolLM2

    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def make():
        model = SmolLM2(Config(blocks=blocks), rngs=nnx.Rngs(0))
        rules = schemes.SCHEMES[scheme].rules()
        if not rules:
            return model
        return qwix.quantize_model(model, qwix.PtqProvider(rules), jnp.zeros(tokens.shape, tokens.dtype))

    graphdef, state = nnx.split(nnx.eval_shape(make))
    narrow = lambda dtype: jnp.bfloat16 if dtype == jnp.float32 else dtype
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, narrow(a.dtype)), state)
    return lambda state, tokens: nnx.merge(graphdef, state)(tokens)[0], (state, tokens)


def compiled_text(target: str, fn: Callable, arguments: tuple[Any, ...]) -> tuple[float, str]:
    """(processor seconds to trace, lower and compile, the program) for a chip, from nothing."""
    import jax

    from bench.tpu_compile import compile_for

    jax.clear_caches()
    start = time.process_time()
    if target == "cpu":
        program = jax.jit(fn).lower(*arguments).compile()
    else:
        program = compile_for(target, fn, *arguments)
    return time.process_time() - start, program.as_text() or ""


def measure(
    targets: Sequence[str], schemes: Sequence[str], *, blocks: int, length: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """One row per target and scheme: ratios to bfloat16, the programs compiled in turn."""
    import numpy as np

    from bench import compiled

    for target in targets:
        programs = {name: program(name, blocks, length) for name in ("float", *schemes)}
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        texts = {}
        compiled_text(target, *program("float", 1, length))  # the compiler's own start
        for _ in range(rounds):
            for name, (fn, arguments) in programs.items():
                took, texts[name] = compiled_text(target, fn, arguments)
                seconds[name].append(took)
        for name in schemes:
            low, ratio, high = np.percentile(np.array(seconds[name]) / seconds["float"], (25, 50, 75))
            kernels = compiled.kernels(texts[name])
            yield {
                "target": target,
                "scheme": name,
                "blocks": blocks,
                "ratio": float(ratio),
                "low": float(low),
                "high": float(high),
                "instructions_ratio": compiled.executed(texts[name]) / compiled.executed(texts["float"]),
                "kernels": kernels.total(),
                "distinct_kernels": len(kernels),
            }
