from typing import Any

import pytest
from pydantic import ValidationError

from gpt.configs.gpt_config import GPTConfig

OLD_JSON = """{
    "n_layer": 3, "n_head": 4, "n_kv_head": 0, "n_embd": 256, "block_size": 128, "vocab_size": 0, "dropout": 0.0,
    "bias": true, "position": "learned", "norm": "layernorm", "mlp": "gelu", "qk_norm": false, "logit_softcap": 0.0
}"""
"""As config.json has it from before head_dim, intermediate_size, norm_eps, rope_theta, tie_embeddings and biases."""


def test_a_config_without_the_newer_fields_loads_as_what_it_was() -> None:
    config = GPTConfig.model_validate_json(OLD_JSON)
    assert config == GPTConfig()
    resolved = config.resolve()
    assert (resolved.n_kv_head, resolved.head_dim, resolved.intermediate_size) == (4, 64, 1024)
    assert (resolved.norm_eps, resolved.rope_theta, resolved.tie_embeddings) == (1e-5, 10_000, True)
    assert (resolved.qkv_bias, resolved.attn_out_bias, resolved.mlp_bias) == (True, True, True)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"norm": "rmsnorm"}, {"norm_eps": 1e-6}),
        ({"norm_eps": 0.25}, {"norm_eps": 0.25}),
        ({"mlp": "swiglu"}, {"intermediate_size": 688}),
        ({"mlp": "swiglu", "intermediate_size": 100}, {"intermediate_size": 100}),
        ({"head_dim": 80}, {"head_dim": 80}),
        ({"bias": False}, {"qkv_bias": False, "attn_out_bias": False, "mlp_bias": False}),
        ({"bias": False, "qkv_bias": True}, {"qkv_bias": True, "attn_out_bias": False}),
        ({"mlp_bias": False}, {"qkv_bias": True, "mlp_bias": False}),
        ({"n_kv_head": 2}, {"n_kv_head": 2}),
    ],
)
def test_resolved_fills_in_what_is_derived(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    resolved = GPTConfig.model_validate(changes).resolve()
    assert expected.items() <= resolved.model_dump().items()
    assert resolved.resolve() == resolved


def test_zero_and_the_value_it_stands_for_resolve_to_the_same() -> None:
    explicit = {"n_kv_head": 4, "head_dim": 64, "intermediate_size": 1024, "norm_eps": 1e-5, "qkv_bias": True}
    assert GPTConfig.model_validate(explicit) != GPTConfig()
    assert GPTConfig.model_validate(explicit).resolve() == GPTConfig().resolve()
    assert GPTConfig.model_validate(explicit | {"n_kv_head": 2}).resolve() != GPTConfig().resolve()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 3}, r"n_embd=256 is not divisible by n_head=3 \(nearest: 255 or 258\); or set head_dim"),
        ({"n_kv_head": 3}, r"n_kv_head=3 does not divide n_head=4 \(nearest: 2\)"),
        (
            {"position": "rotary", "n_embd": 36},
            r"position=rotary needs an even head_dim: n_embd=36 over n_head=4 makes it 9 \(nearest n_embd: 32 or 40\)",
        ),
        (
            {"position": "rotary", "head_dim": 9},
            r"position=rotary needs an even head_dim: head_dim=9 is odd \(nearest: 8 or 10\)",
        ),
        ({"rope_scaling": "llama3"}, "rope_scaling=llama3 needs position=rotary"),
        (
            {"position": "rotary", "rope_scaling": "llama3", "rope_low_freq_factor": 4},
            r"rope_low_freq_factor=4.0 is not below rope_high_freq_factor=4.0",
        ),
    ],
)
def test_sizes_that_do_not_fit_name_the_nearest(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GPTConfig.model_validate(changes)


def test_with_head_dim_n_embd_need_not_divide_by_n_head() -> None:
    config = GPTConfig(n_head=3, head_dim=20, position="rotary").resolve()
    assert config.qkv_sizes == (60, 60, 60)
