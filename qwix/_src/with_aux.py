"""WithAux: what a converted model holds in the place of a param.

Inside a call of the quantized model it stands for the float weight (as a tracer that the ops of the model
know, see op_trace); anywhere else a jnp function gets the dequantized array.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
from flax import nnx

from qwix._src import prepack, qconfig
from qwix._src.array_like import ArrayLike
from qwix._src.core import qarray
from qwix._src.turned import Turned
from qwix._src.utils import flax_util
from qwix._src.weight import WeightInfo, tag

_ANONYMOUS = WeightInfo(None, "weight")


@flax.struct.dataclass
class WithAux[T](ArrayLike):
    """A quantized param (or a static scale), how it was quantized, and whose it is.

    Attributes:
      array: QArray whose fields carry the param's boxes (nnx.Param, linen Partitioned), a TransposedQArray of
        such fields where the weight is prepacked, or a plain scale. The `scale` of either is a DoubleScale
        where it is quantized, too.
      how: how it was quantized, in the param's own layout.
      info: the param's path and rule; None if made by hand.

    >>> import jax.numpy as jnp, qwix
    >>> how = qwix.HowToQuantize(qtype="int8", channelwise_axes=(1,))
    >>> weight = WithAux(qwix.quantize(jnp.eye(2), "int8", channelwise_axes=(1,)), how)
    >>> jnp.round(jnp.ones((1, 2)) @ weight, 2)
    Array([[1., 1.]], dtype=float32)
    """

    array: T
    how: qarray.HowToQuantize = flax.struct.field(pytree_node=False)
    info: WeightInfo | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def unboxed(self) -> Any:
        """The QArray or array, without boxes; of a weight that is stored in another form, its QArray."""
        return prepack.unpack(flax_util.unbox(self.array))

    @property
    def payload(self) -> Any:
        """`unboxed` as the ops of a quantized model get it: a weight that is stored K-major as it lies."""
        return prepack.payload(flax_util.unbox(self.array))

    @property
    def value(self) -> Any:
        """`unboxed`; inside a call of a quantized model, what stands for the float weight."""
        return self.__jax_array__() if qconfig.current_run() else self.unboxed

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(flax_util.unbox(self.array).shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the float weight."""
        return flax_util.unbox(self.array).dtype

    def __jax_array__(self) -> jax.Array:
        payload = self.payload
        is_weight = isinstance(payload, qarray.QArray | Turned)
        return tag(payload, self.info or _ANONYMOUS) if is_weight else payload


nnx.register_data_type(WithAux)
