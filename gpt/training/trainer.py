"""The training loop."""

from contextlib import closing
from itertools import compress
from pathlib import Path
from types import MappingProxyType

from torch import nn

from gpt.checkpoint.app_state import AppState
from gpt.checkpoint.manager import CheckpointManager
from gpt.configs.run_plan import RunPlan
from gpt.errors import UserError
from gpt.machine.flops import flops_per_token
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
from gpt.training.logger import Logger
from gpt.training.metrics import Meter
from gpt.training.step_timer import StepTimer
from gpt.training.subject import Subject
from gpt.training.train_step import TrainStep

FINISHED = "finished"


class Trainer(Subject):
    """Repeats the training step until the plan is fulfilled or an observer returns a Stop.

    Args:
        plan: how long to train, and when to report and save.
        state: what the step changes; holds the progress.
        train_step: consumes a global batch and updates the parameters.
        meter: turns statistics of steps into metrics.
        checkpoints: saves and loads the state.
        journal: records the batches that the run leaves out.
        logger: writes events to the sinks.
        timer: measures the saves.
        resumed_from: checkpoint that `state` was loaded from, for TrainStart.
    """

    def __init__(
        self,
        plan: RunPlan,
        state: AppState,
        *,
        train_step: TrainStep,
        meter: Meter,
        checkpoints: CheckpointManager,
        journal: Journal,
        logger: Logger,
        timer: StepTimer,
        resumed_from: str | None = None,
    ):
        super().__init__(logger)
        self._plan, self._state = plan, state
        self._train_step, self._meter = train_step, meter
        self._checkpoints, self._journal = checkpoints, journal
        self._timer, self._resumed_from = timer, resumed_from
        self._stop_reason: str | None = None

    def train(self) -> str:
        """Train to the end of the plan; whatever ends the run, close the observers, with the error if there is one.

        Returns:
            Why the run ended: `finished`, or the reason of the Stop that ended it.
        """
        error: BaseException | None = None
        try:
            self._act_on(self.notify(TrainStart(self._step, self._plan, self._resumed_from)))
            self._meter.start_window()
            while self._stop_reason is None and self._step < self._plan.max_steps:
                self._advance()
            reason = self._stop_reason or FINISHED
            with self._timer.phase("saving"):
                committed = self._checkpoints.finish()
            self._announce(committed)
            self.notify(TrainEnd(self._step, reason))
            return reason
        except BaseException as failure:
            error = failure
            raise
        finally:
            with closing(self._train_step):
                try:
                    self._checkpoints.close(error)
                finally:
                    self.close(error)

    @property
    def model(self) -> nn.Module:
        """The bare module, for evaluation tasks and observers."""
        return self._state.model

    @property
    def is_record_incomplete(self) -> bool:
        """Records of the run could not be written; known at its end, on rank 0."""
        return self._logger.is_incomplete

    @property
    def _step(self) -> int:
        return self._state.progress.step

    def _advance(self) -> None:
        """Train one step, then report, evaluate and save as far as they are due."""
        # Batch, learning rate and update.
        is_due = self._plan.logs_at(self._step + 1)
        self._meter.add(self._train_step(self._step, self._probes if is_due else ()))
        self._state.progress = self._state.progress.advance(self._plan.batch.tokens_per_step)

        # Report; observers return commands.
        commands = self._announce(self._checkpoints.poll())
        if is_due:
            commands += self._report()
        commands += self.notify(StepEnd(self._step, self._state.progress.tokens))
        if self._plan.saves_at(self._step):
            commands.append(Save())

        # Act on commands. Saving ends the meter's window, and a run that stops leaves no step unreported.
        if commands and not is_due:
            commands += self._report()
        self._act_on(commands)
        if commands or is_due:
            self._meter.start_window()

    def _report(self) -> list[Command]:
        metrics, losses, skips = self._meter.report()
        tokens = self._state.progress.tokens
        metrics |= {
            "tokens": tokens,
            "epoch": self._step * self._plan.batch.sequences_per_step / self._plan.windows_per_epoch,
            "flops": float(tokens * flops_per_token(self._plan.model)),
        }
        steps = range(self._step - len(losses) + 1, self._step + 1)
        skipped = tuple(compress(steps, skips))
        return self.notify(MetricsReady(self._step, MappingProxyType(metrics), losses, skipped))

    def _act_on(self, commands: list[Command]) -> None:
        """Roll back, save at most once, then stop; a run that stops is saved first."""
        rollback = next((command for command in commands if isinstance(command, RollBack)), None)
        if rollback:
            commands = [*commands, *self._roll_back(rollback)]
            commands = [command for command in commands if isinstance(command, Stop)]  # a state to save is gone
        if commands:
            self._logger.flush()
            metrics = [item for command in commands if isinstance(command, Save) for item in command.metrics.items()]
            with self._timer.phase("saving"):
                self._checkpoints.save(self._state, dict(metrics))
            commands = [*commands, *self._announce(self._checkpoints.poll())]
        self._stop_reason = next((command.reason for command in commands if isinstance(command, Stop)), None)

    def _roll_back(self, command: RollBack) -> list[Command]:
        """Load the newest scheduled checkpoint before the bad steps, and leave their batches out from now on.

        Every step is reported, and so judged, before a state is saved. So no checkpoint holds a step that is bad and
        not yet known to be, whenever a signal or the clock asks for one.

        A kill at any point leads to the same run: until the journal has the record, the run resumes from before the
        bad steps with their batches, and rolls back again.
        """
        left = self._step
        commands = self._announce(self._checkpoints.finish())
        last_good = min(command.bad_steps) - 1
        if self._checkpoints.load_newest(self._state, at_most=last_good) is None:
            raise UserError(f"{command.reason}, and no valid checkpoint up to step {last_good} is left to roll back to")
        self._journal.add_rollback(command.bad_steps, self._step, command.reason)
        return commands + self.notify(RolledBack(left, self._step, command.reason))

    def _announce(self, committed: list[tuple[int, Path]]) -> list[Command]:
        """Publish the checkpoints that are on the disk now."""
        return [command for step, path in committed for command in self.notify(CheckpointSaved(step, str(path)))]
