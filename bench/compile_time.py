"""Compile time of the quantized SmolLM2 example, over that of its bfloat16 original. Measured.

    python -m bench.compile_time --json FILE                       # the CPU and a v5e, some schemes
    python -m bench.compile_time --targets cpu,v5e,v6e --schemes w8a8,int4,nf4 --blocks 30 --rounds 3

Both programs are traced, lowered and compiled in turn in one process, from shapes alone, so that no weights
are loaded. A TPU that is not here is compiled for all the same (tpu_compile.py). What is compared is
processor time, which a busy machine disturbs less than the clock on the wall. Beside it stands what it is
made of: the instructions that the compiler emitted, and the kernels; each distinct one is compiled once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags

LIMIT = 1.3

_TARGETS = flags.DEFINE_list("targets", ["cpu", "v5e"], "cpu, v5e, v5p, v6e, v7x.")
_SCHEMES = flags.DEFINE_list("schemes", ["w8a8", "int4"], "Schemes of examples/smollm2.")
_BLOCKS = flags.DEFINE_integer(
    "blocks", 30, "Transformer blocks of the model; SmolLM2 has 30.", lower_bound=1
)
_LENGTH = flags.DEFINE_integer("length", 128, "Tokens.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 2, "How often each is compiled.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Write the rows to this file as well.")
_CHECK = flags.DEFINE_boolean("check", False, f"Exit with 1 where a median is over {LIMIT}.")


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


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}.")
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    from bench.tpu_compile import TOPOLOGY
    from examples.smollm2.schemes import SCHEMES

    for flag, given, known in (("targets", _TARGETS, ("cpu", *TOPOLOGY)), ("schemes", _SCHEMES, SCHEMES)):
        if unknown := [name for name in given.value if name not in known]:
            raise app.UsageError(f"--{flag}: no {', '.join(unknown)}; there are {', '.join(known)}.")
    rows = []
    options = {"blocks": _BLOCKS.value, "length": _LENGTH.value, "rounds": _ROUNDS.value}
    print("Measured: processor time to trace, lower and compile, over that of the bfloat16 original")
    for row in measure(_TARGETS.value, _SCHEMES.value, **options):
        rows.append(row)
        print(
            f"{row['target']:4} {row['scheme']:6} {row['ratio']:.2f}x ({row['low']:.2f}-{row['high']:.2f}), "
            f"{row['instructions_ratio']:.2f}x the instructions, {row['kernels']} kernels, "
            f"{row['distinct_kernels']} distinct",
            flush=True,
        )
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            file.write(json.dumps({"rows": rows}, indent=1) + "\n")
    if _CHECK.value and any(row["ratio"] > LIMIT for row in rows):
        sys.exit(f"Over {LIMIT}x.")


if __name__ == "__main__":
    app.run(main)
