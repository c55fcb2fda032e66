"""A `.tflite` file whose inputs and outputs are the integers themselves.

A converted program starts by quantizing its inputs and ends by dequantizing its outputs. A camera gives
integers, and a microcontroller may have no floats: those ops are taken out, and the tensors behind them,
which know their scales and zero points, become the program's inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from qwix._src.odml_model import TfliteModel, needed, op_names


def with_integer_io(model: TfliteModel) -> TfliteModel:
    """The same file without the QUANTIZE ops of its inputs and the DEQUANTIZE ops of its outputs.

    `TfliteModel.quantization` says what the integers stand for.

    Raises:
      ValueError: an input or an output that is used, or made, otherwise; the message names it.
      ImportError: ai-edge-litert is not installed.

    >>> from qwix.odml import Signature, convert, fake_quant
    >>> import jax.numpy as jnp
    >>> f = Signature(lambda x: fake_quant(jnp.tanh(fake_quant(x, 0.5)), 1 / 128), (jnp.ones(3),))
    >>> with_integer_io(convert(f)).run({"x": jnp.array([-1, 0, 1], jnp.int8)})  # doctest: +SKIP
    {'output': array([-59,   0,  59], dtype=int8)}
    """
    schema, flatbuffers = needed("ai_edge_litert.schema_py_generated"), needed("flatbuffers")
    file = schema.ModelT.InitFromPackedBuf(model.content, 0)
    names = op_names(file)
    for one in file.signatureDefs:
        graph, key = file.subgraphs[one.subgraphIndex], one.signatureKey.decode()
        # All tensors are looked up before ops go, so that an error leaves nothing half done.
        inner = {i.tensorIndex: _behind_input(graph, names, i, key) for i in one.inputs}
        outer = {o.tensorIndex: _behind_output(graph, names, o, key) for o in one.outputs}
        for items, places in ((one.inputs, inner), (one.outputs, outer)):
            for item in items:
                item.tensorIndex = places[item.tensorIndex].tensor
        graph.inputs = [inner[i].tensor for i in graph.inputs]
        graph.outputs = [outer[i].tensor for i in graph.outputs]
        gone = [place.op for place in (*inner.values(), *outer.values())]
        graph.operators = [op for op in graph.operators if not any(op is other for other in gone)]
    builder = flatbuffers.Builder(len(model.content))
    builder.Finish(file.Pack(builder), b"TFL3")
    return TfliteModel(bytes(builder.Output()))


class _Place(NamedTuple):
    """An op that goes, and the tensor of integers on its other side."""

    op: Any
    tensor: int


def _behind_input(graph: Any, names: Sequence[str], item: Any, key: str) -> _Place:
    users = [op for op in graph.operators if item.tensorIndex in op.inputs]
    kinds = [names[op.opcodeIndex] for op in users]
    if kinds != ["QUANTIZE"]:
        raise ValueError(
            f"The input {item.name.decode()!r} of {key!r} is read by {kinds}, so it can't be an integer. "
            "Give all that reads it one fake_quant of it."
        )
    return _Place(users[0], int(users[0].outputs[0]))


def _behind_output(graph: Any, names: Sequence[str], item: Any, key: str) -> _Place:
    makers = [op for op in graph.operators if item.tensorIndex in op.outputs]
    users = [op for op in graph.operators if item.tensorIndex in op.inputs]
    kinds = [names[op.opcodeIndex] for op in makers]
    if kinds != ["DEQUANTIZE"] or users:
        raise ValueError(
            f"The output {item.name.decode()!r} of {key!r} is made by {kinds} and read by {len(users)} ops, "
            "so it can't be an integer. Return what fake_quant gives."
        )
    return _Place(makers[0], int(makers[0].inputs[0]))
