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
from collections.abc import Sequence

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


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}.")
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    from bench import compile_ratios

    for flag, given, known in (
        ("targets", _TARGETS, compile_ratios.TARGETS),
        ("schemes", _SCHEMES, compile_ratios.scheme_names()),
    ):
        if unknown := [name for name in given.value if name not in known]:
            raise app.UsageError(f"--{flag}: no {', '.join(unknown)}; there are {', '.join(known)}.")
    rows = []
    options = {"blocks": _BLOCKS.value, "length": _LENGTH.value, "rounds": _ROUNDS.value}
    print("Measured: processor time to trace, lower and compile, over that of the bfloat16 original")
    for row in compile_ratios.measure(_TARGETS.value, _SCHEMES.value, **options):
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
