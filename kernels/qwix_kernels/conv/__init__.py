"""Quantized convolution: `conv`, and `problem_of` to ask about one without running it."""

from qwix_kernels.conv.api import conv as conv
from qwix_kernels.conv.api import problem_of as problem_of
from qwix_kernels.conv.problem import ConvExtras as ConvExtras
from qwix_kernels.conv.problem import ConvProblem as ConvProblem
