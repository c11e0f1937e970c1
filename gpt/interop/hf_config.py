"""config.json of transformers <-> GPTConfig, without torch."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from gpt.configs.explain import explain_validation_error
from gpt.configs.gpt_config import GPTConfig
from gpt.errors import UserError
from gpt.interop.families import FAMILIES, GPT2_ACTIVATIONS, Family, require_family

SUPPORTED = ", ".join(family.architecture for family in FAMILIES)
MLP_OF_GPT2 = {name: mlp for mlp, name in GPT2_ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu"}
ROPE_FACTORS = {
    "factor": "rope_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_block_size",
}
"""Key of Llama 3's `rope_scaling` -> field of GPTConfig."""
REQUIRED = {
    "gpt2": ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"),
    "descendant": (
        *("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size"),
        *("max_position_embeddings", "vocab_size"),
    ),
}
FIXED_IN_GPT2 = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
"""Key -> the only value that is supported, which is also the default."""
FIXED_IN_DESCENDANTS = {"partial_rotary_factor": 1.0, "hidden_act": "silu"}


def describe_config(
    config: GPTConfig, family: Family | None = None, *, end_of_text: int | None = None
) -> dict[str, Any]:
    """Return the config.json of a model.

    The rotary embeddings are in the keys of transformers 4, which version 5, vLLM and llama.cpp read as well.

    Args:
        config: resolved configuration.
        family: class to export to; None: the closest.
        end_of_text: id of the token that begins and ends documents.

    Raises:
        UserError: no class of transformers has this configuration.
    """
    family = family or require_family(config)
    fields = _describe_gpt2(config) if family.model_type == "gpt2" else _describe_descendant(config, family)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **fields,
        "vocab_size": config.vocab_size,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }


def _describe_gpt2(config: GPTConfig) -> dict[str, Any]:
    return {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.intermediate_size,
        "n_positions": config.block_size,
        "activation_function": GPT2_ACTIVATIONS[config.mlp],
        "layer_norm_epsilon": config.norm_eps,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
    }


def _describe_descendant(config: GPTConfig, family: Family) -> dict[str, Any]:
    scaling = None
    if config.rope_scaling != "none":
        scaling = {"rope_type": config.rope_scaling} | {key: getattr(config, f) for key, f in ROPE_FACTORS.items()}
    fields = {
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "hidden_size": config.n_embd,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.block_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
    }
    if family.model_type in ("llama", "qwen3"):
        fields["attention_bias"] = bool(config.qkv_bias or config.attn_out_bias)
    if family.model_type == "llama":
        fields["mlp_bias"] = bool(config.mlp_bias)
    if family.model_type == "mistral":
        fields["sliding_window"] = config.sliding_window or None
    if family.model_type in ("qwen2", "qwen3") and config.sliding_window:
        window = {"sliding_window": config.sliding_window, "use_sliding_window": True, "max_window_layers": 0}
        fields |= window
    return fields


def parse_config(content: Mapping[str, Any]) -> GPTConfig:
    """Return the resolved configuration of a model, given its config.json.

    Raises:
        UserError: the model is of an unsupported class, or has a field that is not supported; names it.
    """
    family = _parse_family(content)
    if content.get("quantization_config") is not None:
        raise UserError("quantization_config: quantized weights are not supported; use the weights they were made from")
    if content.get("is_encoder_decoder"):
        raise UserError(f"is_encoder_decoder is true, which is not supported (supported: {SUPPORTED})")
    required = REQUIRED["gpt2" if family.model_type == "gpt2" else "descendant"]
    missing = [key for key in required if content.get(key) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} missing; download config.json again")
    for key in required:
        if type(content[key]) is not int or content[key] < 1:
            raise UserError(f"{key} {content[key]!r:.80} is not a positive integer; download config.json again")
    fields = _parse_gpt2(content) if family.model_type == "gpt2" else _parse_descendant(content, family)
    fields |= {
        "vocab_size": content["vocab_size"],
        "init_std": content.get("initializer_range", 0.02),
        "tie_embeddings": content.get("tie_word_embeddings", family.model_type == "gpt2"),
    }
    try:
        return GPTConfig.model_validate(fields).resolve()
    except ValidationError as error:
        reason = explain_validation_error(error, GPTConfig, as_flag=False)
        raise UserError(f"not a configuration of {family.architecture}: {reason}") from error


