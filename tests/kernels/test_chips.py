"""The chip table against what is published, and which chip a program is lowered for."""

import jax
import pytest
from qwix_kernels import chips


def test_rates_are_those_of_one_core():
    v5p, v7x = chips.CHIPS["v5p"], chips.CHIPS["v7x"]
    assert (v5p.bf16, v5p.int8, v5p.hbm_gbps, v5p.chip_hbm_gbps) == (229.5, 459, 1382.5, 2765)
    assert (v7x.bf16, v7x.fp8, v7x.hbm_gbps) == (1153.5, 2307, 3690)


@pytest.mark.parametrize(
    ("chip", "lhs", "rhs", "unit"),
    [
        ("v5e", "int8", "int4", "int8"),
        ("v5e", "int4", "int4", "int4"),
        ("v5e", "float8_e4m3fn", "float8_e4m3fn", "bf16"),
        ("v5e", "bfloat16", "int4", "bf16"),
        ("v6e", "float8_e4m3fn", "float8_e4m3fn", "fp8"),
        ("v7x", "int8", "int8", "bf16"),
        ("v7x", "int4", "float8_e4m3fn", "fp8"),
        ("h100", "int8", "uint8", "int8"),
        ("h100", "int16", "int8", "bf16"),
    ],
)
def test_the_fastest_exact_unit(chip, lhs, rhs, unit):
    assert chips.CHIPS[chip].unit(lhs, rhs)[0] == unit


def test_matmul_dtypes_agree_with_jax():
    tpu_info = pytest.importorskip("jax._src.tpu_info")
    versions = {"v5e": "TPU_V5E", "v5p": "TPU_V5P", "v6e": "TPU_V6E", "v7x": "TPU_7X"}
    dtypes = ("float32", "bfloat16", "int8", "uint8", "int4", "float8_e4m3fn", "float8_e5m2")
    for name, version in versions.items():
        info = tpu_info.get_tpu_info_for_chip(tpu_info.ChipVersion[version], 1)
        chip = chips.CHIPS[name]
        assert chip.vmem_bytes == info.vmem_capacity_bytes
        for lhs in dtypes:
            for rhs in dtypes:
                assert chip.is_native(lhs, rhs) == info.is_matmul_supported(lhs, rhs), (name, lhs, rhs)


def test_device_kinds():
    kinds = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "v7x", "cpu": "cpu"}
    kinds |= {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA B200": "b200"}
    assert {kind: chips.chip_of_kind(kind).name for kind in kinds} == kinds
    assert chips.chip_of_kind("TPU v99") is None


def test_the_chip_being_lowered_for():
    device = lambda kind: type("Device", (), {"device_kind": kind})()
    assert chips.chip_for_lowering().name == "cpu"
    assert chips.chip_for_lowering("tpu").name == "v5e"  # an export: the most modest one
    assert chips.chip_for_lowering("tpu", device("TPU v6 lite")).name == "v6e"
    assert chips.chip_for_lowering("cpu", device("TPU v6 lite")).name == "cpu"
    mesh = jax.sharding.AbstractMesh(
        (1,),
        ("x",),
        abstract_device=jax.sharding.AbstractDevice(device_kind="TPU7x", num_cores=1, platform="tpu"),
    )
    with jax.sharding.use_abstract_mesh(mesh):
        assert chips.chip_for_lowering("tpu").name == "v7x"
        assert chips.chip_for_lowering("cpu").name == "cpu"


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"'V6'; did you mean 'v6e'\? Known: v5e, v5p"):
        chips.chip("V6")
    with pytest.raises(ValueError, match=r"Unknown chip 'abacus'\. Known"):
        chips.chip("abacus")
