import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gpt.configs.observer_config import SampleConfig
from gpt.inference.sampling import keep_min_p, keep_top_k, keep_top_p, penalize_repetition, sample_next_token

LOGITS = torch.randn(8, 50, generator=torch.Generator().manual_seed(0)) * 3
IDS = torch.zeros(8, 1, dtype=torch.int64)


@pytest.mark.parametrize("k", [1, 5, 49, 50])
def test_top_k_equals_transformers(k: int) -> None:
    assert torch.equal(keep_top_k(LOGITS, k), TopKLogitsWarper(k)(IDS, LOGITS))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
def test_top_p_equals_transformers(p: float) -> None:
    assert torch.equal(keep_top_p(LOGITS, p), TopPLogitsWarper(p)(IDS, LOGITS))


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 1.0])
def test_min_p_equals_transformers(p: float) -> None:
    assert torch.equal(keep_min_p(LOGITS, p), MinPLogitsWarper(p)(IDS, LOGITS))


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    previous = [3, 1, 3, 49]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([previous]), LOGITS[:1])
    assert torch.equal(penalize_repetition(LOGITS[0], previous, penalty), expected[0])
    assert torch.equal(penalize_repetition(LOGITS[0], (), penalty), LOGITS[0])


def test_filters_apply_in_the_order_of_transformers() -> None:
    config = SampleConfig(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.2)
    scores = RepetitionPenaltyLogitsProcessor(1.2)(torch.tensor([[1, 2]]), LOGITS[:1])
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(20), TopPLogitsWarper(0.8), MinPLogitsWarper(0.05)):
        scores = warper(IDS[:1], scores)
    generator = torch.Generator().manual_seed(0)
    sampled = {int(sample_next_token(LOGITS[0], config, generator, [1, 2])) for _ in range(2000)}
    assert sampled == set(scores[0].isfinite().nonzero()[:, 0].tolist())


@pytest.mark.parametrize("temperature", [1e-5, 1e-40, 1e-310])
def test_smallest_temperatures_are_greedy(temperature: float) -> None:
    assert sample(temperature).item() == LOGITS[0].argmax().item()


def test_smallest_top_p_keeps_the_most_likely_token() -> None:
    assert sample(1.0, top_p=1e-300).item() == LOGITS[0].argmax().item()


def test_top_k_0_and_top_p_1_filter_nothing() -> None:
    assert torch.equal(keep_top_k(LOGITS, 0), LOGITS)
    assert torch.equal(keep_top_p(LOGITS, 1.0), LOGITS)


def test_top_k_keeps_k_of_equal_logits() -> None:
    assert int(keep_top_k(torch.zeros(1, 10), 3).isfinite().sum()) == 3


def sample(temperature: float, seed: int = 0, rows: int = 1, **filters: float) -> torch.Tensor:
    """Sample `rows` tokens from the first logits."""
    generator = torch.Generator().manual_seed(seed)
    config = SampleConfig.model_validate({"temperature": temperature, **filters})
    return torch.tensor([sample_next_token(LOGITS[0], config, generator) for _ in range(rows)])


def test_temperature_0_takes_the_most_likely_token() -> None:
    assert sample(0.0).item() == LOGITS[0].argmax().item() == sample(0.7, top_k=1).item()


def test_samples_follow_the_probabilities() -> None:
    counts = torch.bincount(sample(0.7, rows=40_000), minlength=50) / 40_000
    expected = TemperatureLogitsWarper(0.7)(IDS[:1], LOGITS[:1]).softmax(-1)[0]
    assert (counts - expected).abs().max() < 0.01


def test_sample_is_that_of_multinomial_bit_exactly() -> None:
    first, second = (torch.Generator().manual_seed(0) for _ in range(2))
    for row in LOGITS:
        expected = torch.multinomial(row.softmax(dim=-1), 1, generator=first)
        assert sample_next_token(row, SampleConfig(temperature=1.0), second) == expected
    assert torch.equal(first.get_state(), second.get_state())


def test_seed_determines_the_sample_and_the_global_generator_is_unused() -> None:
    state = torch.get_rng_state()
    assert torch.equal(sample(1.0, seed=3, rows=20), sample(1.0, seed=3, rows=20))
    assert not torch.equal(sample(1.0, seed=3, rows=20), sample(1.0, seed=4, rows=20))
    assert torch.equal(torch.get_rng_state(), state)


def test_top_p_sums_on_the_cpu_where_kernels_must_be_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, copies = keep_top_p(LOGITS, 0.9), []
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: (copies.append(tensor.shape), tensor)[1])
    assert torch.equal(keep_top_p(LOGITS, 0.9), expected)
    assert copies == []
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert torch.equal(keep_top_p(LOGITS, 0.9), expected)
    assert copies == [LOGITS.shape]
