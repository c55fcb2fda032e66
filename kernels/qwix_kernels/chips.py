"""What each chip can do, and which chip a program is being lowered for.

Figures are those of one core, because that is what a kernel's schedule is priced on: a TensorCore of a TPU
(v5p and v7x have two per chip), a whole GPU, a whole CPU. The sources disagree by less than 2 %; where they
do, the vendor's page wins.

    TPU rates, memory sizes, native dtype pairs   jax/_src/tpu_info.py (per chip there, divided by the cores
                                                  here)
    TPU HBM bandwidth                             cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}
    TPU clocks                                    v5e 1.5, v5p and v6e 1.75 GHz; v7x 2.2, inferred from the
                                                  compiler's cycle estimates and the published peak
    GPU rates                                     dense figures of the H100 SXM and HGX B200 data sheets
    gpu                                           any GPU that is not in the table: an A100's data sheet
    cpu                                           nominal: it orders implementations and promises nothing
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import jax

from qwix_kernels.problem import dtype_bits

MiB = 1 << 20
KiB = 1 << 10

_WIDE = frozenset({"float32", "bfloat16"})
_FP8_OLD = frozenset({"float8_e5m2", "float8_e4m3b11fnuz"})
_FP8 = frozenset({"float8_e5m2", "float8_e4m3fn"})
_INT8 = frozenset({"int8", "uint8"})
_INT4 = frozenset({"int4", "uint4"})


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device. Rates are TFLOP/s (or TOP/s) of one core, dense; 0 where there is no such unit."""

    name: str
    platform: str  # as in jax: "tpu", "cuda", "cpu"
    cores: int  # per chip
    ghz: float
    hbm_gbps: float  # GB/s that one core can count on
    vmem_bytes: int  # per core; on a GPU the shared memory of one multiprocessor
    smem_bytes: int  # scalar memory per core; 0 where there is none
    mxu: int  # columns of the matrix unit; 0 where that is not a notion
    bf16: float
    int8: float
    fp8: float
    int4: float
    # (lhs dtypes, rhs dtypes) that the matrix unit multiplies as they are
    native: tuple[tuple[frozenset[str], frozenset[str]], ...]
    device_kinds: tuple[str, ...] = ()  # how jax names such a device
    bf16_math: bool = False  # the vector unit computes on packed bfloat16
    sms: int = 0  # streaming multiprocessors of a GPU

    @property
    def chip_hbm_gbps(self) -> float:
        """GB/s of the whole chip."""
        return self.hbm_gbps * self.cores

    def is_native(self, lhs_dtype: str, rhs_dtype: str) -> bool:
        """Whether the matrix unit takes this pair without a conversion.

        >>> CHIPS["v6e"].is_native("int8", "int8"), CHIPS["v7x"].is_native("int8", "int8")
        (True, False)
        """
        return any(lhs_dtype in lhs and rhs_dtype in rhs for lhs, rhs in self.native)

    def unit(self, lhs_dtype: str, rhs_dtype: str) -> tuple[str, float]:
        """The fastest unit that multiplies these operands exactly, and its TFLOP/s on one core.

        Small integers and floats fit wider units exactly (int4 in int8 and fp8, int8 and fp8 in bf16), so the
        answer may need a conversion on the way; `is_native` says whether it does.

        >>> CHIPS["v5e"].unit("int8", "int4")
        ('int8', 394.0)
        >>> CHIPS["v7x"].unit("int8", "int8")
        ('bf16', 1153.5)
        """
        kinds = {_kind(lhs_dtype), _kind(rhs_dtype)}
        fits = {"int4": {"int4"}, "int8": {"int4", "int8"}, "fp8": {"int4", "fp4", "fp8"}}
        rates = [(getattr(self, unit), unit) for unit, held in fits.items() if kinds <= held]
        rate, unit = max([*rates, (self.bf16, "bf16")])
        return unit, rate


def _kind(dtype: str) -> str:
    if dtype.startswith("float"):
        return {4: "fp4", 8: "fp8"}.get(dtype_bits(dtype), "bf16")
    if dtype.startswith(("int", "uint")):
        return {1: "int4", 2: "int4", 4: "int4", 8: "int8"}.get(dtype_bits(dtype), "bf16")
    return "bf16"


_TPU5_NATIVE = ((_WIDE | _FP8_OLD, _WIDE | _FP8_OLD), (_INT8, _INT8), (_INT4, _INT4))
_TPU7_NATIVE = ((_WIDE, _WIDE | _FP8), (_FP8, _FP8))
_GPU_NATIVE = (
    (frozenset({"float16"}), frozenset({"float16"})),
    (frozenset({"bfloat16"}), frozenset({"bfloat16"})),
    (_INT8, _INT8),
    (_FP8, _FP8),
)


