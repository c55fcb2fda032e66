"""Adapters in the layout of Hugging Face PEFT: adapter_model.safetensors and adapter_config.json.

A weight of any number of axes is a matrix to PEFT, [features out, features in], and each layer a module of
its own. So arrays are flattened and transposed on the way out, and shaped like those of the model on the way
in; where layers or experts are stacked, the first axes count them.

  here                                   there, under base_model.model.<module>.
  a (in.., rank)                         lora_A.weight [rank, in]
  b (rank, out..)                        lora_B.weight [out, rank]
  a (rows, rank) of an embedding         lora_embedding_A [rank, rows]
  b (rank, features..)                   lora_embedding_B [features, rank]
  a (kh, kw, in, rank) of a convolution  lora_A.weight [rank, in, kh, kw]
  b (rank, out)                          lora_B.weight [out, rank, 1, 1]
  m (out..)                              lora_magnitude_vector [out], [1, out, 1, 1] of a convolution
"""

from __future__ import annotations

import json
import math
import os
import string
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from qwix._src import lora_files
from qwix._src.lora_files import ADAPTER_NAME, Adapters
from qwix._src.lora_peft_config import CONFIG_FILE, PeftConfig, read_peft_config

Kind = Literal["linear", "embedding", "conv"]
Names = Mapping[str, str] | Callable[[str], str]
Kinds = Mapping[str, Kind] | Callable[[str], Kind]

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEYS = {
    "linear": {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"},
    "embedding": {"a": "lora_embedding_A", "b": "lora_embedding_B", "m": "lora_magnitude_vector"},
}
_KEYS["conv"] = _KEYS["linear"]
_SUFFIXES = sorted({f".{suffix}" for keys in _KEYS.values() for suffix in keys.values()})


def save_peft(
    directory: str | os.PathLike[str],
    model_or_params: Any,
    *,
    config: PeftConfig,
    names: Names | None = None,
    kinds: Kinds | None = None,
) -> PeftConfig:
    """Writes adapters so that PEFT's `PeftModel.from_pretrained(base, directory)` loads them.

    Args:
      directory: made if it isn't there; an adapter that is there is replaced.
      model_or_params: a model with adapters, its params, or what `adapters_of` returned.
      config: alpha, scaling and the like; ranks that differ from its `r` and modules that it doesn't name are
        filled in.
      names: from the path of a weight, "layers/0/attn/q_proj/kernel", to the module of the PyTorch model,
        "model.layers.0.self_attn.q_proj": a dict, or a function. A `{}` in it stands for the index along a
        leading axis, of stacked layers or experts. By default the path without its last part, with dots.
      kinds: what a module is to PyTorch, "linear", "embedding" or "conv", by the path of the weight; by
        default a weight called `embedding` is one, and where A has four axes it's a convolution.

    Returns: the config as it was written.

    Raises:
      ValueError: no adapters; a weight that `names` doesn't know; magnitudes that don't go with the config's
        `use_dora`, or an NNX model's alpha with its `lora_alpha`; adapters of a grouped convolution, which
        PEFT computes otherwise.
    """
    weights = _by_weight(lora_files.flat(lora_files.adapters_of(model_or_params)))
    specs = _specs(model_or_params)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for weight, parts in weights.items():
        _check_dora(weight, parts, config)
        kind = _kind(weight, parts, names, kinds)
        for module, one in _modules(weight, parts, names):
            _check_scaling(weight, module, specs.get(weight), config, one["a"].shape[-1])
            if module in ranks:
                raise ValueError(
                    f"names gives {module!r} to {weight!r} and to another weight. Stacked layers need a "
                    "'{}' for their number."
                )
            ranks[module] = one["a"].shape[-1]
            for part, array in one.items():
                tensors[f"{_PREFIX}{module}.{_KEYS[kind][part]}"] = _to_peft(weight, kind, part, array)
    config = config.completed(ranks)
    target = lora_files.as_path(directory)
    lora_files.write_safetensors(target / WEIGHTS_FILE, tensors, {"format": "pt"})
    (target / CONFIG_FILE).write_text(json.dumps(config.to_json(), indent=2, sort_keys=True))
    return config


def load_peft(
    directory: str | os.PathLike[str], template: Any, *, names: Names | None = None
) -> tuple[Adapters, PeftConfig]:
    """Reads an adapter that PEFT wrote, for `with_adapters`.

    Args:
      directory: with adapter_model.safetensors and adapter_config.json.
      template: the model that the adapters are for, with adapters of its own, or its params, also abstract:
        their shapes are those that the arrays get. `read_peft_config` gives the ranks to make it with.
      names: as of `save_peft`.

    Returns: (nested dict of numpy arrays, config).

    Raises:
      FileNotFoundError: no adapter there.
      ValueError: a config that says what can't be done here; modules that the model has no adapters for, or
        the other way round; arrays of other shapes or ranks; another alpha than an NNX model's.
    """
    config = read_peft_config(directory)
    source = lora_files.as_path(directory) / WEIGHTS_FILE
    if not source.exists():
        raise FileNotFoundError(
            f"There is no {WEIGHTS_FILE} in {str(directory)!r}. (An adapter_model.bin is a pickle, which "
            "isn't read; PEFT writes it anew with save_pretrained.)"
        )
    stored = _by_module(lora_files.read_safetensors(source)[0])
    weights = _by_weight(lora_files.flat(lora_files.adapters_of(template)))
    specs = _specs(template)
    out: dict[str, np.ndarray] = {}
    used: set[str] = set()
    for weight, parts in weights.items():
        _check_dora(weight, parts, config)
        modules = dict(_modules(weight, parts, names))
        used |= set(modules)
        for part, like in parts.items():
            layers = [_from_peft(m, weight, part, stored, one[part].shape) for m, one in modules.items()]
            out[f"{weight}_lora_{part}"] = np.stack(layers).reshape(like.shape)
        for module in modules:
            _check_scaling(weight, module, specs.get(weight), config, config.rank_of(module))
    others = sorted(set(stored) - used)
    if others:
        raise ValueError(
            f"The adapter changes {others[0]!r} ({len(others)} such modules), which is no weight with an "
            "adapter here. Does `names` give the right names, or should a rule's module_path match more?"
        )
    return lora_files.nested(out), config


def _by_weight(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{path of the weight: {"a": array, "b": array, maybe "m": array}}."""
    weights: dict[str, dict[str, Any]] = {}
    for path, value in sorted(leaves.items()):
        match = ADAPTER_NAME.fullmatch(path)
        if match is None:
            raise ValueError(f"{path!r} is no adapter: their names end in _lora_a, _lora_b or _lora_m.")
        weights.setdefault(match["weight"], {})[match["part"]] = value
    if not weights:
        raise ValueError(
            "There are no adapters. Make them first: qwix.apply_lora_to_model(model, provider, *inputs)."
        )
    for weight, parts in weights.items():
        if not {"a", "b"} <= set(parts):
            raise ValueError(f"The adapter of {weight!r} has {sorted(parts)}, but needs both a and b.")
    return weights


def _name(weight: str, names: Names | None) -> str:
    if names is None:
        return weight.rpartition("/")[0].replace("/", ".")
    if callable(names):
        return names(weight)
    if weight not in names:
        raise ValueError(
            f"names has no {weight!r}; the nearest that it has is {lora_files.nearest(weight, names)!r}."
        )
    return names[weight]


def _modules(
    weight: str, parts: Mapping[str, Any], names: Names | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(module of PyTorch, its adapter) of every layer or expert that a weight holds.

    Arrays without data give `np.broadcast_to` ones, which have a shape and take no memory.
    """
    name = _name(weight, names)
    levels = sum(field is not None for _, field, _, _ in string.Formatter().parse(name))
    if levels >= parts["a"].ndim - 1:
        raise ValueError(
            f"names gives {name!r} to {weight!r}, with {levels} leading axes; A has the shape "
            f"{tuple(parts['a'].shape)}."
        )
    sizes = tuple(parts["a"].shape[:levels])
    arrays = {part: _readable(x) for part, x in parts.items()}
    for index in np.ndindex(sizes):
        yield name.format(*index), {part: x[index] for part, x in arrays.items()}


def _readable(x: Any) -> np.ndarray:
    return np.asarray(x) if hasattr(x, "__array__") else np.broadcast_to(np.zeros((), x.dtype), x.shape)


def _kind(weight: str, parts: Mapping[str, Any], names: Names | None, kinds: Kinds | None) -> Kind:
    if kinds is not None:
        kind = kinds(weight) if callable(kinds) else kinds.get(weight)
        if kind is not None and kind not in _KEYS:
            raise ValueError(f"kinds gives {kind!r} to {weight!r}; it must be one of {sorted(_KEYS)}.")
        if kind is not None:
            return kind
    if weight.rpartition("/")[2] == "embedding":
        return "embedding"
    _, first = next(_modules(weight, parts, names))
    return "conv" if first["a"].ndim == 4 else "linear"


def _check_dora(weight: str, parts: Mapping[str, Any], config: PeftConfig) -> None:
    if ("m" in parts) != config.use_dora:
        has = "has" if "m" in parts else "hasn't"
        raise ValueError(
            f"The config has use_dora={config.use_dora}, but the adapter of {weight!r} {has} magnitudes. "
            "Make the model by a rule with the same use_dora."
        )


def _specs(model: Any) -> dict[str, Any]:
    """{path of the weight: the facts of its adapter}, as far as the model knows them."""
    provider = getattr(type(model), "_qwix_provider", None)
    return {"/".join(map(str, key)): spec for key, spec in getattr(provider, "adapters", {}).items()}


def _check_scaling(weight: str, module: str, spec: Any, config: PeftConfig, rank: int) -> None:
    scaling = config.scaling_of(module, rank)
    if spec is not None and not math.isclose(spec.scaling, scaling, rel_tol=1e-6):
        raise ValueError(
            f"The config multiplies the change of {module!r} by {scaling:.6g} (lora_alpha="
            f"{config.alpha_of(module)}, rank {rank}, use_rslora={config.use_rslora}), but the model that of "
            f"{weight!r} by {spec.scaling:.6g}. Give both the same alpha."
        )


def _to_peft(weight: str, kind: Kind, part: str, x: np.ndarray) -> np.ndarray:
    """One array of one module as PEFT has it."""
    if part == "m":
        return x.reshape(1, -1, *(1,) * 2) if kind == "conv" else x.reshape(-1)
    if kind != "conv":
        return x.reshape(-1, x.shape[-1]).T if part == "a" else x.reshape(x.shape[0], -1).T
    if part == "a":
        return np.moveaxis(x, (-1, -2), (0, 1))
    if x.ndim != 2:
        raise ValueError(
            f"The convolution {weight!r} has groups, each with an adapter of its own (B has the shape "
            f"{x.shape}); PEFT's are of another form. Merge the adapter, or leave the convolution out."
        )
    return x.T[..., None, None]


def _from_peft(
    module: str,
    weight: str,
    part: str,
    stored: Mapping[str, Mapping[str, np.ndarray]],
    shape: tuple[int, ...],
) -> np.ndarray:
    """One array of one module, shaped like the model's."""
    if module not in stored:
        raise ValueError(
            f"The adapter has nothing for {module!r}, which is {weight!r} here; the nearest that it has is "
            f"{lora_files.nearest(module, stored)!r}. Does `names` give the right names, or should a rule's "
            "module_path match less?"
        )
    found = [stored[module][keys[part]] for keys in _KEYS.values() if keys[part] in stored[module]]
    if not found:
        raise ValueError(f"The adapter of {module!r} has no {part.upper()}, only {sorted(stored[module])}.")
    x = found[0]
    if part == "a" and x.ndim > 2:
        y = np.moveaxis(x, (0, 1), (-1, -2))
        fits = y.shape == shape
    else:
        y = x.reshape(-1) if part == "m" else x.T if part == "a" else x.reshape(x.shape[0], -1).T
        fits = y.shape == _matrix(part, shape)
    if not fits:
        raise ValueError(_misfit(module, weight, part, x.shape, shape))
    return y.reshape(shape)


def _matrix(part: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a, b or m with all features flattened."""
    if part == "m":
        return (math.prod(shape),)
    return (math.prod(shape[:-1]), shape[-1]) if part == "a" else (shape[0], math.prod(shape[1:]))


def _misfit(module: str, weight: str, part: str, stored: Sequence[int], shape: Sequence[int]) -> str:
    rank = {"a": shape[-1], "b": shape[0]}.get(part)
    theirs = {"a": stored[0], "b": stored[1] if len(stored) > 1 else None}.get(part)
    have = f"{part.upper()} of {module!r} has the shape {list(stored)} in the adapter"
    text = f"{have}, but {weight!r} here wants "
    if rank != theirs:
        return f"{text}rank {rank}, not {theirs}. Make the model with rank={theirs} for this module."
    return f"{text}{tuple(shape)}. Is the adapter for another model, or does `names` mix up modules?"


def _by_module(tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """{module: {what follows it in the key: array}}."""
    modules: dict[str, dict[str, np.ndarray]] = {}
    for key, value in tensors.items():
        name = key.removeprefix(_PREFIX)
        suffix = next((s for s in _SUFFIXES if name.endswith(s)), None)
        if suffix is not None:
            modules.setdefault(name.removesuffix(suffix), {})[suffix[1:]] = value
        elif ".base_layer." in name:
            warnings.warn(
                f"The adapter also holds {name!r}, a weight of the base model, which isn't loaded.",
                stacklevel=3,
            )
        else:
            raise ValueError(
                f"The adapter holds {key!r}, which isn't LoRA's. Known are base_model.model.<module> with "
                f"{', '.join(_SUFFIXES)}."
            )
    return modules
