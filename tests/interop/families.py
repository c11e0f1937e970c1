"""Configurations of every family, with odd sizes, and small model folders for the tests of several modules."""

import json
from pathlib import Path

import torch

from gpt.configs.gpt_config import GPTConfig
from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_builders import train_bpe_tokenizer
from gpt.interop.model_folder import QWEN_PATTERN, write_model_folder
from gpt.models.gpt import GPT
from tests.conftest import make_text

VOCAB_SIZE = 301
DESCENDANT = {
    "bias": False,
    "position": "rotary",
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "norm_eps": 1e-5,
    "init": "llama",
}
ODD = {"head_dim": 14, "intermediate_size": 50}
SCALED_ROPE = {
    "rope_scaling": "llama3",
    "rope_theta": 5000.0,
    "rope_factor": 4.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 3.0,
    "rope_original_block_size": 16,
}
CHANGES: dict[str, dict[str, object]] = {
    "gpt2": {},
    "gpt2, untied": {"tie_embeddings": False, "intermediate_size": 50, "mlp": "gelu_erf"},
    "gpt2 without biases": {"bias": False, "mlp": "relu2"},
    "llama": {**DESCENDANT, "n_kv_head": 1, **ODD},
    "llama, untied, biases": {**DESCENDANT, "n_kv_head": 4, "tie_embeddings": False, "bias": True},
    "llama 3": {**DESCENDANT, "n_kv_head": 2, "tie_embeddings": False, **SCALED_ROPE},
    "mistral, window": {**DESCENDANT, "n_kv_head": 2, "sliding_window": 7, "tie_embeddings": False},
    "qwen2": {**DESCENDANT, "n_kv_head": 1, "qkv_bias": True, **ODD},
    "qwen2, untied, window": {**DESCENDANT, "qkv_bias": True, "tie_embeddings": False, "sliding_window": 9},
    "qwen3": {**DESCENDANT, "n_kv_head": 2, "qk_norm": True, "rope_theta": 1e6, **ODD},
    "qwen3, untied, window": {
        **DESCENDANT,
        "n_kv_head": 1,
        "qk_norm": True,
        "tie_embeddings": False,
        "sliding_window": 11,
        "qkv_bias": True,
        "attn_out_bias": True,
    },
}
"""Family -> changes of `SIZES`."""
SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 48, "block_size": 40, "vocab_size": VOCAB_SIZE}


def make_config(name: str, **changes: object) -> GPTConfig:
    """Return the resolved configuration of a family in CHANGES."""
    return GPTConfig.model_validate(SIZES | CHANGES[name] | changes).resolve()


def make_model(name: str, **changes: object) -> GPT:
    """Return a model with weights larger than at init, so that every part of it matters."""
    model = GPT(make_config(name, **changes), seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def make_tokenizer(name: str = "gpt2") -> Tokenizer:
    """Return a byte-level BPE of fewer tokens than the models have rows; for qwen2 one that cuts words as Qwen does."""
    tokenizer = train_bpe_tokenizer([make_text(500)], 290)
    if not name.startswith("qwen2"):
        return tokenizer
    return change_pre_tokenizer(tokenizer, make_split(QWEN_PATTERN), normalizer={"type": "NFC"})


def make_split(pattern: str) -> list[dict[str, object]]:
    """Return the steps of a pre-tokenizer that cuts words by a regular expression."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]


def change_pre_tokenizer(tokenizer: Tokenizer, steps: list[dict[str, object]], **changes: object) -> Tokenizer:
    """Return a tokenizer with other steps of its pre-tokenizer, and other parts."""
    parts = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, **changes}
    return Tokenizer(json.dumps(json.loads(tokenizer.definition) | parts))


def write_folder(path: Path, name: str = "llama", **changes: object) -> Path:
    """Write a model folder of a family, with float32 weights."""
    path.mkdir(parents=True)
    model = make_model(name, **changes)
    write_model_folder(path, model.state_dict(), model.config, make_tokenizer(name), dtype=torch.float32)
    return path
