"""Quantization for JAX and Flax, with hand-written Pallas kernels underneath.

`quantize` an array, or `quantize_model` a Flax model, and compute with the result as before.
"""

from qwix import ops
from qwix._src.averaging import ExponentialMovingAverage, SimpleMovingAverage
from qwix._src.core.calibration import HowToQuantize
from qwix._src.core.conv_general import conv_general_dilated
from qwix._src.core.dot_general import dot, dot_general
from qwix._src.core.einsum import einsum
from qwix._src.core.qarray import QArray, dequantize, is_quantized
from qwix._src.core.qarray import quantize_api as quantize
from qwix._src.core.ragged_dot import ragged_dot, ragged_dot_general
from qwix._src.core.sparsity import SparsityRule
from qwix._src.core.transposed_qarray import TransposedQArray, transpose_qarray
from qwix._src.model import quantize_model
from qwix._src.providers.boxed_param import BoxedParamProvider
from qwix._src.providers.lora import LoraProvider, LoraRule, apply_lora_to_model
from qwix._src.providers.odml import OdmlConversionProvider, OdmlQatProvider
from qwix._src.providers.ptq import PtqProvider
from qwix._src.providers.qt import QtProvider, QtRule
from qwix._src.qconfig import QuantizationProvider, QuantizationRule, get_current_rule
from qwix._src.quantize_params import quantize_params, quantize_stream
from qwix._src.report import Report, report
from qwix._src.rules import load_rules
from qwix._src.shardings import device_bytes, shardings
from qwix._src.utils.flax_util import QuantStat
from qwix._src.with_aux import WithAux
from qwix.version import __version__

__all__ = [
    "BoxedParamProvider",
    "ExponentialMovingAverage",
    "HowToQuantize",
    "LoraProvider",
    "LoraRule",
    "OdmlConversionProvider",
    "OdmlQatProvider",
    "PtqProvider",
    "QArray",
    "QtProvider",
    "QtRule",
    "QuantStat",
    "QuantizationProvider",
    "QuantizationRule",
    "Report",
    "SimpleMovingAverage",
    "SparsityRule",
    "TransposedQArray",
    "WithAux",
    "__version__",
    "apply_lora_to_model",
    "conv_general_dilated",
    "dequantize",
    "device_bytes",
    "dot",
    "dot_general",
    "einsum",
    "get_current_rule",
    "is_quantized",
    "load_rules",
    "ops",
    "quantize",
    "quantize_model",
    "quantize_params",
    "quantize_stream",
    "ragged_dot",
    "ragged_dot_general",
    "report",
    "shardings",
    "transpose_qarray",
]
