"""The initialisation of each family, as a table: parameter -> distribution, with its source."""

import hashlib
import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from gpt.configs.gpt_config import GPTConfig
from gpt.utils.helper import Purpose, random_bits

BLOCK_NUMBERS = 2**14
"""Numbers that are drawn together, rounded down to rows of the parameter, but at least one row."""


class Normal(NamedTuple):
    """A normal distribution; a constant if `std` is 0."""

    mean: float
    std: float


Distribution = Callable[[GPTConfig], Normal]


def _normal(config: GPTConfig) -> Normal:
    return Normal(0.0, config.init_std)


def _scaled_normal(config: GPTConfig) -> Normal:
    return Normal(0.0, config.init_std / math.sqrt(2 * config.n_layer))


def _ones(config: GPTConfig) -> Normal:
    return Normal(1.0, 0.0)


def _zeros(config: GPTConfig) -> Normal:
    return Normal(0.0, 0.0)


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
    """Fill every parameter of `model` from its table.

    Args:
        model: a GPT whose parameters are whole.
        config: its configuration.
        seed: decides the weights of a configuration, alone.
    """
    for name, parameter in model.named_parameters():
        init_rows(name, parameter, parameter.shape, 0, config, seed)


@torch.no_grad()
def init_rows(name: str, rows: torch.Tensor, shape: torch.Size, first_row: int, config: GPTConfig, seed: int) -> None:
    """Fill some rows of a parameter, in place, with the bits that they have in the whole parameter.

    The random bits of a block of rows are folded from the seed, the parameter's name and the block's number alone. So
    any part of a model can be initialised by itself. They come from Philox (Salmon et al. 2011, "Parallel random
    numbers: as easy as 1, 2, 3"), and become normal in numpy, which uses no vector instructions for it: CPUs of all
    kinds draw the same weights.

    Args:
        name: parameter's name in the model.
        rows: consecutive rows of it, on any device; may be none.
        shape: shape of the whole parameter.
        first_row: number of the first of `rows` in the parameter.
        config: the model's configuration.
        seed: decides the weights of a configuration, alone.
    """
    table = INITIALISATIONS[config.init]
    mean, std = next(distribution for pattern, distribution in table.items() if fnmatchcase(name, pattern))(config)
    if std == 0:
        rows.fill_(mean)
        return
    assert mean == 0 and rows.dtype == torch.float32
    n_rows, columns = shape[0], math.prod(shape[1:])
    block_rows, end = max(1, BLOCK_NUMBERS // columns), first_row + len(rows)
    key = np.array([random_bits(seed, Purpose.INIT), _digest_name(name)], dtype=np.uint64)
    for start in range(first_row - first_row % block_rows, end, block_rows):
        stop = min(start + block_rows, n_rows)
        generator = np.random.Generator(np.random.Philox(key=key, counter=(start // block_rows) << 128))
        block = generator.standard_normal((stop - start, *shape[1:]), dtype=np.float32)
        block *= np.float32(std)
        begin = max(start, first_row)
        rows[begin - first_row : stop - first_row].copy_(torch.from_numpy(block[begin - start : end - start]))


def _digest_name(name: str) -> int:
    """Return the first 64 bits of a name's SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
