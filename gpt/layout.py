"""The first half of a run: everything that can be found out, checked and prepared before a model is built.

config -> machine -> run folder -> corpus -> plan
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gpt.checkpoint.app_state import AppState, load_model_tensors
from gpt.checkpoint.run_folder import (
    RunFolder,
    locate_checkpoint,
    require_same_architecture,
    require_same_identity,
    run_of,
)
from gpt.checkpoint.store import PROGRESS, read_checkpoint, read_json, read_weights
from gpt.configs.cli import load_config
from gpt.configs.run_plan import TOKENIZER, MachineFacts, RunPlan, plan_batch, resolve
from gpt.configs.train_config import HORIZON, TrainConfig
from gpt.data.corpus import Corpus, open_corpus, prepare, tokenizer_note
from gpt.errors import UserError
from gpt.fitting import fitted
from gpt.planning.environment import environment
from gpt.planning.hardware import find_device, machine_facts
from gpt.utils.atomic_io import keep_jsonl, require_possible, require_writable, sweep, write_json, write_text
from gpt.utils.cpu_runtime import set_up_cpu
from gpt.utils.custom_scheduler import build_schedule
from gpt.utils.distributed import DistContext


@dataclass(frozen=True)
class Layout:
    """A run that is resolved and checked, its corpus prepared; nothing of it is built yet."""

    config: TrainConfig
    dist: DistContext
    folder: RunFolder
    origin: Path | None
    """Checkpoint to continue from."""
    corpus: Corpus
    plan: RunPlan

    @property
    def finished_at(self) -> int | None:
        """The step at which the run is finished already; None where there is something to train."""
        if self.origin is None:
            return None
        step = _step_of(self.origin)
        return step if step >= self.plan.max_steps else None


def lay_out(config: TrainConfig, *, dry_run: bool = False) -> Layout:
    """Find the machine, check everything that can be checked, prepare the corpus, resolve the plan.

    The cheap checks come before the corpus, whose preparation may take a while. With `dry_run` the run's folder is
    looked at and not written to.

    Raises:
        UserError: whatever the user can mend.
    """
    runtime = set_up_cpu(config.runtime, reproducible=config.parallel.reproducible)
    device = find_device(config.device)
    dist = DistContext(device, config.parallel.step_timeout)
    plan_batch(config, dist.world_size)
    folder = RunFolder(config.run_dir)
    claimed = dist.on_main(lambda: _claim(folder, config, dry_run=dry_run))
    origin = Path(claimed) if claimed else None
    facts = replace(machine_facts(device, dist.world_size), runtime=runtime)
    machine = MachineFacts(**dist.broadcast(asdict(facts)))
    corpus = _open(config, dist)
    plan = resolve(config, machine, corpus.facts)
    plan = fitted(config, plan, dist)
    note = tokenizer_note(config.data, corpus)
    if note:
        plan = replace(plan, notes=(*plan.notes, note))
    if origin is not None:
        plan = _continued(config, plan, folder, origin)
    elif config.init_from is not None:
        _require_same_tokenizer(plan, locate_checkpoint(config.init_from, "--init-from"))
    return Layout(config, dist, folder, origin, corpus, plan)


def restore(layout: Layout, state: AppState) -> None:
    """Bring the state to where the run begins: a checkpoint of it, another run's weights, or as it is."""
    if layout.origin is not None:
        read_checkpoint(layout.origin, state)
    elif layout.config.init_from is not None:
        checkpoint = locate_checkpoint(layout.config.init_from, "--init-from")
        try:
            load_model_tensors(state.model, read_weights(checkpoint))
        except UserError as error:
            raise UserError(f"--init-from {checkpoint}: {error}") from error


def write_run_files(layout: Layout, step: int) -> None:
    """What a run's folder holds beside its checkpoints; records past the step that it begins at are dropped."""
    folder = layout.folder
    try:
        write_text(folder.config, folder.to_record(layout.config, layout.origin).model_dump_json(indent=2) + "\n")
        write_json(folder.environment, environment(layout.plan.machine.runtime))
        write_text(folder.tokenizer, layout.corpus.tokenizer.definition)
        for records in (folder.metrics, folder.samples):
            keep_jsonl(records, lambda record: isinstance(at := record.get("step"), int) and at <= step)
    except OSError as error:
        raise UserError(f"--run-dir {folder.path}: cannot write there: {error.strerror}") from error


def _claim(folder: RunFolder, config: TrainConfig, *, dry_run: bool) -> str | None:
    """Check that a run of `config` may use its folder, and clear what a killed one left there."""
    origin = folder.origin(config)
    if config.init_from is not None and origin is None:
        require_same_architecture(config, locate_checkpoint(config.init_from, "--init-from"))
    if dry_run:
        require_possible(folder.path, "--run-dir")
    else:
        require_writable(folder.path, "--run-dir")
        sweep(folder.checkpoints)
    return str(origin) if origin else None


def _open(config: TrainConfig, dist: DistContext) -> Corpus:
    """The corpus, prepared and packed by one process of each machine and opened by all."""

    def make_ready() -> list[str]:
        folders = prepare(config.data)
        open_corpus(folders, config.data, config.model.block_size)  # which packs it
        return [str(folder) for folder in folders]

    folders = [Path(folder) for folder in dist.first_on_each_machine(make_ready)]
    return open_corpus(folders, config.data, config.model.block_size)


def _step_of(checkpoint: Path) -> int:
    return int(read_json(checkpoint / PROGRESS).get("step", 0))


def _continued(config: TrainConfig, plan: RunPlan, folder: RunFolder, origin: Path) -> RunPlan:
    """Check that `plan` may go on from `origin`, and say so in it where the steps already taken had other rates."""
    require_same_identity(plan.identity, origin, plan.identity.keys())
    step = _step_of(origin)
    if step >= plan.max_steps and origin not in folder.committed():
        raise UserError(f"--resume {origin} is at step {step} already, and the run would end at {plan.max_steps}")
    saved = load_config(origin / "config.json")
    horizon = {name: getattr(saved, name) for name in HORIZON}
    former = resolve(config.model_copy(update=horizon), plan.machine, plan.corpus)
    then, now = (build_schedule(p.lr, p.max_steps) for p in (former, plan))
    if all(then(past) == now(past) for past in (step // 2, step - 1)):
        return plan
    note = (
        f"the first {step} steps had the learning rates of a run of {former.max_steps}, not of {plan.max_steps}; "
        f"--lr.decay-steps {former.lr.decay_steps} keeps the former decay"
    )
    return replace(plan, notes=(*plan.notes, note))


def _require_same_tokenizer(plan: RunPlan, checkpoint: Path) -> None:
    try:
        require_same_identity(plan.identity, checkpoint, {TOKENIZER})
    except UserError as error:
        theirs = run_of(checkpoint).tokenizer
        raise UserError(
            f"--init-from {checkpoint} was trained with another tokenizer; add --data.tokenizer {theirs}"
        ) from error
