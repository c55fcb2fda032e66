"""Whole models as an H100 would run them, compiled ahead of time: which kernels, and nothing in between."""

import pytest

from bench import gpu_compile

SCHEMES = {
    "w8a8": ({"weight_qtype": "int8", "act_qtype": "int8"}, "IGMMA"),
    "int4": ({"weight_qtype": "int4", "tile_size": 128}, "HGMMA"),
    "nf4": ({"weight_qtype": "nf4", "tile_size": 64}, "HGMMA"),
}
WEIGHT = 1024 * 1024 // 2  # bytes of one of 4 bits
LARGE = [pytest.param(name, marks=pytest.mark.large) for name in SCHEMES if name != "w8a8"]


def transposes(program: gpu_compile.Program) -> list[str]:
    """Those of a weight or more."""
    return [name for name, moved in program.around if "transpose" in name and moved >= WEIGHT]


@pytest.mark.parametrize("name", ["w8a8", *LARGE])
def test_scanned_layers_whose_weights_are_k_major_are_our_kernels_and_nothing_is_transposed(name):
    rule, instruction = SCHEMES[name]
    program = gpu_compile.compiled("h100", "tests.integration.gpu_models:layers", prepack="k_major", **rule)
    matmuls = [kernel.matrix for kernel in program.kernels if kernel.matrix]
    assert len(matmuls) == 2 and all(set(matrix) == {instruction} for matrix in matmuls)
    assert transposes(program) == []
    assert all(kernel.spill_bytes == 0 for kernel in program.kernels)


@pytest.mark.large
def test_that_is_what_k_major_is_for():
    rule, _ = SCHEMES["w8a8"]
    program = gpu_compile.compiled("h100", "tests.integration.gpu_models:layers", prepack=False, **rule)
    assert transposes(program)
