"""The model classes of transformers that a GPTConfig can be, and the fields that are in the way of each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpt.configs.fields import format_flag, format_off_flag
from gpt.configs.gpt_config import GPTConfig
from gpt.errors import UserError

GPT2_ACTIVATIONS = {"gelu": "gelu_new", "gelu_erf": "gelu", "relu2": "relu2"}
"""Value of `mlp` -> transformers' `activation_function`."""


class Obstacle(NamedTuple):
    """A field whose value a class cannot have, and the nearest value that it can have."""

    name: str
    value: Any
    nearest: Any


@dataclass(frozen=True)
class Family:
    """A class of transformers."""

    model_type: str
    """Its name in config.json."""
    architecture: str
    """Its Python class."""
    allowed: Callable[[GPTConfig], dict[str, tuple[Any, ...]]]
    """Returns field -> values that the class can have, the most usual first, for a resolved configuration."""

    def find_obstacles(self, config: GPTConfig) -> list[Obstacle]:
        """Return the fields of a resolved configuration that this class cannot have."""
        return [
            Obstacle(name, getattr(config, name), values[0])
            for name, values in self.allowed(config).items()
            if getattr(config, name) not in values
        ]


def _allow_gpt2(config: GPTConfig) -> dict[str, tuple[Any, ...]]:
    return {
        "position": ("learned",),
        "norm": ("layernorm",),
        "mlp": tuple(GPT2_ACTIVATIONS),
        "qk_norm": (False,),
        "n_kv_head": (config.n_head,),
        "head_dim": (config.n_embd // config.n_head,),
        "sliding_window": (0,),
        "logit_softcap": (0.0,),
    }


def _allow_descendant(**fields: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    common = {"position": ("rotary",), "norm": ("rmsnorm",), "mlp": ("swiglu",), "logit_softcap": (0.0,)}
    return common | fields


def _allow_qwen2(config: GPTConfig) -> dict[str, tuple[Any, ...]]:
    return _allow_descendant(qk_norm=(False,), qkv_bias=(True,), attn_out_bias=(False,), mlp_bias=(False,))


def _allow_llama(config: GPTConfig) -> dict[str, tuple[Any, ...]]:
    return _allow_descendant(qk_norm=(False,), sliding_window=(0,))


def _allow_mistral(config: GPTConfig) -> dict[str, tuple[Any, ...]]:
    return _allow_descendant(qk_norm=(False,), qkv_bias=(False,), attn_out_bias=(False,), mlp_bias=(False,))


def _allow_qwen3(config: GPTConfig) -> dict[str, tuple[Any, ...]]:
    return _allow_descendant(qk_norm=(True,), mlp_bias=(False,))


FAMILIES = (
    Family("gpt2", "GPT2LMHeadModel", _allow_gpt2),
    Family("qwen2", "Qwen2ForCausalLM", _allow_qwen2),
    Family("llama", "LlamaForCausalLM", _allow_llama),
    Family("mistral", "MistralForCausalLM", _allow_mistral),
    Family("qwen3", "Qwen3ForCausalLM", _allow_qwen3),
)
"""Classes in the order in which they are tried."""


def find_families(config: GPTConfig) -> list[Family]:
    """Return the classes that compute what `config` does, the closest first.

    A bias that a class has and the model has not is 0, which computes the same.
    """
    return _find_families(config.resolve())


def require_family(config: GPTConfig) -> Family:
    """Return the closest class that computes what `config` does.

    Raises:
        UserError: there is none; names the fields in the way and the nearest configuration that has one.
    """
    resolved = config.resolve()
    families = _find_families(resolved)
    if not families:
        raise UserError(_explain_obstacles(resolved))
    return families[0]


def _find_families(resolved: GPTConfig) -> list[Family]:
    return [family for family in FAMILIES if not family.find_obstacles(resolved)]


def _explain_obstacles(resolved: GPTConfig) -> str:
    """Return one line on the fields that no class of transformers has together, and the nearest values."""
    nearest = min(FAMILIES, key=lambda family: len(family.find_obstacles(resolved)))
    obstacles = nearest.find_obstacles(resolved)
    found = ", ".join(_format(item.name, item.value) for item in obstacles)
    remedy = " ".join(_format(item.name, item.nearest) for item in obstacles)
    return f"no class of transformers has {found}; nearest: {nearest.architecture}, with {remedy}"


def _format(name: str, value: Any) -> str:
    path = f"model.{name}"
    if GPTConfig.model_fields[name].annotation is bool:
        return format_flag(path) if value else format_off_flag(path)
    shown = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value
    return f"{format_flag(path)} {shown}"
