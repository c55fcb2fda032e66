"""Quantization for JAX and Flax, with hand-written Pallas kernels underneath.

`quantize` an array, or `quantize_model` a Flax model, and compute with the result as before.
"""

from qwix._src.core.calibration import HowToQuantize
from qwix._src.core.qarray import QArray, dequantize, is_quantized
from qwix._src.core.qarray import quantize_api as quantize
from qwix._src.core.sparsity import SparsityRule
from qwix.version import __version__

__all__ = ["HowToQuantize", "QArray", "SparsityRule", "__version__", "dequantize", "is_quantized", "quantize"]
