import torch
import torch.nn.functional as F

from gpt.models.loss import IGNORED, cross_entropy_sum


def test_it_is_the_sum_over_counted_targets() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    targets[1, 2:] = IGNORED
    counted = targets != IGNORED
    expected = F.cross_entropy(logits[counted], targets[counted]) * counted.sum()
    torch.testing.assert_close(cross_entropy_sum(logits, targets), expected)


def test_it_is_computed_in_float32_whatever_the_logits_are() -> None:
    logits, targets = torch.randn(1, 4, 9).bfloat16(), torch.randint(9, (1, 4))
    loss = cross_entropy_sum(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cross_entropy_sum(logits.float(), targets))