def _parse_family(content: Mapping[str, Any]) -> Family:
    if content.get("auto_map"):
        raise UserError(
            "auto_map: the model needs Python code from its folder, which is never run; use a model of a class that "
            f"transformers has (supported: {SUPPORTED})"
        )
    model_type, architectures = content.get("model_type"), content.get("architectures") or []
    family = next((family for family in FAMILIES if family.model_type == model_type), None)
    if family is None:
        raise UserError(f"model_type {model_type!r:.80} is not supported (supported: {SUPPORTED})")
    base = {family.architecture, family.architecture.replace("ForCausalLM", "Model").replace("LMHeadModel", "Model")}
    if not isinstance(architectures, list) or not base.issuperset(map(str, architectures)):
        raise UserError(f"architectures {architectures!r:.80} is not supported (supported: {SUPPORTED})")
    return family


def _parse_gpt2(content: Mapping[str, Any]) -> dict[str, Any]:
    _require_fixed(content, FIXED_IN_GPT2)
    activation = content.get("activation_function", "gelu_new")
    if activation not in MLP_OF_GPT2:
        raise UserError(f"activation_function {activation!r:.80} is not supported ({', '.join(MLP_OF_GPT2)} are)")
    return {
        "n_layer": content["n_layer"],
        "n_head": content["n_head"],
        "n_embd": content["n_embd"],
        "intermediate_size": content.get("n_inner") or 0,
        "block_size": content["n_positions"],
        "mlp": MLP_OF_GPT2[activation],
        "norm_eps": content.get("layer_norm_epsilon", 1e-5),
    }


def _parse_descendant(content: Mapping[str, Any], family: Family) -> dict[str, Any]:
    _require_fixed(content, FIXED_IN_DESCENDANTS)
    has_attention_bias = family.model_type in ("llama", "qwen3") and bool(content.get("attention_bias", False))
    return {
        "n_layer": content["num_hidden_layers"],
        "n_head": content["num_attention_heads"],
        "n_kv_head": content.get("num_key_value_heads") or content["num_attention_heads"],
        "n_embd": content["hidden_size"],
        "head_dim": content.get("head_dim") or (128 if family.model_type == "qwen3" else 0),  # Qwen 3's default
        "intermediate_size": content["intermediate_size"],
        "block_size": content["max_position_embeddings"],
        "norm_eps": content.get("rms_norm_eps", 1e-6),
        "bias": False,
        "qkv_bias": has_attention_bias or family.model_type == "qwen2",
        "attn_out_bias": has_attention_bias,
        "mlp_bias": family.model_type == "llama" and bool(content.get("mlp_bias", False)),
        "qk_norm": family.model_type == "qwen3",
        "sliding_window": _parse_window(content, family),
        "position": "rotary",
        "norm": "rmsnorm",
        "mlp": "swiglu",
        "init": "llama",
        **_parse_rope(content),
    }


def _parse_rope(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the rotary embeddings, from the keys of transformers 4 or of version 5."""
    rope: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = content.get(key) or {}
        if not isinstance(value, Mapping):
            raise UserError(f"{key} {value!r:.80} is not a JSON object; download config.json again")
        rope |= value
    kind = rope.get("rope_type", rope.get("type", "default"))
    fields = {"rope_theta": rope.get("rope_theta", content.get("rope_theta", 10_000.0))}
    if kind == "default":
        return fields
    if kind != "llama3":
        raise UserError(f"rope_scaling.rope_type {kind!r:.80} is not supported (default and llama3 are)")
    missing = [key for key in ROPE_FACTORS if rope.get(key) is None]
    if missing:
        raise UserError(f"rope_scaling.{missing[0]} missing; download config.json again")
    return fields | {"rope_scaling": "llama3"} | {field: rope[key] for key, field in ROPE_FACTORS.items()}


def _parse_window(content: Mapping[str, Any], family: Family) -> Any:
    """Return the sliding window of all layers; 0 if no layer has one.

    Raises:
        UserError: some layers have a window and others have not.
    """
    n_layer = content["num_hidden_layers"]
    default = 4096 if family.model_type == "mistral" else None  # of MistralConfig
    window = content.get("sliding_window", default) or 0
    if family.model_type == "llama":
        return 0
    if family.model_type == "mistral":
        return window
    layer_types = content.get("layer_types")
    if not isinstance(layer_types, list):
        first = content.get("max_window_layers", 28) if content.get("use_sliding_window", False) else n_layer
        layer_types = ["full_attention" if index < first else "sliding_attention" for index in range(n_layer)]
    kinds = set(map(str, layer_types))
    if kinds - {"full_attention", "sliding_attention"} or len(kinds) > 1:
        raise UserError(f"layer_types {', '.join(sorted(kinds))}: layers of several kinds are not supported")
    return window if kinds == {"sliding_attention"} else 0


def _require_fixed(content: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for key, value in fixed.items():
        if content.get(key, value) != value:
            raise UserError(f"{key} {content[key]!r:.80} is not supported ({value!r} is)")
