"""Quantization of whole arrays: `quantize`, and `problem_of` to ask about it without running it."""

from qwix_kernels.quantize.api import DTYPES as DTYPES
from qwix_kernels.quantize.api import problem_of as problem_of
from qwix_kernels.quantize.api import quantize as quantize
from qwix_kernels.quantize.problem import QuantizeProblem as QuantizeProblem
