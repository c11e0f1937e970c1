import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gpt.ops.rope import RopeScaling, apply_rope, rope_cos_sin, scale_frequencies

THETA = 10_000.0


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_rope_scores_depend_on_distances_alone() -> None:
    q, k = randn(1, 1, 1, 8), randn(1, 1, 1, 8, seed=1)

    def score(at: int, other: int) -> torch.Tensor:
        pairs = ((q, at), (k, other))
        rotated = [apply_rope(x, rope_cos_sin(torch.tensor([position]), 8, THETA)) for x, position in pairs]
        torch.testing.assert_close(rotated[0].norm(), q.norm())
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(9, 2), score(1007, 1000))
    assert abs(score(9, 2) - score(9, 3)) > 1e-2


def test_sequences_may_have_positions_of_their_own() -> None:
    x = randn(2, 3, 4, 8)
    positions = torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]])
    rows = [apply_rope(row[None], rope_cos_sin(own, 8, THETA)) for row, own in zip(x, positions, strict=True)]
    together = apply_rope(x, rope_cos_sin(positions, 8, THETA))
    assert torch.equal(together, torch.cat(rows))
    assert torch.equal(together[1, :, 2], x[1, :, 2])


def test_theta_is_the_base_of_the_wavelengths() -> None:
    cos, sin = rope_cos_sin(torch.tensor([3]), 4, 100.0)
    angles = torch.tensor([[3.0, 0.3, 3.0, 0.3]])
    torch.testing.assert_close((cos, sin), (angles.cos(), angles.sin()))


def test_scaled_frequencies_are_those_of_llama_3() -> None:
    parameters = {"rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    parameters |= {"rope_type": "llama3", "original_max_position_embeddings": 8192}
    config = LlamaConfig(head_dim=128, max_position_embeddings=131_072, rope_parameters=parameters)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    frequencies = 500_000.0 ** (-torch.arange(0, 128, 2) / 128)
    scaled = scale_frequencies(frequencies, RopeScaling(8.0, 1.0, 4.0, 8192))
    torch.testing.assert_close(scaled, expected, rtol=1e-6, atol=0)
    assert (scaled == frequencies).sum() > 20  # the high ones
    torch.testing.assert_close(scaled[-20:], frequencies[-20:] / 8)