def _tpu(name, cores, ghz, chip_hbm, vmem, mxu, bf16, int8, fp8, int4, native, kinds) -> Chip:
    bf16, int8, fp8, int4 = (rate / cores for rate in (bf16, int8, fp8, int4))
    hbm = chip_hbm / cores
    rates = (bf16, int8, fp8, int4)
    packed = name not in ("v5e", "v5p")
    return Chip(name, "tpu", cores, ghz, hbm, vmem, MiB, mxu, *rates, native, kinds, packed)


_CPU_NATIVE = ((_WIDE, _WIDE), (_INT8, _INT8))
_V5E_KINDS = ("TPU v5 lite", "TPU v5e")
_V5P_KINDS = ("TPU v5", "TPU v5p")
_V6E_KINDS = ("TPU v6 lite", "TPU v6e")
_B200_KINDS = ("NVIDIA B200", "NVIDIA GB200")
_H100_KINDS = ("NVIDIA H100", "NVIDIA H200", "NVIDIA GH200", "NVIDIA H800")
_ALL = (
    _tpu("v5e", 1, 1.5, 819, 128 * MiB, 128, 197, 394, 0, 788, _TPU5_NATIVE, _V5E_KINDS),
    _tpu("v5p", 2, 1.75, 2765, 64 * MiB, 128, 459, 918, 0, 1840, _TPU5_NATIVE, _V5P_KINDS),
    _tpu("v6e", 1, 1.75, 1640, 128 * MiB, 256, 918, 1836, 918, 3680, _TPU5_NATIVE, _V6E_KINDS),
    _tpu("v7x", 2, 2.2, 7380, 64 * MiB, 256, 2307, 0, 4614, 0, _TPU7_NATIVE, ("TPU7x", "TPU7")),
    Chip(
        "h100", "cuda", 1, 1.755, 3350, 227 * KiB, 0, 0, 989, 1979, 1979, 0, _GPU_NATIVE, _H100_KINDS, sms=132
    ),
    Chip(
        "b200", "cuda", 1, 1.85, 8000, 227 * KiB, 0, 0, 2250, 4500, 4500, 0, _GPU_NATIVE, _B200_KINDS, sms=148
    ),
    Chip("gpu", "cuda", 1, 1.41, 2039, 163 * KiB, 0, 0, 312, 624, 0, 0, _GPU_NATIVE[:3]),
    Chip("cpu", "cpu", 1, 2.5, 50, 32 * MiB, 0, 0, 0.5, 2.0, 0, 0, _CPU_NATIVE, ("cpu",)),
)
CHIPS: dict[str, Chip] = {c.name: c for c in _ALL}
# What a program is lowered for when only the platform is known (exports from another machine).
_PORTABLE = {"tpu": "v5e", "cuda": "gpu", "cpu": "cpu"}


def chip(name: str | Chip | None = None) -> Chip:
    """The chip called `name`; a `Chip` is returned as it is, None means the one that is being lowered for.

    Raises ValueError for an unknown name.

    >>> chip("v5p").chip_hbm_gbps
    2765.0
    >>> chip("v6")
    Traceback (most recent call last):
      ...
    ValueError: Unknown chip 'v6'; did you mean 'v6e'? Known: v5e, v5p, v6e, v7x, h100, b200, gpu, cpu.
    """
    if isinstance(name, Chip):
        return name
    if name is None:
        return chip_for_lowering()
    if name in CHIPS:
        return CHIPS[name]
    near = difflib.get_close_matches(str(name).lower(), CHIPS, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"Unknown chip {name!r}{hint} Known: {', '.join(CHIPS)}.")


def chip_of_kind(device_kind: str) -> Chip | None:
    """The chip that jax calls `device_kind`, or None for one that is not in the table.

    >>> chip_of_kind("TPU v5 lite").name
    'v5e'
    """
    exact = [c for c in CHIPS.values() if device_kind in c.device_kinds]
    gpus = [c for c in CHIPS.values() if c.platform == "cuda" and device_kind.startswith(c.device_kinds)]
    return next(iter(exact + gpus), None)


def chip_for_lowering(platform: str | None = None, device: Any = None) -> Chip:
    """The chip that the program being lowered is for.

    In this order: `device`, where the caller knows it; the device of the abstract mesh in use
    (`jax.sharding.use_abstract_mesh`, set when compiling for a topology that is not attached); the local
    default device. The first that is of `platform` wins; where none is (an export for another platform), that
    platform's most modest chip does.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    for candidate in (device, abstract or _local_device()):
        kind = getattr(candidate, "device_kind", None)
        found = chip_of_kind(kind) if kind else None
        if found and platform in (None, found.platform):
            return found
    return CHIPS[_PORTABLE.get(platform or "cpu", "cpu")]


def _local_device() -> jax.Device:
    default = jax.config.jax_default_device
    return default if isinstance(default, jax.Device) else jax.local_devices()[0]
