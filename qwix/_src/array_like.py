"""What stands in the place of a param's array and computes like it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import jax


class ArrayLike:
    """Has the operators and the attributes of the array that `__jax_array__` gives."""

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def __jax_array__(self) -> jax.Array:
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __getitem__(self, index: Any) -> Any:
        value = self.__jax_array__()
        return value if index is Ellipsis else value[index]

    def get_value(self) -> jax.Array:
        """The float weight, as of an nnx.Param."""
        return self.__jax_array__()

    def __getattr__(self, name: str) -> Any:
        if hasattr(type(self), name):  # a property of ours failed: show its own error
            return object.__getattribute__(self, name)
        # `T`, `reshape`, `sum` and the like: those of an array.
        if name.startswith("_") or not hasattr(jax.Array, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.__jax_array__(), name)

    def __len__(self) -> int:
        return self.shape[0]


def _binary(op: Callable[[Any, Any], Any], reflected: bool) -> Callable[[ArrayLike, Any], Any]:
    if reflected:
        return lambda self, other: op(other, self.__jax_array__())
    return lambda self, other: op(self.__jax_array__(), other)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
    setattr(ArrayLike, f"__{_name}__", _binary(getattr(operator, _name), reflected=False))
    setattr(ArrayLike, f"__r{_name}__", _binary(getattr(operator, _name), reflected=True))
ArrayLike.__neg__ = lambda self: -self.__jax_array__()
ArrayLike.__abs__ = lambda self: abs(self.__jax_array__())
