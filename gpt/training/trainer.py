"""The training loop."""

from itertools import compress
from pathlib import Path
from types import MappingProxyType

from gpt.checkpoint.app_state import AppState
from gpt.checkpoint.manager import CheckpointManager
from gpt.configs.run_plan import RunPlan
from gpt.data.data_loader import DataLoader
from gpt.errors import UserError
from gpt.optim.build import set_learning_rate
from gpt.resume.journal import Journal
from gpt.training.events import (
    CheckpointSaved,
    Command,
    MetricsReady,
    RollBack,
    RolledBack,
    Save,
    StepEnd,
    Stop,
    TrainEnd,
    TrainStart,
)
from gpt.training.metrics import Meter
from gpt.training.subject import Subject
from gpt.training.train_step import TrainStep
from gpt.utils.custom_scheduler import Schedule

FINISHED = "finished"


class Trainer(Subject):
    """Repeats the step until the plan is fulfilled or an observer says stop.

    Args:
        plan: how long to train, and when to report and save.
        state: what the step changes; holds the progress.
        loader: global step -> batch.
        train_step: batch -> update.
        schedule: steps taken -> factor of every highest rate.
        meter: statistics -> metrics.
        checkpoints: writes the state, and reads it back.
        journal: of what the run leaves out.
        resumed_from: the checkpoint that `state` was loaded from, for those who watch.
    """

    def __init__(
        self,
        plan: RunPlan,
        state: AppState,
        *,
        loader: DataLoader,
        train_step: TrainStep,
        schedule: Schedule,
        meter: Meter,
        checkpoints: CheckpointManager,
        journal: Journal,
        resumed_from: str | None = None,
    ):
        super().__init__()
        self._plan, self._state = plan, state
        self._loader, self._train_step, self._schedule = loader, train_step, schedule
        self._meter, self._checkpoints, self._journal = meter, checkpoints, journal
        self._resumed_from = resumed_from
        self._stop_reason: str | None = None

    def train(self) -> str:
        """Run to the end; returns the reason for it: `finished`, or that of the Stop that ended it.

        Observers are closed whatever happens, and told of the error if there is one.
        """
        error: BaseException | None = None
        try:
            self._execute(self.notify(TrainStart(self._step, self._plan, self._resumed_from)))
            self._meter.start_window()
            while self._stop_reason is None and self._step < self._plan.max_steps:
                self._advance()
            reason = self._stop_reason or FINISHED
            self._tell_of(self._checkpoints.finish())
            self.notify(TrainEnd(self._step, reason))
            return reason
        except BaseException as failure:
            error = failure
            raise
        finally:
            with self._loader:
                try:
                    self._checkpoints.close(error)
                finally:
                    self.close(error)

    @property
    def _step(self) -> int:
        return self._state.progress.step

    def _advance(self) -> None:
        """One step, and everything that is due after it."""
        batch = self._loader.get_batch(self._step)
        multiplier = self._schedule(self._step)
        rate = self._plan.lr.max_lr * multiplier
        set_learning_rate(self._state.optimizer, multiplier)
        self._meter.add(self._train_step(self._step, batch))
        self._state.progress = self._state.progress.advance(self._plan.batch.tokens_per_step)

        commands = self._tell_of(self._checkpoints.poll())
        reports = self._plan.logs_at(self._step)
        if reports:
            commands += self.notify(self._metrics(rate))
        commands += self.notify(StepEnd(self._step, self._state.progress.tokens))
        if self._plan.saves_at(self._step):
            commands.append(Save())
        if commands and not reports:  # saving closes the window, and a run that stops leaves no step unreported
            commands += self.notify(self._metrics(rate))
            reports = True
        self._execute(commands)
        if reports:
            self._meter.start_window()

    def _metrics(self, rate: float) -> MetricsReady:
        metrics, losses, skips = self._meter.report()
        metrics |= {"lr": rate, "tokens": self._state.progress.tokens}
        steps = range(self._step - len(losses) + 1, self._step + 1)
        return MetricsReady(self._step, MappingProxyType(metrics), losses, tuple(compress(steps, skips)))

    def _execute(self, commands: list[Command]) -> None:
        """Go back, save at most once, then stop; a run that stops is saved first."""
        stops = [command.reason for command in commands if isinstance(command, Stop)]
        rollback = next((command for command in commands if isinstance(command, RollBack)), None)
        if rollback:
            self._roll_back(rollback)
            commands = [command for command in commands if isinstance(command, Stop)]
        if commands:
            metrics = [item for command in commands if isinstance(command, Save) for item in command.metrics.items()]
            self._checkpoints.save(self._state, dict(metrics))
            told = self._tell_of(self._checkpoints.poll())
            stops += [command.reason for command in told if isinstance(command, Stop)]
        if stops:
            self._stop_reason = stops[0]

    def _roll_back(self, command: RollBack) -> None:
        """Load the newest checkpoint before the bad steps, and leave their batches out from now on.

        Killed at any point, the run goes on in the same way: as long as the journal has no record, from before the bad
        steps with their batches, which brings it here again.
        """
        left = self._step
        self._tell_of(self._checkpoints.finish())
        last_good = min(command.bad_steps) - 1
        if self._checkpoints.load_newest(self._state, at_most=last_good) is None:
            raise UserError(f"{command.reason}, and there is no sound checkpoint up to step {last_good} to go back to")
        self._journal.add_rollback(command.bad_steps, self._step, command.reason)
        commands = self.notify(RolledBack(left, self._step, command.reason))
        assert not commands, "nobody commands after a rollback"

    def _tell_of(self, committed: list[tuple[int, Path]]) -> list[Command]:
        """Publish what is on the disk now."""
        return [command for step, path in committed for command in self.notify(CheckpointSaved(step, str(path)))]
