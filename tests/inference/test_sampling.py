import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from gpt.inference.sampling import keep_top_k, keep_top_p, next_token

LOGITS = torch.randn(8, 50, generator=torch.Generator().manual_seed(0)) * 3
IDS = torch.zeros(8, 1, dtype=torch.int64)


@pytest.mark.parametrize("k", [1, 5, 49, 50])
def test_top_k_is_transformers(k: int) -> None:
    assert torch.equal(keep_top_k(LOGITS, k), TopKLogitsWarper(k)(IDS, LOGITS))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
def test_top_p_is_transformers(p: float) -> None:
    assert torch.equal(keep_top_p(LOGITS, p), TopPLogitsWarper(p)(IDS, LOGITS))


@pytest.mark.parametrize("temperature", [1e-5, 1e-40, 1e-310])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    assert random_bits(temperature).item() == LOGITS[0].argmax().item()


def test_the_smallest_top_p_keeps_the_most_likely() -> None:
    assert random_bits(1.0, top_p=1e-300).item() == LOGITS[0].argmax().item()


def test_zero_and_one_filter_nothing() -> None:
    assert torch.equal(keep_top_k(LOGITS, 0), LOGITS)
    assert torch.equal(keep_top_p(LOGITS, 1.0), LOGITS)


def test_top_k_keeps_k_where_logits_are_equal() -> None:
    assert int(keep_top_k(torch.zeros(1, 10), 3).isfinite().sum()) == 3


def random_bits(temperature: float, top_k: int = 0, top_p: float = 1.0, seed: int = 0, rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = LOGITS[:1].expand(rows, -1)
    return next_token(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)


def test_temperature_zero_is_the_most_likely_token() -> None:
    assert random_bits(0.0).item() == LOGITS[0].argmax().item() == random_bits(0.7, top_k=1).item()


def test_draws_follow_the_probabilities() -> None:
    counts = torch.bincount(random_bits(0.7, rows=40_000), minlength=50) / 40_000
    expected = TemperatureLogitsWarper(0.7)(IDS[:1], LOGITS[:1]).softmax(-1)[0]
    assert (counts - expected).abs().max() < 0.01


def test_the_seed_decides_the_draw_and_no_other_generator_is_touched() -> None:
    state = torch.get_rng_state()
    assert torch.equal(random_bits(1.0, seed=3, rows=20), random_bits(1.0, seed=3, rows=20))
    assert not torch.equal(random_bits(1.0, seed=3, rows=20), random_bits(1.0, seed=4, rows=20))
    assert torch.equal(torch.get_rng_state(), state)
