"""How much arithmetic a training step is.

Shapes: T = block_size, C = n_embd, V = vocabulary.
"""

from typing import NamedTuple

from gpt.configs.gpt_config import GPTConfig


class Linear(NamedTuple):
    """Linear layers of one shape."""

    n_in: int
    n_out: int
    layers: int


def linear_layers(model: GPTConfig) -> tuple[Linear, ...]:
    """Every matrix that a token is multiplied by; embeddings are looked up, and the head is a layer though it is tied.

    Args:
        model: with its vocabulary filled in.
    """
    width = model.n_embd
    return (
        Linear(width, width + 2 * model.kv_heads * model.head_dim, model.n_layer),  # queries, keys, values
        Linear(width, width, model.n_layer),
        Linear(width, sum(model.mlp_parts), model.n_layer),
        Linear(model.intermediate_size, width, model.n_layer),
        Linear(width, model.vocab_size, 1),
    )


def flops_per_token(model: GPTConfig) -> int:
    """Floating-point operations of one token's forward and backward pass, in sequences of `block_size`.

    Six for each weight: a multiplication and an addition forward, twice that backward (Kaplan et al. 2020, "Scaling
    Laws for Neural Language Models", section 2.1). For attention, 12 T C in each layer (Chowdhery et al. 2022, "PaLM",
    appendix B), of which a causal one needs half (Dao 2023, "FlashAttention-2", section 4.1). Groups of heads that
    share keys and values save weights, but no scores. It is what the model needs, not what is done: scores that are
    computed and masked, anything that is computed twice, norms, activations and the optimizer do not count. A document
    mask, with which less is needed, is not considered.

    Args:
        model: with its vocabulary filled in.
    """
    weights = sum(linear.n_in * linear.n_out * linear.layers for linear in linear_layers(model))
    return 6 * weights + 6 * model.n_layer * model.n_embd * model.block_size
