"""Logits -> the next token: pure filters, applied in the order temperature, top-k, top-p."""

import torch

MIN_TEMPERATURE = 1e-30
"""What float32 can still divide by."""


def next_token(
    logits: torch.Tensor, *, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> torch.Tensor:
    """Draw one token per row; temperature 0 takes the most likely one.

    Args:
        logits: (B, V).
        temperature: divides the logits.
        top_k: keep the k most likely; 0 keeps all.
        top_p: keep the most likely that together reach this probability (Holtzman et al. 2020).
        generator: source of the draw.

    Returns:
        (B,) int64.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    # Relative to the largest, so that no temperature, however small, makes an infinity of it.
    logits = (logits - logits.max(dim=-1, keepdim=True).values) / max(temperature, MIN_TEMPERATURE)
    logits = keep_top_p(keep_top_k(logits, top_k), top_p)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator).squeeze(-1)


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """All but the k largest of each row become -inf; 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    return _keep(logits, logits.topk(k, dim=-1).indices)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the smallest set of most likely tokens whose probability reaches p; 1 keeps all."""
    if p >= 1:
        return logits
    ordered, indices = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    dropped = probabilities.cumsum(dim=-1) - probabilities >= p
    dropped[..., 0] = False  # also where p is too small for float32
    return torch.full_like(logits, -torch.inf).scatter(-1, indices, ordered.masked_fill(dropped, -torch.inf))


def _keep(logits: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return torch.full_like(logits, -torch.inf).scatter(-1, indices, logits.gather(-1, indices))
