"""Sampling of the next token from logits: temperature, then top-k, then top-p."""

import torch

MIN_TEMPERATURE = 1e-30
"""Smallest divisor of logits that float32 can divide by."""


def sample_next_token(
    logits: torch.Tensor, *, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> torch.Tensor:
    """Sample one token per row.

    Args:
        logits: (B, V).
        temperature: divides the logits; 0 takes the most likely token.
        top_k: number of most likely tokens to keep; 0 keeps all.
        top_p: probability that the most likely tokens to keep reach together (Holtzman et al. 2020).
        generator: a generator on the logits' device.

    Returns:
        (B,) int64.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    # Subtracting the maximum first keeps every quotient finite or -inf at the smallest temperatures.
    logits = (logits - logits.max(dim=-1, keepdim=True).values) / max(temperature, MIN_TEMPERATURE)
    logits = keep_top_p(keep_top_k(logits, top_k), top_p)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator).squeeze(-1)


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Set all but the k largest logits of each row to -inf; 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    return _keep_only(logits, logits.topk(k, dim=-1).indices)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Set all but the smallest set of most likely tokens whose probability reaches p to -inf; 1 keeps all."""
    if p >= 1:
        return logits
    ordered, indices = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    dropped = _sum_up(probabilities) - probabilities >= p
    dropped[..., 0] = False  # the most likely token stays, even if p rounds to 0 in float32
    return torch.full_like(logits, -torch.inf).scatter(-1, indices, ordered.masked_fill(dropped, -torch.inf))


def _sum_up(probabilities: torch.Tensor) -> torch.Tensor:
    """Return cumulative sums along the last dimension; on the CPU where CUDA's kernel may not be used.

    It is not deterministic, so `torch.use_deterministic_algorithms` refuses it.
    """
    if probabilities.is_cuda and torch.are_deterministic_algorithms_enabled():
        return probabilities.cpu().cumsum(dim=-1).to(probabilities.device)
    return probabilities.cumsum(dim=-1)


def _keep_only(logits: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Set all logits but those at `indices` to -inf."""
    return torch.full_like(logits, -torch.inf).scatter(-1, indices, logits.gather(-1, indices))
