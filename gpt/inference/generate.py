"""Generation of tokens after a prompt."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from gpt.configs.observer_config import SampleConfig
from gpt.inference.sampling import sample_next_token


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
    """Yield new tokens one by one, at most `config.max_new_tokens`.

    Generation ends before the end-of-text token, and when the logits of a diverged model are not finite.

    Args:
        model: maps (B, T) tokens to (B, T, V) logits; in evaluation mode meanwhile.
        prompt: at least one token id; the model sees the last `block_size` of them.
        config: length, temperature and filters.
        block_size: context length of the model.
        vocab_size: the tokenizer's; ids above it, which pad the embedding, are never sampled.
        seed: seeds a generator that is used for nothing else.
        end_of_text: id of the end-of-text token; None if there is none.
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
            token = sample_next_token(
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
