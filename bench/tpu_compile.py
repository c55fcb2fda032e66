"""Compiles a function for a TPU that is not attached, and prices what the compiler made of it. Static.

libtpu compiles for a topology on any x86 machine and writes each op's final bundles to a folder that it is
told of once, in an environment variable, when it loads. So `prepare` comes before jax is imported, and a
process prices one program after the other. The price of a program is the sum over its ops:

    kernel (Pallas)   cycles from its bundles (replay.py), bytes from the DMAs that it starts
    XLA op            the compiler's own estimated cycles, bytes from its operands and result
    static time       per op the greater of compute and memory, as double buffering hides the lesser

What a jax device is differs: two TensorCores on v5p (a kernel's parallel grid is split over them), one
TensorCore on v7x, a whole chip on v5e and v6e. Rates and bandwidth are those of a jax device.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import importlib.metadata
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from bench import bundles, hlo, replay
from bench.cache import Cache, digest_of_files

if TYPE_CHECKING:
    from qwix_kernels.chips import Chip

TOPOLOGY: Mapping[str, str] = {
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "v7x": "tpu7x:2x2x1",
}
_DEVICE_CORES = {"v5p": 2}
_DELAY_SLOTS = {"v7x": 6}
_MXUS = {128: 4, 256: 2}  # per core, by the columns of one
# Known inputs of the kernels whose names start with the key.
KnownOf = Mapping[str, replay.Known]
_FILES = re.compile(r"^\d+-(.*)-\d+-final_bundles\.txt$")
_DUMP_FLAGS = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=^final"
LOCATIONS = re.compile(r"\\22debug_locations\\22: \\22[^\\]*\\22")


@dataclasses.dataclass(frozen=True)
class OpCost:
    """Static cost of one op on one jax device. Times in microseconds; `units` are fractions of the slots."""

    name: str
    is_kernel: bool
    bundles: int  # of the slowest core; an XLA op's estimated cycles
    cycles: int  # the bundles and the waits for matrix units
    hbm_bytes: int
    compute_us: float
    memory_us: float
    units: Mapping[str, float] = dataclasses.field(default_factory=dict)
    spills: float = 0.0  # fills and spills as a fraction of all register loads and stores
    assumed: int = 0  # branches on the kernel's data that were charged in full
    mxu_busy: float = 0.0  # share of the cycles for which the matrix units are held

    @property
    def static_us(self) -> float:
        return max(self.compute_us, self.memory_us)


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """Static cost of a compiled program: the sum over its ops, which run one after the other."""

    chip: str
    ops: tuple[OpCost, ...]

    @property
    def bundles(self) -> int:
        return sum(op.bundles for op in self.ops)

    @property
    def cycles(self) -> int:
        return sum(op.cycles for op in self.ops)

    @property
    def hbm_bytes(self) -> int:
        return sum(op.hbm_bytes for op in self.ops)

    @property
    def compute_us(self) -> float:
        return sum(op.compute_us for op in self.ops)

    @property
    def memory_us(self) -> float:
        return sum(op.memory_us for op in self.ops)

    @property
    def static_us(self) -> float:
        return sum(op.static_us for op in self.ops)

    @property
    def kernels(self) -> tuple[OpCost, ...]:
        return tuple(op for op in self.ops if op.is_kernel)


def prepare(dump: str | None) -> None:
    """Sets what libtpu reads when it loads: to dump final bundles to the folder `dump`, and to ask nobody.

    With None it dumps nothing: then programs without kernels can be priced, and faster.

    Raises RuntimeError in a process that has imported jax: it is too late then.
    """
    if "jax" in sys.modules:
        raise RuntimeError("jax is imported already; libtpu reads LIBTPU_INIT_ARGS when it loads.")
    if dump is not None:
        given = os.environ.get("LIBTPU_INIT_ARGS", "")
        os.environ["LIBTPU_INIT_ARGS"] = f"{given} --xla_jf_dump_to={dump} {_DUMP_FLAGS}".strip()
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")


def device_cores(chip: Chip) -> int:
    """TensorCores of a jax device."""
    return _DEVICE_CORES.get(chip.name, 1)


def device_rate(chip: Chip, unit_tflops: float) -> float:
    """Operations per second of a jax device whose cores do `unit_tflops` each."""
    return unit_tflops * 1e12 * device_cores(chip)


def device_bandwidth(chip: Chip) -> float:
    """HBM bytes per second of a jax device."""
    return chip.hbm_gbps * 1e9 * device_cores(chip)


def occupancy(chip: Chip, element: str) -> float:
    """Cycles for which a matrix instruction with operands of this type holds its MXU, at the unit's peak.

    >>> from qwix_kernels.chips import CHIPS
    >>> [round(occupancy(CHIPS["v5e"], e)) for e in ("bf16", "s8", "f8e5m2")]
    [16, 16, 32]
    >>> [round(occupancy(CHIPS["v6e"], e)) for e in ("bf16", "s8", "f32")]
    [8, 8, 4]
    """
    rates = {"s8": chip.int8, "u8": chip.int8, "s4": chip.int4, "u4": chip.int4, "bf16": chip.bf16}
    native = chip.fp8 if element.startswith("f8") or element == "bf8" else rates.get(element, chip.bf16)
    per_cycle = (native or chip.bf16) * 1e3 / chip.ghz / _MXUS[chip.mxu]
    return 2 * bundles.Matmul(0, element).rows * chip.mxu**2 / per_cycle


def compile_for(chip: str, fn: Callable, *args: Any) -> Any:
    """`fn` compiled for one jax device of `chip`. `args` are pytrees of arrays or ShapeDtypeStructs.

    Raises ValueError for a chip that is not a TPU we know, and whatever the compiler raises.
    """
    return lower_for(chip, fn, *args).compile()


def lower_for(chip: str, fn: Callable, *args: Any, row_major: bool = False) -> Any:
    """As `compile_for`, up to the program that the TPU compiler is given.

    With `row_major` the first argument and the results lie row by row in memory.
    """
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.experimental.layout import Format, Layout
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    if chip not in TOPOLOGY:
        raise ValueError(f"Cannot compile for {chip!r}; TPUs known here: {', '.join(TOPOLOGY)}.")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[chip]).devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def rows(a: Any) -> Any:
        return Format(Layout(tuple(range(a.ndim))), sharding)

    def placed(i: int, a: Any) -> Any:
        where = rows(a) if row_major and i == 0 else sharding
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        results = jax.tree.map(rows, jax.eval_shape(fn, *args)) if row_major else None
        operands = [jax.tree.map(lambda a, i=i: placed(i, a), arg) for i, arg in enumerate(args)]
        return jax.jit(fn, out_shardings=results).lower(*operands)


def price(
    chip: str,
    dump: str | None,
    fn: Callable,
    *args: Any,
    cache: Cache | None = None,
    row_major: bool = False,
    known: KnownOf | None = None,
) -> ProgramCost:
    """The static cost of `fn` on one jax device of `chip`. `dump` is the folder that `prepare` was given.

    With `row_major` the first argument and the results lie row by row, as they do between two kernels. Else
    XLA chooses, for the program alone, the layout that pads least, and turns a matrix with 576 columns round
    before and after a kernel.

    `known` gives those inputs of a kernel, by its name, that are data and steer it: see replay.py.

    With a `cache`, a program that was priced before is not compiled again: the same text for the TPU compiler
    has the same price, wherever in the sources it comes from.
    """
    from qwix_kernels import chips

    spec = chips.chip(chip)
    lowered = lower_for(chip, fn, *args, row_major=row_major)
    key = _key(spec, lowered.as_text())
    if known is not None:
        key += f" {hashlib.sha256(repr(sorted(known.items())).encode()).hexdigest()}"
    if cache and (before := cache.get(key)):
        return ProgramCost(chip, tuple(OpCost(**op) for op in before))
    if dump is not None:
        clear(dump)
    text = lowered.compile().as_text()
    parsed = dumped(dump) if dump is not None else {}
    cost = ProgramCost(chip, tuple(_op_cost(spec, op, parsed, known or {}) for op in hlo.ops(text)))
    if cache:
        cache.put(key, [dataclasses.asdict(op) for op in cost.ops])
    return cost


def _key(chip: Chip, program: str) -> str:
    """What a program's price depends on: its text but for line numbers, the compiler, and this reader."""
    versions = [importlib.metadata.version(p) for p in ("jax", "jaxlib", "libtpu")]
    here = pathlib.Path(__file__).parent
    reader = digest_of_files(here / f"{name}.py" for name in ("bundles", "hlo", "replay", "tpu_compile"))
    given = re.sub(r"\S*xla_jf_dump_\S*", "", os.environ.get("LIBTPU_INIT_ARGS", "")).strip()
    parts = (repr(chip), *versions, reader, given, LOCATIONS.sub("", program))
    return "program " + hashlib.sha256("\0".join(parts).encode()).hexdigest()


