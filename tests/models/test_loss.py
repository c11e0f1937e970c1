import pytest
import torch
import torch.nn.functional as F

from gpt.models import loss as module
from gpt.models.loss import IGNORED, head_loss

B, T, C, V = 3, 5, 4, 7


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden, head = (torch.randn(size, requires_grad=True) for size in ((B, T, C), (V, C)))
    targets = torch.randint(V, (B, T))
    targets[1, 2:] = IGNORED
    return hidden, head, targets


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("rows", [1, 4, 15, 100])
def test_it_is_torchs_cross_entropy_however_it_is_cut(
    rows: int, softcap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAST_ROWS", rows)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 0)
    hidden, head, targets = inputs()
    ours = head_loss(hidden, head, targets, softcap=softcap)
    logits = hidden @ head.t()
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    theirs = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours, (hidden, head)), torch.autograd.grad(theirs, (hidden, head)), strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_it_is_computed_in_float32_whatever_the_logits_are() -> None:
    hidden, head, targets = inputs()
    loss = head_loss(hidden.bfloat16(), head.bfloat16(), targets)
    assert loss.dtype == torch.float32
    logits = (hidden.bfloat16() @ head.bfloat16().t()).float()
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
