"""Quantized matrix multiplication: `matmul`, and `problem_of` to ask about one without running it."""

from qwix_kernels.matmul.api import matmul as matmul
from qwix_kernels.matmul.api import problem_of as problem_of
from qwix_kernels.problem import Extras as Extras
from qwix_kernels.problem import MatmulProblem as MatmulProblem
from qwix_kernels.problem import RowQuantize as RowQuantize
from qwix_kernels.problem import Tensor as Tensor
