"""The process that compiles for one GPU that is not attached: see gpu_compile.py, which starts it.

Run as `python -m bench.gpu_worker CHIP FOLDER`. Also for a script of its own, one chip a process: `prepare`
before jax is imported, then `compile_for`.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bench import child, gpu_compile, hlo


@dataclasses.dataclass(frozen=True)
class _Device:
    """What the compiler asks about a GPU: the vendor's device properties."""

    name: str
    capability: int
    cores: int
    bandwidth: int  # bytes a second
    l2: int
    ghz: float
    memory: int


_DEVICES: Mapping[str, _Device] = {
    "h100": _Device("NVIDIA H100 80GB HBM3", 9, 132, 3352320000000, 52428800, 1.98, 84942979072),
    "b200": _Device("NVIDIA B200", 10, 148, 7672320000000, 132644864, 1.965, 191514411008),
}
_KERNEL = re.compile(r'custom_call_target="mosaic_gpu\w*".*?kernel_hash = "((?:[^"\\]|\\.)*)"')


def prepare() -> None:
    """Sets what jax and Mosaic read when they are loaded. Raises RuntimeError where jax is loaded already."""
    if "jax" in sys.modules:
        raise RuntimeError("jax is imported already; Mosaic reads its settings when it loads.")
    os.environ.update(JAX_PLATFORMS="cpu", JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1")
    for what in ("PTXAS", "SASS", "HOST_LLVM"):
        os.environ[f"MOSAIC_GPU_DUMP_{what}"] = "1"
    import jax.experimental.pallas.mosaic_gpu  # noqa: F401  sets MOSAIC_GPU_CUDA_ROOT, which is corrected here

    if root := _nvdisasm():
        os.environ["MOSAIC_GPU_CUDA_ROOT"] = str(root)


def _nvdisasm() -> pathlib.Path | None:
    """The folder whose bin/ holds nvdisasm, of the installed package."""
    for path in map(pathlib.Path, sys.path):
        for found in path.glob("nvidia/*/bin/nvdisasm"):
            return found.parent.parent
    return None


def compile_for(chip: str, fn: Callable, *args: Any) -> Any:
    """`fn` compiled for one `chip`. `args` are pytrees of arrays or ShapeDtypeStructs. Needs `prepare`."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    described = topologies.get_topology_desc(
        platform="cuda", topology_name=chip, target_config=target_config(chip), topology="1x1x1"
    )
    mesh = Mesh(np.array(described.devices[:1]), ("x",))
    where = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), args)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(fn).lower(*args).compile()


def target_config(chip: str) -> str:
    """The description of the GPU that the compiler is given, a text protobuf of stream_executor's."""
    device = _DEVICES[chip]
    return f"""
gpu_device_info {{
  name: "{device.name}" device_vendor: "NVIDIA Corporation" device_address_bits: 64
  cuda_compute_capability {{ major: {device.capability} feature_extension: ACCELERATED_FEATURES }}
  core_count: {device.cores} clock_rate_ghz: {device.ghz} fpus_per_core: 128
  memory_bandwidth: {device.bandwidth} l2_cache_size: {device.l2} device_memory_size: {device.memory}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{device.name}"
"""


class Reader:
    """Reads what is said of programs. `printed` gives what was printed since it was last called."""

    def __init__(self, chip: str, printed: Callable[[], str]):
        self._chip, self._printed = chip, printed
        self._known: dict[str, gpu_compile.Kernel] = {}

    def program(self, fn: Callable, *args: Any) -> gpu_compile.Program:
        """Raises what the compiler raises, and ValueError where it does not say enough of the kernels."""
        self._printed()
        text = compile_for(self._chip, fn, *args).as_text()
        hashes = _KERNEL.findall(text)
        new = [one for one in dict.fromkeys(hashes) if one not in self._known]
        self._known.update(zip(new, gpu_compile.kernels(self._printed()), strict=True))
        around = [op for op in hlo.ops(text) if op.opcode != "custom-call"]
        return gpu_compile.Program(
            self._chip,
            tuple(self._known[one] for one in hashes),
            tuple((op.name, op.hbm_bytes * op.times) for op in around),
        )


@contextlib.contextmanager
def _captured(folder: str) -> Iterator[Callable[[], str]]:
    """Standard output, of the compilers' C++ too, into a file; the value gives what is new in it.

    What Python prints goes where it did before.
    """
    sys.stdout.flush()
    before = os.dup(1)
    file = os.open(os.path.join(folder, "stdout"), os.O_CREAT | os.O_RDWR | os.O_TRUNC)
    os.dup2(file, 1)
    sys.stdout = os.fdopen(before, "w")

    def printed() -> str:
        ctypes.CDLL(None).fflush(None)
        size = os.fstat(file).st_size
        text = os.pread(file, size, 0).decode(errors="replace")
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        return text

    yield printed
    os.close(file)


def main(chip: str, folder: str) -> None:
    prepare()
    known: dict[str, dict[str, Any]] = {}
    with _captured(folder) as printed:
        reader = Reader(chip, printed)

        def answer(request: dict[str, Any]) -> dict[str, Any]:
            key = json.dumps(request, sort_keys=True)
            if key not in known:
                module, _, function = request["what"].partition(":")
                fn, args = getattr(importlib.import_module(module), function)(**request["arguments"])
                known[key] = dataclasses.asdict(reader.program(fn, *args))
            return known[key]

        child.serve(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
