"""What is read from ptxas and the machine code: of a recorded text, and of small kernels compiled here."""

import pytest

from bench import gpu_compile, gpu_sass

pytestmark = pytest.mark.filterwarnings("error")
# A consumer's loop (L_4 to its branch back) inside the loop over tiles (L_3), its wait out of line (L_5),
# local memory after the inner loop, and a loop that waits (L_6) inside the inner one.
RECORDED = """
ptxas info    : (C7519) warpgroup.arrive is injected in around line 541 by compiler
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'matmul_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for matmul_mosaic_gpu_kernel
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
ptxas info    : Compile time = 111.176 ms

	.target	sm_90a

//--------------------- .text.matmul_mosaic_gpu_kernel --------------------------
	.section	.text.matmul_mosaic_gpu_kernel,"ax",@progbits
        .size           matmul_mosaic_gpu_kernel,(.L_x_116 - matmul_mosaic_gpu_kernel)
matmul_mosaic_gpu_kernel:
.text.matmul_mosaic_gpu_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P1 BRA `(.L_x_1) ;
        /*0020*/                   USETMAXREG.DEALLOC.CTAPOOL 0x28 ;
        /*0030*/                   @UP1 UTMALDG.4D [UR40], [UR4] ;
        /*0040*/                   EXIT ;
.L_x_1:
        /*0050*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8 ;
        /*0060*/                   IMAD.MOV.U32 R151, RZ, RZ, R3 ;
.L_x_3:
        /*0070*/                   UMOV UR4, 0x400 ;
.L_x_4:
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR26], R13 ;
        /*0090*/              @!P1 BRA `(.L_x_5) ;
.L_x_2:
        /*00a0*/                   IGMMA.64x128x32.S8.S8 R24, gdesc[UR16], R24 ;
        /*00b0*/                   IGMMA.64x128x32.S8.S8 R24, gdesc[UR16], R24, gsb0 ;
.L_x_6:
        /*00c0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR26], R13 ;
        /*00d0*/              @!P1 BRA `(.L_x_6) ;
        /*00e0*/                   I2F R4, R5 ;
        /*00f0*/                   PRMT R4, R5, 0x10, RZ ;
        /*0100*/                   BRA.U UP1, `(.L_x_4) ;
        /*0110*/                   STL [R1], R4 ;
        /*0120*/               @P1 BRA `(.L_x_3) ;
        /*0130*/                   LDL R4, [R1] ;
        /*0140*/                   @UP1 UTMASTG.4D [UR8], [UR4] ;
        /*0150*/                   EXIT ;
.L_x_5:
        /*0160*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR26], R13 ;
        /*0170*/              @!P1 BRA `(.L_x_5) ;
        /*0180*/                   BRA `(.L_x_2) ;
.L_x_116:

  call void @mosaic_gpu_build_kernel_spec(ptr %0, i32 132, i32 1, i32 1, i32 0, i32 0, i32 0, \
i32 384, i32 1, i32 1, i32 131120, i32 0, i32 3, ptr %341, ptr %347)
"""


def test_recorded():
    (kernel,) = gpu_compile.kernels(RECORDED)
    assert kernel.name == "matmul_mosaic_gpu_kernel" and kernel.target == "sm_90a"
    assert (kernel.registers, kernel.stack_bytes, kernel.spill_bytes) == (168, 16, 20)
    assert (kernel.budgets, kernel.register_budget, kernel.highest_register) == ((40, 232), 232, 151)
    assert (kernel.grid, kernel.cluster, kernel.threads) == ((132, 1, 1), (1, 1, 1), 384)
    assert kernel.shared_bytes == 131120
    assert (kernel.matrix, kernel.tma_loads, kernel.tma_stores) == ({"IGMMA": 2}, 1, 1)
    assert (kernel.local, kernel.local_in_loops) == (2, 1)


def test_main_loop():
    loop = gpu_compile.kernels(RECORDED)[0].main_loop
    assert loop.instructions == 8  # without the loops that only wait; the way back from one is out of line
    assert loop.mix == {"sync": 1, "control": 3, "matrix": 2, "convert": 1, "integer": 1}
    assert loop.multiplies == 2 * 64 * 128 * 32
    assert loop.local == 0 and loop.cycles == 8.0  # one conversion holds its pipe for 8
    spilling = RECORDED.replace("PRMT R4, R5, 0x10, RZ", "LDL R4, [R1+0x4]")
    assert gpu_compile.kernels(spilling)[0].main_loop.local == 1


def test_no_loop():
    straight = gpu_sass.Code("/*0000*/ HGMMA.64x8x16.F32 R24, gdesc[UR16], R24 ;\n/*0010*/ EXIT ;")
    assert straight.main_loop() is None and straight.matrix() == {"HGMMA": 1}


def test_incomplete():
    with pytest.raises(ValueError, match="nvidia-cuda-nvdisasm"):
        gpu_compile.kernels(RECORDED.partition("//---")[0])


@pytest.mark.parametrize(
    "dtype, instruction, count",
    [
        ("int8", "IGMMA", 8),
        ("float8_e4m3fn", "QGMMA", 8),
        pytest.param("bfloat16", "HGMMA", 16, marks=pytest.mark.large),
    ],
)
def test_compiled(dtype, instruction, count):
    (kernel,) = gpu_compile.compiled("h100", "tests.bench.gpu_kernels:product", dtype=dtype).kernels
    assert kernel.target == "sm_90a" and kernel.matrix == {instruction: count}
    assert kernel.spill_bytes == kernel.stack_bytes == kernel.local == kernel.local_in_loops == 0
    assert kernel.tma_loads >= 2 and kernel.tma_stores == 1
    assert kernel.grid == (4, 2, 1) and kernel.threads == 128
    assert kernel.highest_register < kernel.registers <= kernel.register_budget == 255
    loop = kernel.main_loop
    assert loop.matrix == count and loop.multiplies == 128**3
    assert loop.mix["tma"] == 2 and sum(loop.mix.values()) == loop.instructions


def test_spills_are_seen():
    """128 x 256 sums take 256 registers of each of 128 threads, and there are 255."""
    product = "tests.bench.gpu_kernels:product"
    (kernel,) = gpu_compile.compiled("h100", product, dtype="int8", tile_n=256).kernels
    assert kernel.spill_bytes > 0 and kernel.local_in_loops > 0


def test_kernels_that_were_compiled_before():
    """Mosaic prints nothing of them then."""
    product = "tests.bench.gpu_kernels:product"
    three = gpu_compile.compiled("h100", product, dtype="int8", others=[64, 32]).kernels
    by_grid = {kernel.grid: kernel for kernel in three}
    assert by_grid.keys() == {(4, 2, 1), (8, 2, 1), (16, 2, 1)}
    for tile in (32, 128):
        (alone,) = gpu_compile.compiled("h100", product, dtype="int8", tile_n=tile).kernels
        assert by_grid[512 // tile, 2, 1] == alone


def test_unknown_chip():
    with pytest.raises(ValueError, match="h100, b200"):
        gpu_compile.Compiler("a100")


@pytest.mark.large
def test_refused():
    with gpu_compile.Compiler("b200") as compiler, pytest.raises(RuntimeError, match="wgmma"):
        compiler.compile("tests.bench.gpu_kernels:product", dtype="int8")
