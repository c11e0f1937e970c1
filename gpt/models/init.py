"""The initialisation of each family, as a table: parameter -> distribution, with its source."""

import math
from collections.abc import Callable
from fnmatch import fnmatchcase

import torch
from torch import nn

from gpt.configs.gpt_config import GPTConfig

Distribution = Callable[[torch.Tensor, torch.Generator, GPTConfig], object]
"""Fills a parameter in place, given the generator and the configuration."""


def _normal(parameter: torch.Tensor, generator: torch.Generator, config: GPTConfig) -> None:
    nn.init.normal_(parameter, std=config.init_std, generator=generator)


def _scaled_normal(parameter: torch.Tensor, generator: torch.Generator, config: GPTConfig) -> None:
    nn.init.normal_(parameter, std=config.init_std / math.sqrt(2 * config.n_layer), generator=generator)


def _ones(parameter: torch.Tensor, generator: torch.Generator, config: GPTConfig) -> None:
    nn.init.ones_(parameter)


def _zeros(parameter: torch.Tensor, generator: torch.Generator, config: GPTConfig) -> None:
    nn.init.zeros_(parameter)


INITIALISATION: dict[str, Distribution] = {
    # N(0, 0.02^2): GPT report (Radford et al. 2018), section 4.1, and the released GPT-2 code.
    "w[tp]e.weight": _normal,
    "lm_head.weight": _normal,
    "h.*.attn.c_attn.weight": _normal,
    "h.*.mlp.c_fc.weight": _normal,
    # N(0, 0.02^2 / N) with N = 2 * n_layer residual additions: GPT-2 report (Radford et al. 2019), section 2.3.
    "h.*.c_proj.weight": _scaled_normal,
    # Norms begin as plain normalisation: Ba et al. 2016, section 3.1.
    "h.*.ln_[12].weight": _ones,
    "h.*.attn.[qk]_norm.weight": _ones,
    "ln_f.weight": _ones,
    # Zeros: the released GPT-2 code.
    "*.bias": _zeros,
}
"""Initialisation of GPT-2: name pattern -> distribution; every parameter matches exactly one pattern."""

INITIALISATIONS: dict[str, dict[str, Distribution]] = {
    "gpt2": INITIALISATION,
    # N(0, initializer_range^2) for every matrix, residual projections included: `_init_weights` of transformers'
    # modeling_llama.py, modeling_mistral.py, modeling_qwen2.py and modeling_qwen3.py.
    "llama": INITIALISATION | {"h.*.c_proj.weight": _normal},
}
"""Value of `GPTConfig.init` -> its table."""


def init_weights(model: nn.Module, config: GPTConfig, seed: int) -> None:
    """Fill every parameter of `model` from its table; they draw from one generator in the order of their names.

    Args:
        model: a GPT on the CPU.
        config: its configuration.
        seed: generator's seed, which alone decides the weights of a configuration.
    """
    generator = torch.Generator().manual_seed(seed)
    table = INITIALISATIONS[config.init]
    for name, parameter in model.named_parameters():
        distribution = next(fill for pattern, fill in table.items() if fnmatchcase(name, pattern))
        distribution(parameter, generator, config)
