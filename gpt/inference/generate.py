"""Continue a sequence of tokens."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from gpt.configs.observer_config import SampleConfig
from gpt.inference.sampling import next_token


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: Sequence[int],
    config: SampleConfig,
    *,
    block_size: int,
    vocab_size: int,
    seed: int,
    end_of_text: int | None = None,
) -> Iterator[int]:
    """Yield new tokens one by one, at most `config.max_new_tokens`; end-of-text ends earlier and is not yielded.

    So does a model whose logits are not finite: there is nothing to draw from.

    Args:
        model: maps (B, T) tokens to (B, T, V) logits; it is in evaluation mode while tokens are drawn.
        prompt: at least one token; of a longer one the last `block_size` are seen.
        config: temperature and filters.
        block_size: longest context of the model.
        vocab_size: the tokenizer's size: rows that pad the embedding are never drawn.
        seed: of the draws, which no other generator sees.
        end_of_text: id of the token that ends a text.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.tensor([list(prompt)], device=device)  # (1, T)
    was_training = model.training
    model.eval()
    try:
        for _ in range(config.max_new_tokens):
            logits = model(tokens[:, -block_size:])[:, -1, :vocab_size].float()  # (1, V)
            if not logits.isfinite().all():
                return
            token = next_token(
                logits,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                generator=generator,
            )
            if int(token) == end_of_text:
                return
            yield int(token)
            tokens = torch.cat([tokens, token[:, None]], dim=1)
    finally:
        model.train(was_training)
