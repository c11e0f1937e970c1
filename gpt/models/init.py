"""The initialisation of a GPT, as a table: parameter -> distribution, with its source."""

import math
from collections.abc import Callable
from fnmatch import fnmatchcase

import torch
from torch import nn

INIT_STD = 0.02
"""Standard deviation of every matrix and embedding, as in Hugging Face's and nanoGPT's GPT-2."""

Distribution = Callable[[torch.Tensor, torch.Generator, int], object]
"""Fills a parameter in place, given the generator and n_layer."""


def _normal(parameter: torch.Tensor, generator: torch.Generator, n_layer: int) -> None:
    nn.init.normal_(parameter, std=INIT_STD, generator=generator)


def _scaled_normal(parameter: torch.Tensor, generator: torch.Generator, n_layer: int) -> None:
    nn.init.normal_(parameter, std=INIT_STD / math.sqrt(2 * n_layer), generator=generator)


def _ones(parameter: torch.Tensor, generator: torch.Generator, n_layer: int) -> None:
    nn.init.ones_(parameter)


def _zeros(parameter: torch.Tensor, generator: torch.Generator, n_layer: int) -> None:
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
"""Name pattern -> distribution; every parameter matches exactly one pattern."""


def init_weights(model: nn.Module, n_layer: int, seed: int) -> None:
    """Fill every parameter of `model` from the table; they draw from one generator in the order of their names.

    Args:
        model: a GPT on the CPU.
        n_layer: its number of blocks.
        seed: generator's seed, which alone decides the weights of a configuration.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        distribution = next(fill for pattern, fill in INITIALISATION.items() if fnmatchcase(name, pattern))
        distribution(parameter, generator, n_layer)
