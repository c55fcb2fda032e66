"""What is quantized how, and what each scheme must reach.

All convolutions and the classifier are quantized, the depthwise ones and the first included; biases stay
float32. There are no labels: a scheme is judged by its scores beside those of the float model, on images of
which a third show nothing that ImageNet knows. Limits are for the model after correct.py; what plain rounding
comes to is reported next to it.
"""

import dataclasses
from typing import Any

import qwix


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way to quantize the model.

    Attributes:
      title: for people.
      rules: fields of `qwix.QuantizationRule`, of the first rule that fits; None leaves the model float.
      sqnr_db: lowest ratio of the scores' signal to their quantization noise.
      agreement: lowest share of images with the float model's likeliest class.
      ratio: highest bytes of the weights, scales included, over those in float32.
    """

    title: str
    rules: tuple[dict[str, Any], ...] | None = None
    sqnr_db: float
    agreement: float
    ratio: float

    def make_rules(self) -> list[qwix.QuantizationRule]:
        return [qwix.QuantizationRule(**rule) for rule in self.rules or ()]


INT8, INT4 = {"weight_qtype": "int8"}, {"weight_qtype": "int4"}
# A zero point doubles the resolution of what comes out of a ReLU; kernels of TPUs don't know it, and leave
# such convolutions to XLA.
ACT = {"act_qtype": "int8", "act_calibration_method": "minmax"}
# 3 % of the weights, and the layers that feel rounding most: they have nine products to a sum, or 27.
SMALL = {"module_path": r"stem|blocks/\d+/depthwise"}
# Tiles of input channels. 32 divides those of every other layer that has more, but for two layers of 144.
TILES = ({"module_path": "blocks/[23]/project", "tile_size": 48}, {"tile_size": 32})

SCHEMES = {
    "float": Scheme(title="float32", sqnr_db=0.0, agreement=1.0, ratio=1.0),
    "w8a8": Scheme(
        title="int8 weights by channel, int8 activations with scale and zero point by image, on the fly",
        rules=(INT8 | ACT,),
        sqnr_db=20.0,
        agreement=0.85,
        ratio=0.26,
    ),
    "w8a8_symmetric": Scheme(
        title="int8 weights by channel, int8 activations without zero points, by image, on the fly",
        rules=(INT8 | {"act_qtype": "int8"},),
        sqnr_db=14.0,
        agreement=0.8,
        ratio=0.26,
    ),
    "w8a8_static": Scheme(
        title="int8 weights by channel, int8 activations with one scale and zero point for all images",
        rules=(INT8 | ACT | {"act_static_scale": True},),
        sqnr_db=17.0,
        agreement=0.8,
        ratio=0.26,
    ),
    "w8a16": Scheme(
        title="int8 weights by channel",
        rules=(INT8,),
        sqnr_db=30.0,
        agreement=0.9,
        ratio=0.26,
    ),
    "w4a16": Scheme(
        title="int4 weights in tiles of 32 input channels; int8 in the first and the depthwise layers",
        rules=(INT8 | SMALL, *(INT4 | tile for tile in TILES)),
        sqnr_db=8.5,
        agreement=0.6,
        ratio=0.17,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What one scheme came to; the fields of the JSON file."""

    agreement: float
    sqnr_db: float | None  # None: no score differs
    plain_agreement: float  # these two without correct.py
    plain_sqnr_db: float | None
    device_mb: float  # of the whole model, 10^6 bytes
    weight_ratio: float
    quantized_layers: int
    seconds: float


LAYERS = 53  # 52 convolutions and the classifier


def shortfalls(name: str, result: Result) -> list[str]:
    """What of its scheme's demands a result misses, in words; empty when it meets them all.

    Example:
      >>> scores = {"agreement": 0.9, "sqnr_db": 18.0, "plain_agreement": 0.9, "plain_sqnr_db": 16.0}
      >>> bad = Result(**scores, device_mb=3.6, weight_ratio=0.26, quantized_layers=53, seconds=1.0)
      >>> shortfalls("w8a8", bad)
      ['w8a8: scores are 18.0 dB above their noise, must be at least 20.0']
    """
    scheme, found = SCHEMES[name], []
    layers = LAYERS if scheme.rules else 0
    if result.sqnr_db is not None and not result.sqnr_db >= scheme.sqnr_db:
        found.append(
            f"{name}: scores are {result.sqnr_db:.1f} dB above their noise, must be at least {scheme.sqnr_db}"
        )
    if not result.agreement >= scheme.agreement:
        found.append(f"{name}: agrees on {result.agreement:.3f} of the images, must on {scheme.agreement}")
    if not result.weight_ratio <= scheme.ratio:
        found.append(
            f"{name}: weights take {result.weight_ratio:.4f} of float32, must be at most {scheme.ratio}"
        )
    if result.quantized_layers != layers:
        found.append(f"{name}: {result.quantized_layers} layers are quantized, must be {layers}")
    return found
