"""Architectures whose generation is tested: what they differ in reaches the cache or the logits."""

from gpt.configs.gpt_config import GPTConfig

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "vocab_size": 50}
LLAMA = {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False}
FAMILIES: dict[str, dict[str, object]] = {
    "gpt2": {},
    "gpt2, untied head": {"tie_embeddings": False},
    "llama": LLAMA,
    "llama, grouped heads": LLAMA | {"n_kv_head": 2},
    "llama, one head of keys and values": LLAMA | {"n_kv_head": 1, "head_dim": 12},
    "qwen2": LLAMA | {"n_kv_head": 2, "qkv_bias": True, "rope_theta": 1e6, "tie_embeddings": False},
    "qwen3": LLAMA | {"n_kv_head": 2, "qk_norm": True, "head_dim": 16, "rope_theta": 1e6},
    "llama3, scaled rotary embeddings": LLAMA | {"rope_scaling": "llama3", "rope_original_block_size": 16},
    "mistral, sliding window": LLAMA | {"n_kv_head": 2, "sliding_window": 5},
    "speedrun": {"position": "rotary", "norm": "rmsnorm", "mlp": "relu2", "qk_norm": True, "logit_softcap": 15.0},
}


def build_config(family: str, **changes: object) -> GPTConfig:
    return GPTConfig.model_validate(SIZES | FAMILIES[family] | changes).resolve()
