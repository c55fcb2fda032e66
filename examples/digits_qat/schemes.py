"""What is quantized how while training, and what each scheme must reach.

Quantization-aware training (QAT) quantizes the forward pass and differentiates straight through the rounding;
quantized training (QT) also quantizes the gradients that the backward matmuls and convolutions take. The
limits are in points of test accuracy below the float model, averaged over the seeds, and for the auto-encoder
in percent of its loss above the float one's.
"""

import dataclasses
from typing import Any

import qwix


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way to train.

    Attributes:
      title: for people.
      rule: fields of `qwix.QtRule`; None trains in float.
      accuracy_drop: greatest loss of accuracy against float that passes, in points.
      loss_rise: greatest rise of the auto-encoder's loss against float that passes, in percent.
      beats_float_ptq: whether training has to be at least as good as quantizing the float model.
    """

    title: str
    rule: dict[str, Any] | None = None
    accuracy_drop: float = 0.0
    loss_rise: float = 0.0
    beats_float_ptq: bool = False

    def provider(self) -> qwix.QtProvider | None:
        return None if self.rule is None else qwix.QtProvider([qwix.QtRule(**self.rule)])


W8A8 = {"weight_qtype": "int8", "act_qtype": "int8"}
W4A8_STATIC = {"weight_qtype": "int4", "act_qtype": "int8", "act_static_scale": True}

SCHEMES = {
    "float": Scheme(title="float32"),
    "qat_int8": Scheme(title="QAT, W8A8", rule=W8A8, accuracy_drop=0.5, loss_rise=1.0),
    "qat_w4a8": Scheme(
        title="QAT, W4A8, static activation range",
        rule=W4A8_STATIC,
        accuracy_drop=1.5,
        loss_rise=3.0,
        beats_float_ptq=True,
    ),
    "qt_int8": Scheme(
        title="QT, int8 forward and backward",
        rule={**W8A8, "bwd_qtype": "int8"},
        accuracy_drop=1.0,
        loss_rise=2.0,
    ),
    "qt_fp8": Scheme(
        title="QT, e4m3 forward, e5m2 backward",
        rule={
            "weight_qtype": "float8_e4m3fn",
            "act_qtype": "float8_e4m3fn",
            "bwd_qtype": "float8_e5m2",
        },
        accuracy_drop=1.0,
        loss_rise=2.0,
    ),
}
