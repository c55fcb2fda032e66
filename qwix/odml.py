"""On-device ML: models and JAX functions as `.tflite` files, integer where they are quantized or marked.

    model = qwix.quantize_model(model, qwix.OdmlQatProvider(rules), x)
    odml.calibrate(model, batches)
    file = odml.export(model, sample_inputs=x)

Files are made by LiteRT's own converter: `export` and `convert` need ai-edge-litert and litert-converter,
what is done with a `TfliteModel` the first of them; the message of the ImportError says how to install them.
`calibrate` and `fake_quant` need neither.
"""

from qwix._src.odml_calibrate import calibrate
from qwix._src.odml_convert import Signature, convert
from qwix._src.odml_export import export
from qwix._src.odml_fake_quant import fake_quant
from qwix._src.odml_integer_io import with_integer_io
from qwix._src.odml_model import Op, Summary, TfliteModel

__all__ = [
    "Op",
    "Signature",
    "Summary",
    "TfliteModel",
    "calibrate",
    "convert",
    "export",
    "fake_quant",
    "with_integer_io",
]
