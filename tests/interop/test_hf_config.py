import json
from typing import Any

import pytest

from gpt.configs.gpt_config import GPTConfig
from gpt.errors import UserError
from gpt.interop.hf_config import describe_config, parse_config
from tests.interop.families import CHANGES, make_config

GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
    "resid_pdrop": 0.1, "vocab_size": 50257,
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu", "hidden_size": 576,
    "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "max_position_embeddings": 8192,
    "mlp_bias": False, "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
    "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False,
    "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152,
}  # fmt: skip
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 896,
    "initializer_range": 0.02, "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21,
    "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
    "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "n_parameters"),
    [
        (GPT2, 124_439_808),
        (GPT2 | {"n_layer": 24, "n_head": 16, "n_embd": 1024}, 354_823_168),
        (GPT2 | {"n_layer": 36, "n_head": 20, "n_embd": 1280}, 774_030_080),
        (GPT2 | {"n_layer": 48, "n_head": 25, "n_embd": 1600}, 1_557_611_200),
        (LLAMA, 1_235_814_400),
        (SMOLLM2, 134_515_008),
        (MISTRAL, 7_241_732_096),
        (QWEN2, 494_032_768),
        (QWEN3, 596_049_920),
    ],
)
def test_released_configurations_have_their_published_parameter_counts(
    content: dict[str, Any], n_parameters: int
) -> None:
    assert parse_config(content).n_parameters == n_parameters


def test_fields_of_a_released_llama_3_arrive() -> None:
    config = parse_config(LLAMA)
    assert (config.rope_scaling, config.rope_factor, config.rope_original_block_size) == ("llama3", 32, 8192)
    assert (config.rope_theta, config.norm_eps, config.head_dim, config.tie_embeddings) == (5e5, 1e-5, 64, True)


def test_sliding_windows_arrive_where_they_are_used() -> None:
    assert parse_config(MISTRAL).sliding_window == 4096
    assert parse_config(MISTRAL | {"sliding_window": None}).sliding_window == 0
    assert parse_config(QWEN2).sliding_window == 0
    assert parse_config(QWEN2 | {"use_sliding_window": True, "max_window_layers": 0}).sliding_window == 32768


def test_rope_parameters_of_transformers_5_arrive() -> None:
    content = {key: value for key, value in LLAMA.items() if key not in ("rope_theta", "rope_scaling")}
    parameters = {**LLAMA["rope_scaling"], "rope_theta": 500000.0}
    assert parse_config(content | {"rope_parameters": parameters}) == parse_config(LLAMA)


@pytest.mark.parametrize("name", CHANGES)
def test_a_described_configuration_parses_to_the_same_function(name: str) -> None:
    config = make_config(name)
    parsed = parse_config(json.loads(json.dumps(describe_config(config))))
    biases = {"bias", "qkv_bias", "attn_out_bias", "mlp_bias"}  # a class may have more biases, which are then 0
    ignored = biases if name == "gpt2 without biases" else {"bias", "init"}
    different = {field for field in GPTConfig.model_fields if getattr(config, field) != getattr(parsed, field)}
    assert different <= ignored


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "mamba"}, r"model_type 'mamba' is not supported \(supported: GPT2LMHeadModel, .*Qwen3"),
        ({}, "model_type None is not supported"),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, "architectures .* is not supported"),
        (LLAMA | {"architectures": 3}, "architectures 3 is not supported"),
        (LLAMA | {"auto_map": {"AutoModel": "modeling.Evil"}}, "auto_map: the model needs Python code"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config: quantized weights are not supported"),
        (LLAMA | {"hidden_act": "gelu"}, r"hidden_act 'gelu' is not supported \('silu' is\)"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type 'yarn' is not supported"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.rope_type 'linear'"),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor missing"),
        (LLAMA | {"rope_scaling": "llama3"}, "rope_scaling 'llama3' is not a JSON object"),
        (LLAMA | {"hidden_size": None}, "hidden_size missing"),
        (LLAMA | {"hidden_size": "wide"}, "hidden_size 'wide' is not a positive integer"),
        (LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers 0 is not a positive integer"),
        (LLAMA | {"num_key_value_heads": 5}, "not a configuration of LlamaForCausalLM: n_kv_head=5 does not divide"),
        (LLAMA | {"rms_norm_eps": "small"}, "not a configuration of LlamaForCausalLM: norm_eps"),
        (GPT2 | {"activation_function": "swish"}, "activation_function 'swish' is not supported"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True is not supported"),
        (QWEN2 | {"use_sliding_window": True}, "layer_types full_attention, sliding_attention: layers of several"),
        (QWEN3 | {"layer_types": ["linear_attention"]}, "layer_types linear_attention"),
    ],
)
def test_unsupported_fields_are_named(content: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(content)
