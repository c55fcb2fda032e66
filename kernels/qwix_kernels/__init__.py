"""Quantized matrix multiplication for JAX: Pallas kernels, a portable path, and the choice between them."""

from qwix_kernels import chips as chips
from qwix_kernels import matmul as matmul
from qwix_kernels import problem as problem
from qwix_kernels import quantize as quantize
