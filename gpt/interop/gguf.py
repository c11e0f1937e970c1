"""GGUF files of llama.cpp: names, types and metadata; the package `gguf` writes them.

ours              llama.cpp               ours           llama.cpp
wte               token_embd              h.I.ln_2       blk.I.ffn_norm
wpe               position_embd           h.I.mlp.c_fc   blk.I.ffn_gate, ffn_up; GPT-2: blk.I.ffn_up
h.I.ln_1          blk.I.attn_norm         h.I.mlp.c_proj blk.I.ffn_down
h.I.attn.c_attn   blk.I.attn_{q,k,v};     ln_f           output_norm
                  GPT-2: blk.I.attn_qkv   lm_head        output, unless tied
h.I.attn.c_proj   blk.I.attn_output
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from gpt.configs.gpt_config import GPTConfig
from gpt.data.chat_template import ChatTemplate
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.interop.families import require_family
from gpt.interop.gguf_tokenizer import describe_vocabulary
from gpt.interop.huggingface import Layer, Tensors, list_layers
from gpt.ops.rope import scale_frequencies
from gpt.utils.helper import first_line

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

Array = npt.NDArray[Any]

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
"""Value of --dtype -> llama.cpp's name of the type."""
Q8_0_BLOCK = 32
"""Weights of a row that share a scale in Q8_0."""
ARCHITECTURES = {"gpt2": "gpt2", "qwen2": "qwen2", "llama": "llama", "mistral": "llama", "qwen3": "qwen3"}
"""Class of transformers, by its model_type -> architecture of llama.cpp."""
NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "attn.c_proj": "attn_output",
    "mlp.c_proj": "ffn_down",
}
"""Our layer, without its block -> llama.cpp's."""
FUSED_NAMES = {
    ("attn.c_attn", 1): ("attn_qkv",),
    ("attn.c_attn", 3): ("attn_q", "attn_k", "attn_v"),
    ("mlp.c_fc", 1): ("ffn_up",),
    ("mlp.c_fc", 2): ("ffn_gate", "ffn_up"),
}
"""Our layer and the number of layers that it is made of -> llama.cpp's."""


def is_installed() -> bool:
    """Return whether the package that writes GGUF files can be imported."""
    return find_spec("gguf") is not None


def require_architecture(config: GPTConfig) -> str:
    """Return the architecture of llama.cpp that computes what a resolved configuration does.

    Raises:
        UserError: there is none; names the field in the way and the nearest value.
    """
    architecture = ARCHITECTURES[require_family(config).model_type]
    if architecture == "qwen2" and (config.head_dim * config.n_head != config.n_embd or config.rope_scaling != "none"):
        architecture = "llama"  # which has these, and biases as well
    if 0 < config.sliding_window < config.block_size:
        raise UserError(
            f"llama.cpp has no --model.sliding-window {config.sliding_window} in {architecture}; nearest: 0, or a "
            f"--model.block-size of at most {config.sliding_window}"
        )
    if architecture == "gpt2" and config.mlp != "gelu":
        raise UserError(f"llama.cpp has no --model.mlp {config.mlp} in gpt2; nearest: --model.mlp gelu")
    if architecture == "qwen3" and (config.qkv_bias or config.attn_out_bias):
        raise UserError(
            "llama.cpp has no biases of the attention in qwen3; nearest: --model.qkv-bias false --model.attn-out-bias "
            "false"
        )
    if architecture != "llama" and config.rope_scaling != "none":
        raise UserError(
            f"llama.cpp has no --model.rope-scaling {config.rope_scaling} in {architecture}; nearest: "
            "--model.rope-scaling none"
        )
    return architecture


