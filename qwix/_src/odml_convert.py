"""From JAX functions to a `.tflite` file, by `jax.export` and LiteRT's own converter.

What a function has marked by `fake_quant` becomes integer. Arrays that it closes over, weights say, are
stored in the file.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

from qwix._src.odml_model import TfliteModel, needed
from qwix._src.odml_wide_bias import with_wide_biases

_ILLEGAL = re.compile(r"failed to legalize operation '([\w.]+)'")
_CALL = re.compile(r'call_target_name = "([^"]+)"')


@dataclasses.dataclass(frozen=True)
class Signature:
    """A function that a file is to offer, under a name.

    Attributes:
      fn: of arrays, or of trees of arrays.
      sample_inputs: its positional arguments, arrays or `jax.ShapeDtypeStruct`s: the shapes are fixed.
      name: which callers of the file ask for.
      input_names, output_names: of the arrays in the order of `jax.tree.leaves`. By default those of fn's
        parameters, with keys and indices appended ("batch_image"); of outputs the keys of a dict, "output"
        for one array, and "output_0" and so on for several.

    >>> import numpy as np
    >>> f = Signature(lambda x, scales: x * scales["a"], (np.ones(2), {"a": np.ones(2)}))
    >>> f.input_names, f.output_names
    (('x', 'scales_a'), ('output',))
    """

    fn: Callable[..., Any]
    sample_inputs: tuple[Any, ...]
    name: str = "serving_default"
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        inputs = jax.tree_util.tree_flatten_with_path(tuple(self.sample_inputs))[0]
        for _, x in inputs:
            if not hasattr(x, "shape") or not hasattr(x, "dtype"):
                raise TypeError(
                    f"The sample inputs of {self.name!r} hold {x!r}, a {type(x).__name__}. Give arrays; what "
                    "is static belongs into the function: functools.partial(fn, flag=True)."
                )
            if not all(isinstance(n, int) for n in x.shape):
                raise ValueError(f"An input of {self.name!r} has the shape {x.shape}; sizes must be numbers.")
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype)),
            tuple(self.sample_inputs),
        )
        object.__setattr__(self, "sample_inputs", shapes)
        names = _parameters(self.fn, len(shapes))
        given = [_text([names[path[0].idx], *path[1:]]) for path, _ in inputs]
        made = self._jitted.eval_shape(*jax.tree.leaves(shapes))
        outputs = jax.tree_util.tree_flatten_with_path(made)[0]
        made = ["_".join(filter(None, ("" if _is_key(p) else "output", _text(p)))) for p, _ in outputs]
        self._set("input_names", given)
        self._set("output_names", made)

    @functools.cached_property
    def _jitted(self) -> Any:
        """fn of the leaves of its inputs. It is one object, so that JAX traces it once."""
        tree = jax.tree.structure(self.sample_inputs)
        return jax.jit(lambda *leaves: self.fn(*jax.tree.unflatten(tree, leaves)), keep_unused=True)

    def program(self) -> str:
        """The function as a StableHLO module, of the leaves of its inputs."""
        exported = jax.export.export(self._jitted, platforms=["cpu"])
        return exported(*jax.tree.leaves(self.sample_inputs)).mlir_module()

    def _set(self, field: str, default: Sequence[str]) -> None:
        names = getattr(self, field)
        names = tuple(default if names is None else names)
        if len(names) != len(default) or len(set(names)) != len(names):
            raise ValueError(f"{field} of {self.name!r} must be {len(default)} different ones, got {names}.")
        object.__setattr__(self, field, names)


def _is_key(path: Sequence[Any]) -> bool:
    return bool(path) and isinstance(path[0], DictKey | GetAttrKey)


def _text(path: Sequence[Any]) -> str:
    """ "batch_image_0" of the keys on a path."""
    parts = []
    for key in path:
        key = key.key if isinstance(key, DictKey) else key.name if isinstance(key, GetAttrKey) else key
        parts.append(str(key.idx if isinstance(key, SequenceKey) else key))
    return "_".join(re.sub(r"\W", "_", part) for part in parts)


def _parameters(fn: Callable[..., Any], count: int) -> list[str]:
    """The names of the first parameters; input_0 and so on where fn has none."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = [p.name for p in inspect.signature(fn).parameters.values() if p.kind in kinds][:count]
    return [*found, *(f"input_{i}" for i in range(len(found), count))]


def convert(*signatures: Signature, strict: bool = False) -> TfliteModel:
    """One file that offers these functions.

    Args:
      signatures: one or several, of different names.
      strict: a float op in a program that has quantized ones is an error; by default a warning names it.

    Raises:
      ImportError: LiteRT's packages are not installed; the message says how.
      ValueError: an op that the converter lacks, two signatures of one name, or with `strict` float ops.

    >>> import numpy as np
    >>> from qwix.odml import fake_quant
    >>> f = lambda x: fake_quant(jax.numpy.tanh(fake_quant(x, 0.02)), 1 / 128)
    >>> model = convert(Signature(f, (np.ones((2, 4), np.float32),)))  # doctest: +SKIP
    >>> [op.name for op in model.summary().ops]  # doctest: +SKIP
    ['QUANTIZE', 'TANH', 'DEQUANTIZE']
    """
    model = run_converter(signatures)
    if message := floats_beside_integers(model):
        if strict:
            raise ValueError(f"{message} Mark what they read and write by fake_quant, or leave out strict.")
        warnings.warn(message, stacklevel=2)
    return model


def run_converter(signatures: Sequence[Signature]) -> TfliteModel:
    """`convert` without a look at what came out."""
    names = [one.name for one in signatures]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"convert takes signatures of different names, at least one; got {names}.")
    api, mlir, manager = converter()
    config = api.ConvertToTFLConfig()
    config.strict_qdq_mode = True  # else what is between two fake_quants stays float
    with mlir.Context() as context:
        api.prepare_mlir_context(context)
        modules = []
        for one in signatures:
            modules.append(mlir.Module.parse(one.program()))
            api.set_signature(modules[-1].operation, one.name, one.input_names, one.output_names)
        module = modules[0] if len(modules) == 1 else api.merge_modules(modules)
        try:
            api.run_convert_to_tfl_passes(module, manager.PassManager(), config)
            return with_wide_biases(TfliteModel(api.export_flatbuffer_to_bytes(module.operation)))
        except ValueError as error:
            raise ValueError(_refused(names, str(error))) from error


def converter() -> tuple[Any, Any, Any]:
    """LiteRT's converter, its MLIR and its passes. Raises ImportError that says how to install them."""
    modules = ("converter_api_ext", "mlir.ir", "mlir.passmanager")
    api, mlir, manager = (needed(f"litert_converter.{name}") for name in modules)
    return api, mlir, manager


def floats_beside_integers(model: TfliteModel) -> str:
    """Names the float ops of programs that have quantized ones; empty if there are none."""
    summary = model.summary()
    quantized = {op.signature for op in summary.ops if op.name == "QUANTIZE"}
    floats = [op for op in summary.float_ops if op.signature in quantized]
    if not floats:
        return ""
    where = ", ".join(sorted({f"{op.name} in {op.signature!r}" for op in floats}))
    return f"{len(floats)} float op{'s' * (len(floats) > 1)} beside quantized ones: {where}."


def _refused(names: Sequence[str], error: str) -> str:
    ops = sorted({*_ILLEGAL.findall(error), *_CALL.findall(error)})
    what = f"the ops {', '.join(ops)}" if ops else "an op of it"
    which = ", ".join(names)
    return f"LiteRT's converter can't convert {which}: it has no form of {what}. It says: {error[:500]}"
