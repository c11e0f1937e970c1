import torch

from gpt.ops.rope import apply_rope, rope_cos_sin

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