def write_gguf(
    path: Path,
    weights: Mapping[str, torch.Tensor],
    config: GPTConfig,
    tokenizer: Tokenizer,
    *,
    dtype: str,
    chat_template: ChatTemplate | None = None,
) -> None:
    """Write a model and its tokenizer into one file.

    Args:
        path: file that does not exist.
        weights: state dict of a GPT.
        config: its resolved configuration.
        tokenizer: its tokenizer.
        dtype: a key of TYPES, the type of the matrices; norms, biases and positions stay float32.
        chat_template: its chat template.

    Raises:
        UserError: llama.cpp has no such model or tokenizer, or the disk refused.
    """
    from gguf import GGUFWriter, LlamaFileType

    logging.getLogger("gguf").setLevel(logging.WARNING)
    architecture, family = require_architecture(config), require_family(config)
    vocabulary = describe_vocabulary(tokenizer, config.vocab_size, chat_template)
    writer = GGUFWriter(path, architecture)
    writer.add_name(path.stem)
    writer.add_file_type(getattr(LlamaFileType, "ALL_F32" if dtype == "float32" else f"MOSTLY_{TYPES[dtype]}"))
    _add_sizes(writer, config)
    vocabulary.add_to(writer)
    for layer in list_layers(config, family):
        for name, array in _split_layer(layer, weights, config, architecture):
            kind = _choose_type(layer, array, dtype)
            writer.add_tensor(name, _quantize(array, kind), raw_dtype=kind)
    if config.rope_scaling == "llama3":
        writer.add_tensor("rope_freqs.weight", _rope_factors(config))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:
        for file in writer.fout or ():
            with contextlib.suppress(OSError):
                file.close()
        reason = (
            error.strerror or f"the disk took a part of a tensor alone ({first_line(error)})"
        )  # numpy gives no errno
        raise UserError(f"{path}: cannot be written: {reason}; free space, or name another --out") from error


def round_weights(weights: Mapping[str, torch.Tensor], config: GPTConfig, *, dtype: str) -> Tensors:
    """Return the weights as the file holds them, in float32: the scales of Q8_0 are those of rows, in any order."""
    from gguf.quants import dequantize

    rounded = dict(weights)
    for layer in list_layers(config, require_family(config)):
        name = f"{layer.ours}.weight"
        array = _to_numpy(weights[name])
        kind = _choose_type(layer, array, dtype)
        rounded[name] = torch.from_numpy(dequantize(_quantize(array, kind), kind).astype(np.float32))
    return rounded


def _add_sizes(writer: "GGUFWriter", config: GPTConfig) -> None:
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_vocab_size(config.vocab_size)
    if config.position == "learned":
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)


def _split_layer(
    layer: Layer, weights: Mapping[str, torch.Tensor], config: GPTConfig, architecture: str
) -> Iterator[tuple[str, Array]]:
    """Yield name and value of each of llama.cpp's tensors for one of our layers; a missing bias is 0."""
    *block, name = layer.ours.split(".", 2) if layer.ours.startswith("h.") else [layer.ours]
    prefix = f"blk.{block[1]}." if block else ""
    names = FUSED_NAMES.get((name, len(layer.sizes))) or (NAMES[name],)
    weight = weights[f"{layer.ours}.weight"]
    bias = weights.get(f"{layer.ours}.bias", weight.new_zeros(sum(layer.sizes)))
    for kind, tensor in (("weight", weight), ("bias", bias))[: 2 if layer.has_bias else 1]:
        for part, rows in zip(names, tensor.split(layer.sizes), strict=True):
            if architecture == "llama" and part in ("attn_q", "attn_k"):
                rows = _interleave(rows, config.head_dim)
            yield f"{prefix}{part}.{kind}", _to_numpy(rows)


def _interleave(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the channels of each head for the rotary embeddings of llama.cpp's Llama.

    They pair channels 2i and 2i+1. Ours, and those of its other architectures, pair channels i and i + D/2.

    Args:
        rows: (H * D, ...), weight or bias of queries or keys.
        head_dim: D.
    """
    pairs = rows.view(-1, 2, head_dim // 2, *rows.shape[1:])  # (H, 2, D/2, ...)
    return pairs.transpose(1, 2).reshape(rows.shape)


def _choose_type(layer: Layer, array: Array, dtype: str) -> "GGMLQuantizationType":
    """Return the type of a tensor: vectors and learned positions are float32, and rows that no Q8_0 fits are F16."""
    from gguf import GGMLQuantizationType

    if array.ndim == 1 or layer.ours == "wpe":
        return GGMLQuantizationType.F32
    if dtype == "q8_0" and array.shape[1] % Q8_0_BLOCK:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[TYPES[dtype]]


def _quantize(array: Array, kind: "GGMLQuantizationType") -> Array:
    from gguf.quants import quantize

    return quantize(array, kind)


def _rope_factors(config: GPTConfig) -> Array:
    """Return the divisors of the rotary frequencies, (D/2,) float32."""
    from gpt.models.gpt import build_rope_scaling

    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    frequencies = config.rope_theta ** (-pairs / config.head_dim)
    scaling = build_rope_scaling(config)
    assert scaling is not None
    return _to_numpy(frequencies / scale_frequencies(frequencies, scaling))


def _to_numpy(tensor: torch.Tensor) -> Array:
    return tensor.detach().float().contiguous().numpy()
