"""Sampling of the next token from logits: repetition penalty, temperature, then top-k, top-p and min-p."""

from collections.abc import Sequence

import torch

from gpt.configs.observer_config import SampleConfig

MIN_TEMPERATURE = 1e-30
"""Smallest divisor of logits that float32 can divide by."""


def sample_next_token(
    logits: torch.Tensor, config: SampleConfig, generator: torch.Generator, previous: Sequence[int] = ()
) -> torch.Tensor:
    """Sample one token; return its id, () int64, on the logits' device, without a host sync.

    Args:
        logits: (V,) float32.
        config: temperature, filters and repetition penalty.
        generator: a generator on the logits' device.
        previous: the tokens before it, for the repetition penalty.
    """
    if config.repetition_penalty != 1:
        logits = penalize_repetition(logits, previous, config.repetition_penalty)
    if config.temperature == 0:
        return logits.argmax()
    # Subtracting the maximum first keeps every quotient finite or -inf at the smallest temperatures.
    logits = (logits - logits.max()) / max(config.temperature, MIN_TEMPERATURE)
    logits = keep_min_p(keep_top_p(keep_top_k(logits, config.top_k), config.top_p), config.min_p)
    return _sample_index(logits.softmax(dim=-1), generator)


def penalize_repetition(logits: torch.Tensor, previous: Sequence[int], penalty: float) -> torch.Tensor:
    """Lower the logits of previous tokens: divide those above 0 by the penalty and multiply those below.

    Keskar et al. 2019, "CTRL", section 4.1; the sign is treated as in transformers.
    """
    ids = torch.tensor(sorted(set(previous)), dtype=torch.int64, device=logits.device)
    scores = logits[..., ids]
    return logits.index_copy(-1, ids, torch.where(scores < 0, scores * penalty, scores / penalty))


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Set all but the k largest logits of each row to -inf; 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    return _keep_only(logits, logits.topk(k, dim=-1).indices)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Set all but the smallest set of most likely tokens whose probability reaches p to -inf; 1 keeps all.

    Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration".
    """
    if p >= 1:
        return logits
    ordered, indices = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    dropped = _sum_up(probabilities) - probabilities >= p
    dropped[..., 0] = False  # the most likely token stays, even if p rounds to 0 in float32
    return torch.full_like(logits, -torch.inf).scatter(-1, indices, ordered.masked_fill(dropped, -torch.inf))


def keep_min_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Set the logits of tokens less likely than p times the most likely one to -inf; 0 keeps all.

    Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling".
    """
    if p == 0:
        return logits
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), -torch.inf)


def _sample_index(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return what `torch.multinomial` returns for one sample, bit-exactly, without its checks, which read the GPU.

    The index of the largest p / q, where q is exponentially distributed, is index i with the probability p_i.
    """
    return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax()


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
