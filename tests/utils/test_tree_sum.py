import pytest
import torch

from gpt.utils.tree_sum import TreeAccumulator, tree_sum

LEAVES = list(torch.randn(16, 1000, generator=torch.Generator().manual_seed(0)))


def test_tree_sum_adds_neighbours() -> None:
    a, b, c, d, e = LEAVES[:5]
    assert torch.equal(tree_sum([a]), a)
    assert torch.equal(tree_sum([a, b, c, d]), (a + b) + (c + d))
    assert torch.equal(tree_sum([a, b, c, d, e]), ((a + b) + (c + d)) + e)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_sums_of_blocks_add_up_bit_exactly_to_the_sum_of_all_leaves(ranks: int) -> None:
    size = len(LEAVES) // ranks
    sums = []
    for rank in range(ranks):
        accumulator = TreeAccumulator()
        for leaf in LEAVES[rank * size : (rank + 1) * size]:
            accumulator.add([leaf.clone(), 2 * leaf])
        one, two = accumulator.take()
        assert torch.equal(2 * one, two)
        sums.append(one)
    assert torch.equal(tree_sum(sums), tree_sum(LEAVES))
    assert not torch.equal(tree_sum(sums), torch.stack(LEAVES).sum(dim=0))


def test_an_accumulator_holds_one_subtree_of_each_size_and_take_empties_it() -> None:
    accumulator = TreeAccumulator()
    held = []
    for leaf in LEAVES:
        accumulator.add([leaf.clone()])
        held.append(len(accumulator._subtrees))
    assert max(held) == 4
    accumulator.take()
    accumulator.add([LEAVES[0].clone()])
    assert torch.equal(accumulator.take()[0], LEAVES[0])
