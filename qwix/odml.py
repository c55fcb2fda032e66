"""On-device ML: JAX functions as `.tflite` files, integer where they are marked, by LiteRT's own converter.

`convert` needs ai-edge-litert and litert-converter, what is done with a `TfliteModel` the first of them; the
message of the ImportError says how to install them. `fake_quant` needs neither.
"""

from qwix._src.odml_convert import Signature, convert
from qwix._src.odml_fake_quant import fake_quant
from qwix._src.odml_integer_io import with_integer_io
from qwix._src.odml_model import Op, Summary, TfliteModel

__all__ = ["Op", "Signature", "Summary", "TfliteModel", "convert", "fake_quant", "with_integer_io"]
