"""Quantization inside your own Pallas kernels: `import qwix.pallas as qpl`.

`pallas_call` takes QArrays where Pallas takes arrays. `dot_general`, `dot` and `einsum` are for the kernel's
body, on loaded blocks: they unroll over tiles and use nothing that a kernel cannot lower. `get_current_rule`
tells a kernel's caller which rule applies to it in the quantized model that is running.

>>> import jax, jax.numpy as jnp
>>> import qwix.pallas as qpl
>>> w = qpl.quantize(jnp.ones((256, 128)), "int8", channelwise_axes=[1], tiled_axes={0: 128})
>>> def kernel(x_ref, w_ref, out_ref):
...     out_ref[...] = qpl.dot(x_ref[...], w_ref[...])
>>> matmul = qpl.pallas_call(kernel, jax.ShapeDtypeStruct((8, 128), jnp.float32), interpret=True)
>>> matmul(jnp.ones((8, 256)), w).shape
(8, 128)
"""

import functools

from qwix._src.core import dot_general as _dot_general
from qwix._src.core import einsum as _einsum
from qwix._src.core.loop_dot_general import loop_dot_general as dot_general
from qwix._src.core.pallas import pallas_call
from qwix._src.core.qarray import QArray, dequantize
from qwix._src.core.qarray import quantize_api as quantize
from qwix._src.qconfig import get_current_rule

dot = functools.partial(_dot_general.dot, _qwix_dot_general=dot_general)
einsum = functools.partial(_einsum.einsum, _qwix_dot_general=dot_general)

__all__ = [
    "QArray",
    "dequantize",
    "dot",
    "dot_general",
    "einsum",
    "get_current_rule",
    "pallas_call",
    "quantize",
]
