"""What sharded programs send, what quantizing a model holds, and what that means for 256 chips.

    python -m bench.scale --json FILE --check
    python -m bench.scale --meshes 2x4,v5e:4x4 --only dot

Three kinds of figures, never mixed:

    static          collectives and kernels in compiled programs, bytes by arithmetic; over eight virtual CPU
                    devices and for TPU slices that are not attached (scale_compile.py)
    measured        bytes of the arrays that are alive while a model is quantized, here (scale_memory.py)
    by arithmetic   weak scaling, from the static bytes and the rates of chips (scale_plan.py)
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from absl import app, flags

_MESHES = flags.DEFINE_list(
    "meshes",
    ["2x4", "4x2", "8x1", "v5e:4x4", "v6e:4x4", "tpu7x:2x2x2"],
    "Meshes of eight virtual CPU devices, and TPU slices.",
)
_ONLY = flags.DEFINE_string("only", "", "Compile only ops with this in their name.")
_WIDTH = flags.DEFINE_integer("width", 1024, "Width of the layers that are quantized.", lower_bound=8)
_LAYERS = flags.DEFINE_integer(
    "layers", 12, "How many are quantized while memory is watched; 0 for none.", lower_bound=0
)
_JSON = flags.DEFINE_string("json", None, "Write everything to this file as well.")
_CHECK = flags.DEFINE_boolean("check", False, "Exit with 1 where more is sent or held than must be.")


def _set_up() -> None:
    """Eight virtual devices, and compilers that ask nobody. Before jax is imported."""
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        given = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{given} --xla_force_host_platform_device_count=8".strip()


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}.")
    _set_up()
    from bench import scale_compile, scale_measure, scale_tables

    known = scale_compile.MESHES | scale_compile.TOPOLOGIES
    if unknown := [name for name in _MESHES.value if name not in known]:
        raise app.UsageError(f"--meshes: no {', '.join(unknown)}; there are {', '.join(known)}.")
    result = scale_measure.measure(_MESHES.value, _ONLY.value, _WIDTH.value, _LAYERS.value)
    scale_tables.show(result)
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            file.write(json.dumps(result, indent=1) + "\n")
    if _CHECK.value and (missed := scale_tables.failures(result)):
        sys.exit(f"{len(missed)} figures exceed their bounds.")


if __name__ == "__main__":
    app.run(main)
