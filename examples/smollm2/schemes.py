"""What is quantized how, and what each scheme must reach.

Only the linear layers are quantized, by one rule; the tied embedding stays float32, so a ratio of bytes here
is one of linear weights. The limits on perplexity allow for plain rounding to the nearest value with absolute
maxima as scales, and little more: a subtly wrong implementation misses them.
"""

import dataclasses
from typing import Any

import qwix

LINEAR = r"layers/\d+/(attention|mlp)/\w+_proj"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way to quantize the model.

    Attributes:
      title: for people.
      rule: fields of `qwix.QuantizationRule` beside the path; None leaves the model float.
      perplexity: lowest and highest that pass.
      ratio: highest bytes of the linear weights, scales included, over those in float32.
      names_paris: whether the answer has to name the capital of France.
    """

    title: str
    rule: dict[str, Any] | None = None
    perplexity: tuple[float, float]
    ratio: float = 1.0
    names_paris: bool = False

    def rules(self) -> list[qwix.QuantizationRule]:
        if self.rule is None:
            return []
        return [qwix.QuantizationRule(module_path=LINEAR, **self.rule)]


# Of the float model. No quantized one does better; without that as a lower limit, a scheme that looks ahead
# in the text would pass.
FLOAT_PERPLEXITY = 19.40

SCHEMES = {
    "float": Scheme(title="float32", perplexity=(19.35, 19.45), names_paris=True),
    "int8": Scheme(
        title="int8 weights, one scale per column",
        rule={"weight_qtype": "int8"},
        perplexity=(FLOAT_PERPLEXITY, 19.6),
        ratio=0.27,
        names_paris=True,
    ),
    "w8a8": Scheme(
        title="int8 weights and activations, scales of activations per token on the fly",
        rule={"weight_qtype": "int8", "act_qtype": "int8"},
        perplexity=(FLOAT_PERPLEXITY, 20.4),
        ratio=0.27,
        names_paris=True,
    ),
    "fp8": Scheme(
        title="float8_e4m3fn weights and activations",
        rule={"weight_qtype": "float8_e4m3fn", "act_qtype": "float8_e4m3fn"},
        perplexity=(FLOAT_PERPLEXITY, 20.0),
        ratio=0.27,
        names_paris=True,
    ),
    "int4": Scheme(
        title="int4 weights in tiles of 64",
        rule={"weight_qtype": "int4", "tile_size": 64},
        perplexity=(FLOAT_PERPLEXITY, 31.0),
        ratio=0.16,
    ),
    "nf4": Scheme(
        title="nf4 weights in tiles of 64",
        rule={"weight_qtype": "nf4", "tile_size": 64},
        perplexity=(FLOAT_PERPLEXITY, 25.8),
        ratio=0.16,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What one scheme came to; the fields of the JSON file."""

    perplexity: float
    device_mb: float  # of the whole model, 10^6 bytes
    linear_weight_ratio: float
    answer: str
    seconds: float


def shortfalls(name: str, result: Result, harder: float = 1.0) -> list[str]:
    """What of its scheme's demands a result misses, in words; empty when it meets them all.

    Args:
      name: of the scheme.
      result: what it came to.
      harder: perplexity of the float model on the text at hand, over that on the text of the limits.

    Example:
      >>> bad = Result(perplexity=27.0, device_mb=1.0, linear_weight_ratio=0.14, answer="", seconds=1.0)
      >>> shortfalls("nf4", bad)
      ['nf4: perplexity is 27.000, must be within 19.40..25.80']
    """
    scheme, found = SCHEMES[name], []
    low, high = (limit * harder for limit in scheme.perplexity)
    if not low <= result.perplexity <= high:
        found.append(f"{name}: perplexity is {result.perplexity:.3f}, must be within {low:.2f}..{high:.2f}")
    if not result.linear_weight_ratio <= scheme.ratio:
        ratio = result.linear_weight_ratio
        found.append(f"{name}: linear weights take {ratio:.4f} of float32, must be at most {scheme.ratio}")
    if scheme.names_paris and "Paris" not in result.answer:
        found.append(f"{name}: the answer is {result.answer!r}, must name Paris")
    return found
