"""The composition's own checks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gpt import auto_batch, pipeline
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError
from gpt.models.gpt import GPT
from gpt.pipeline import build_state, require_deterministic_operators
from gpt.resume.find import Start
from gpt.run import open_run
from gpt.utils.distributed import DistContext


class Scatter(nn.Module):
    """A module whose operator has no deterministic form, on a CPU either."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self) -> torch.Tensor:
        return torch.zeros(4).put_(torch.tensor([0, 1]), self.weight).sum()


def test_operator_without_a_deterministic_form_is_named_before_the_first_step() -> None:
    scatter, linear = Scatter(), nn.Linear(2, 1)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(
            UserError, match=r"^--parallel.reproducible: put_ has no deterministic form on this device; "
        ):
            require_deterministic_operators(scatter, lambda model: model())
        require_deterministic_operators(linear, lambda model: model(torch.ones(2)).sum())
    finally:
        torch.use_deterministic_algorithms(False)
    assert linear.weight.grad is None


def test_check_of_operators_does_not_compile() -> None:
    linear = nn.Linear(2, 1)
    compiled: list[object] = []

    def record(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    linear.compile(backend=record)
    require_deterministic_operators(linear, lambda model: model(torch.ones(2)).sum())
    assert not compiled


class Rank(DistContext):
    """One of two ranks; records what rank 0 sends."""

    def __init__(self, rank: int):
        super().__init__("cpu")
        self.rank, self.sent = rank, list[torch.Tensor]()

    def on_main(self, work: Callable[[], Any]) -> Any:
        return work() if self.is_main else None

    def broadcast_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        self.sent += tensors


@pytest.mark.parametrize(
    ("rank", "start", "n_draws"),
    [(0, Start(), 1), (1, Start(), 0), (0, Start(checkpoint=Path("a"), step=3), 0), (0, Start(init_from=Path("a")), 0)],
)
def test_initial_weights_are_drawn_by_rank_0_and_only_if_none_are_loaded(
    rank: int,
    start: Start,
    n_draws: int,
    tiny: Callable[..., TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[GPT] = []
    draw = pipeline.init_weights
    monkeypatch.setattr(pipeline, "init_weights", lambda model, *rest: (drawn.append(model), draw(model, *rest)))
    monkeypatch.setattr("gpt.models.gpt.init_weights", lambda *arguments: pytest.fail("drawn by the constructor"))
    config, dist = tiny(tmp_path), Rank(rank)
    with open_run(config, dry_run=True) as run:
        state = build_state(config, run.plan, dist, start)
    assert len(drawn) == n_draws
    sent = [] if start.loads_weights else list(state.model.parameters())
    assert [tensor.data_ptr() for tensor in dist.sent] == [parameter.data_ptr() for parameter in sent]
    if n_draws:
        monkeypatch.undo()
        expected = GPT(run.plan.model, seed=run.plan.seed).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.model.state_dict().items())


def test_trials_of_memory_draw_no_weights(
    tiny: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt.models.gpt.init_weights", lambda *arguments: pytest.fail("drawn"))
    losses: list[torch.Tensor] = []
    trial = auto_batch.trial_loss
    monkeypatch.setattr(auto_batch, "trial_loss", lambda *a, **k: (losses.append(trial(*a, **k)), losses[-1])[1])
    with open_run(tiny(tmp_path, micro_batch_size="auto", tokens_per_step=12 * 16), dry_run=True):
        pass
    assert losses
    assert torch.stack(losses).isfinite().all()
