"""The process that prices convolutions: one JSON object a line on standard input, one line of answer each.

A request is {"chip", "layer" (fields of shapes.ConvLayer), "scheme", "program", "config" (its blocks, or
null)}. Programs are those of `PROGRAMS`; the answer has the ops of tpu_compile.ProgramCost. With a FOLDER the
compiler's bundles are dumped there, which kernels need; without, only programs without kernels can be
priced, and faster.

Run as `python -m bench.conv_compile [FOLDER] [CACHE]`, by conv_price.py; '' stands for none.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import warnings
from typing import Any

from bench import child, tpu_compile
from bench.cache import Cache
from bench.shapes import ConvLayer

PROGRAMS = ("kernel", "xla", "bf16")


def answer(request: dict[str, Any], dump: str | None, cache: Cache | None) -> dict[str, Any]:
    """The cost of the op by the TPU kernel, by the portable path, or of XLA's convolution of bfloat16."""
    from bench import conv_problems

    layer, scheme, program = ConvLayer(**request["layer"]), request["scheme"], request["program"]
    start = time.monotonic()
    if program == "bf16":
        op, arrays = conv_problems.xla_bf16(layer), conv_problems.bf16_operands(layer)
    else:
        name = "mosaic_tpu" if program == "kernel" else "xla"
        config = conv_problems.config(request.get("config"))
        op, arrays = conv_problems.kernel(layer, scheme, name, config), conv_problems.operands(layer, scheme)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cost = tpu_compile.price(
            request["chip"], dump, op, *arrays, cache=cache, row_major=program == "kernel"
        )
    ops = [dataclasses.asdict(op) for op in cost.ops]
    return {"ops": ops, "seconds": round(time.monotonic() - start, 1)}


def main(folder: str = "", cache: str = "") -> None:
    dump = os.path.join(folder, "dump") if folder else None
    tpu_compile.prepare(dump)
    known = Cache(cache) if cache else None
    child.serve(lambda request: answer(request, dump, known))


if __name__ == "__main__":
    main(*sys.argv[1:])
