"""Biases of int16 convolutions as LiteRT's kernels read them: int64.

LiteRT's converter 0.5.0 writes them as int32, whatever the activations are. The interpreter then refuses the
file (depthwise) or computes nonsense (others).
"""

from __future__ import annotations

import copy

import numpy as np

from qwix._src.odml_model import TfliteModel, needed, op_names

_BIASED = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED")


def with_wide_biases(model: TfliteModel) -> TfliteModel:
    """The same file, where each int32 bias beside int16 activations is int64."""
    schema, flatbuffers = needed("ai_edge_litert.schema_py_generated"), needed("flatbuffers")
    file, kinds = schema.ModelT.InitFromPackedBuf(model.content, 0), schema.TensorType
    names, changed = op_names(file), False
    for graph in file.subgraphs:
        for op in graph.operators:
            if names[op.opcodeIndex] not in _BIASED or len(op.inputs) < 3 or op.inputs[-1] < 0:
                continue
            bias, out = graph.tensors[op.inputs[-1]], graph.tensors[op.outputs[0]]
            if out.type != kinds.INT16 or bias.type != kinds.INT32:
                continue
            narrow = np.asarray(file.buffers[bias.buffer].data, np.uint8).tobytes()
            wide = schema.BufferT()
            wide.data = np.frombuffer(np.frombuffer(narrow, "<i4").astype("<i8").tobytes(), np.uint8)
            file.buffers.append(wide)
            tensor = copy.copy(bias)  # others may read the narrow one
            tensor.buffer, tensor.type = len(file.buffers) - 1, kinds.INT64
            graph.tensors.append(tensor)
            op.inputs = np.asarray([*op.inputs[:-1], len(graph.tensors) - 1], np.int32)
            changed = True
    if not changed:
        return model
    builder = flatbuffers.Builder(len(model.content))
    builder.Finish(file.Pack(builder), b"TFL3")
    return TfliteModel(bytes(builder.Output()))
