from typing import Any

import pytest
import torch

from gpt.errors import UserError
from tests.checkpoint.test_store import make_state, trained_state


@pytest.mark.parametrize(
    "change", [{"step": -1}, {"step": "2"}, {"tokens": 2**63}, {"skipped_updates": True}, {"tokens": None}]
)
def test_damaged_progress_is_refused(change: dict[str, Any]) -> None:
    saved = trained_state()
    with pytest.raises(UserError, match=f"progress is damaged: {next(iter(change))} is"):
        make_state(1).load(saved.model_tensors(), saved.optimizer_tensors(), saved.progress_json() | change)


def test_an_optimizer_state_of_other_shapes_is_refused() -> None:
    saved = trained_state()
    wrong = saved.optimizer_tensors() | {"wte.weight.exp_avg": torch.zeros(3)}
    with pytest.raises(
        UserError, match=r"another optimizer: wte.weight.exp_avg has shape \(3,\) in the checkpoint and \(11, 8\)"
    ):
        make_state(1).load(saved.model_tensors(), wrong, saved.progress_json())
