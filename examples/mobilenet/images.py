"""Photographs that Python packages carry, as the network wants them. None has a label from ImageNet.

Some are nothing that ImageNet has a class for (text, cells, a galaxy field), where the float model itself is
unsure: they are the hard ones to agree with it about.
"""

import functools
import importlib.util
import pathlib

import numpy as np
from PIL import Image

SIZE, RESIZED = 224, 256
# Of ImageNet's pixels in [0, 1], by channel.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Package and folder of the files.
FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
INSTALL = {"skimage": "scikit-image", "sklearn": "scikit-learn"}
FILES = {
    "astronaut": ("skimage", "astronaut.png"),
    "bricks": ("skimage", "brick.png"),
    "camera": ("skimage", "camera.png"),
    "cat": ("skimage", "chelsea.png"),
    "cells": ("skimage", "ihc.png"),
    "clock": ("skimage", "clock_motion.png"),
    "coffee": ("skimage", "coffee.png"),
    "coins": ("skimage", "coins.png"),
    "galaxies": ("skimage", "hubble_deep_field.jpg"),
    "grass": ("skimage", "grass.png"),
    "gravel": ("skimage", "gravel.png"),
    "moon": ("skimage", "moon.png"),
    "motorcycle": ("skimage", "motorcycle_left.png"),
    "retina": ("skimage", "retina.jpg"),
    "rocket": ("skimage", "rocket.jpg"),
    "text": ("skimage", "page.png"),
    "temple": ("sklearn", "china.jpg"),
    "flower": ("sklearn", "flower.jpg"),
}


def find_file(name: str) -> pathlib.Path:
    """The file of a sample image; the packages themselves are not imported."""
    package, file = FILES[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"The image {name!r} is not installed: run `pip install {INSTALL[package]}`."
        )
    return pathlib.Path(spec.submodule_search_locations[0]) / FOLDERS[package] / file


def read(path: pathlib.Path, size: int = SIZE) -> np.ndarray:
    """An image as ImageNet's are evaluated: its centre at about 7/8 of the shorter side.

    Returns:
      float32 `[size, size, 3]`, each channel less ImageNet's mean and divided by its standard deviation.
    """
    with Image.open(path) as file:
        image = file.convert("RGB")
    scale = size * RESIZED / SIZE / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
    return (pixels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)


@functools.cache
def load(size: int = SIZE) -> np.ndarray:
    """All sample images, float32 `[images, size, size, 3]`, in the order of FILES."""
    return np.stack([read(find_file(name), size) for name in FILES])


def for_calibration(size: int = SIZE) -> np.ndarray:
    """What static scales are found on: the images in the mirror, so that none of them is scored."""
    return load(size)[:, :, ::-1].copy()
