"""Grouped matrix multiplication: `gmm`, `tgmm`, and functions to ask about either without running it."""

from qwix_kernels.ragged_matmul.api import gmm as gmm
from qwix_kernels.ragged_matmul.api import gmm_problem_of as gmm_problem_of
from qwix_kernels.ragged_matmul.api import tgmm as tgmm
from qwix_kernels.ragged_matmul.api import tgmm_problem_of as tgmm_problem_of
from qwix_kernels.ragged_matmul.problem import GmmProblem as GmmProblem
from qwix_kernels.ragged_matmul.problem import TgmmProblem as TgmmProblem