def clear(dump: str) -> None:
    """Empties the dump folder: file names do not tell programs apart."""
    shutil.rmtree(dump, ignore_errors=True)
    os.makedirs(dump)


def dumped(dump: str) -> dict[str, str]:
    """Stem of the dump files by op."""
    found = {}
    for path in glob.glob(os.path.join(glob.escape(dump), "*final_bundles.txt")):
        match = _FILES.match(os.path.basename(path))
        if match and "schedule-analysis" not in path:
            found[match[1]] = path
    return found


def _op_cost(chip: Chip, op: hlo.Op, files: Mapping[str, str], known: KnownOf) -> OpCost:
    bandwidth = device_bandwidth(chip)
    if not op.is_kernel:
        cycles = (op.estimated_cycles or 0) * op.times
        moved = op.hbm_bytes * op.times
        return OpCost(op.name, False, cycles, cycles, moved, cycles / chip.ghz / 1e3, moved / bandwidth * 1e6)
    if op.name not in files:
        raise ValueError(f"The compiler dumped no bundles for {op.name!r}; it dumped {sorted(files)}.")
    data = next((data for name, data in known.items() if op.name.startswith(name)), None)
    path = files[op.name]
    cores = [replay_file(chip, op.name, path, core, data) for core in range(device_cores(chip))]
    slowest = max(cores, key=lambda cost: cost.cycles)
    moved = (op.hbm_bytes + sum(cost.hbm_bytes for cost in cores)) * op.times
    cycles = slowest.cycles * op.times
    return OpCost(
        op.name,
        True,
        slowest.bundles * op.times,
        cycles,
        moved,
        cycles / chip.ghz / 1e3,
        moved / bandwidth * 1e6,
        slowest.units,
        slowest.spills,
        sum(cost.assumed for cost in cores),
        slowest.mxu_cycles / slowest.cycles,
    )


def replay_file(
    chip: Chip, name: str, path: str, core: int = 0, known: replay.Known | None = None
) -> replay.Cost:
    """The cost of the kernel whose final bundles are in `path`, on one core of the chip."""
    units = glob.glob(
        os.path.join(
            glob.escape(os.path.dirname(path)),
            f"*-{glob.escape(name)}-*-final_hlo-static-per-bundle-utilization.txt",
        )
    )
    text = pathlib.Path(units[0]).read_text() if units else ""
    timing = replay.Timing(lambda e: occupancy(chip, e), _DELAY_SLOTS.get(chip.name, 4))
    return replay.replay(bundles.parse(name, pathlib.Path(path).read_text(), text), timing, core, known)
