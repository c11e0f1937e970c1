"""How much arithmetic a training step is.

Shapes: T = block_size, H = n_head, D = head_dim, V = vocabulary.
"""

from typing import NamedTuple

from gpt.configs.gpt_config import GPTConfig


class Linear(NamedTuple):
    """Linear layers of one shape."""

    n_in: int
    n_out: int
    layers: int


def linear_layers(model: GPTConfig) -> tuple[Linear, ...]:
    """Return every matrix that a token is multiplied by: a tied head is one, an embedding that is looked up is not.

    Args:
        model: resolved, with its vocabulary filled in.
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
    """Return the floating-point operations of one token's forward and backward pass, in sequences of `block_size`.

    FLOPs = 6 N + 6 L T H D, with N weights of linear layers and L = n_layer. Each weight takes a multiplication and an
    addition forward, and twice that backward (Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section
    2.1). Attention takes 12 T H D in each layer (Chowdhery et al. 2022, "PaLM", appendix B), of which causal attention
    needs half (Dao 2023, "FlashAttention-2", section 4.1); sharing keys and values among heads saves weights, but no
    scores. This is what the model needs, not what is executed: masked scores, recomputation, norms, activations and the
    optimizer do not count. A document mask, which needs less, is not considered.

    Args:
        model: resolved, with its vocabulary filled in.
    """
    weights = sum(linear.n_in * linear.n_out * linear.layers for linear in linear_layers(model))
    return 6 * weights + 6 * model.n_layer * model.qkv_sizes[0] * model.block_size
