"""Quantization for JAX and Flax, with hand-written Pallas kernels underneath.

`quantize` an array, or `quantize_model` a Flax model, and compute with the result as before.
"""

from qwix import ops
from qwix._src.core.calibration import HowToQuantize
from qwix._src.core.conv_general import conv_general_dilated
from qwix._src.core.dot_general import dot, dot_general
from qwix._src.core.einsum import einsum
from qwix._src.core.qarray import QArray, dequantize, is_quantized
from qwix._src.core.qarray import quantize_api as quantize
from qwix._src.core.sparsity import SparsityRule
from qwix._src.core.transposed_qarray import TransposedQArray, transpose_qarray
from qwix.version import __version__

__all__ = [
    "HowToQuantize",
    "QArray",
    "SparsityRule",
    "TransposedQArray",
    "__version__",
    "conv_general_dilated",
    "dequantize",
    "dot",
    "dot_general",
    "einsum",
    "is_quantized",
    "ops",
    "quantize",
    "transpose_qarray",
]
