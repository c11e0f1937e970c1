"""Floating-point operations (FLOPs) of a training step.

    N = sum of n_in * n_out over all linear layers    (`linear_layers`; the head counts, embeddings do not)
    FLOPs per token = 6 N + 6 L T H D                 (`flops_per_token`; less with a sliding window)
    MFU = FLOPs per token * tokens_per_second / peak_flops

L = n_layer, T = block_size, H = n_head, D = head_dim.
"""

from typing import NamedTuple

from gpt.configs.gpt_config import GPTConfig


class Linear(NamedTuple):
    """Linear layers of one shape (n_in, n_out), and their number."""

    n_in: int
    n_out: int
    layers: int


def linear_layers(model: GPTConfig) -> tuple[Linear, ...]:
    """Return all linear layers of a model.

    The head is one even if its weight is tied; an embedding is a lookup, not a matmul.

    Args:
        model: resolved configuration, vocab_size included.
    """
    width = model.n_embd
    return (
        Linear(width, sum(model.qkv_sizes), model.n_layer),
        Linear(model.qkv_sizes[0], width, model.n_layer),
        Linear(width, sum(model.fc_sizes), model.n_layer),
        Linear(model.intermediate_size, width, model.n_layer),
        Linear(width, model.vocab_size, 1),
    )


def flops_per_token(model: GPTConfig) -> int:
    """Return the FLOPs of one token's forward and backward pass, 6 N + 6 L T H D.

    6 N: a multiplication and an addition per weight forward, twice that backward (Kaplan et al. 2020, "Scaling Laws for
    Neural Language Models", section 2.1). 6 L T H D: attention needs 12 T H D per layer (Chowdhery et al. 2022, "PaLM",
    appendix B), and half of that with a causal mask (Dao 2023, "FlashAttention-2", section 4.1). Grouped-query
    attention has fewer weights, but as many scores. In a sliding window of W < T tokens, T * T / 2 scores of a head
    become W * T - W * W / 2.

    These are the FLOPs that the model needs, not those that are executed: masked scores, recomputed activations, norms,
    activation functions and the optimizer do not count. The savings of a document mask are ignored.

    Args:
        model: resolved configuration, vocab_size included.
    """
    weights = sum(linear.n_in * linear.n_out * linear.layers for linear in linear_layers(model))
    length = model.block_size
    window = min(model.sliding_window or length, length)
    return 6 * weights + 6 * model.n_layer * model.qkv_sizes[0] * window * (2 * length - window) // length
