"""The first half of a run: everything that can be found out, checked and prepared before a model is built.

config -> machine -> run folder -> corpus -> plan
"""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from gpt.auto_batch import resolve_auto_micro_batch
from gpt.checkpoint.app_state import AppState, load_model_tensors
from gpt.checkpoint.manifest import CHECKPOINT_MANIFEST, PROGRESS, environment_mismatch, read_checkpoint_manifest
from gpt.checkpoint.run_folder import RunFolder, locate_checkpoint, run_of
from gpt.checkpoint.store import read_weights, verify_and_load
from gpt.configs.batch_plan import plan_batch
from gpt.configs.load import load_config
from gpt.configs.lr_config import LRConfig
from gpt.configs.resume_rule import FLAG
from gpt.configs.run_plan import DTYPE_KEY, TOKENIZER_KEY, MachineFacts, RunPlan, resolve
from gpt.configs.train_config import HORIZON, TrainConfig
from gpt.data.corpus import Corpus, load_corpus, tokenizer_mismatch_note
from gpt.errors import UserError
from gpt.machine.cpu_runtime import set_up_cpu
from gpt.machine.environment import environment
from gpt.machine.hardware import find_device, machine_facts
from gpt.resume.compatibility import Difference
from gpt.resume.find import changes, find_start, require_same_architecture, require_same_identity
from gpt.resume.journal import Record, joined, read_journal
from gpt.utils.atomic_io import (
    append_jsonl,
    keep_jsonl,
    keep_until,
    read_json,
    require_possible,
    require_writable,
    sweep,
    write_json,
    write_text,
)
from gpt.utils.custom_scheduler import build_schedule
from gpt.utils.distributed import DistContext
from gpt.utils.folder_lock import lock_folder, unlock_folder
from gpt.utils.helper import sha256_of_file

log = logging.getLogger(__name__)

ONE_FOLDER = "--run-dir must be one folder that all machines share"


@dataclass(frozen=True)
class Run:
    """A run that is resolved and checked, its corpus prepared; nothing of it is built yet.

    It has the lock of the run's folder until `close`, which a `with` block calls, or the end of the process.
    """

    config: TrainConfig
    dist: DistContext
    folder: RunFolder
    origin: Path | None
    """Checkpoint to continue from."""
    moved_aside: tuple[str, ...]
    """Newer checkpoints that are not whole: the names that they have now."""
    corpus: Corpus
    plan: RunPlan
    journal: list[Record]
    """Of batches that are left out."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the run's folder back, for another process to continue."""
        unlock_folder(self.folder.path)

    @property
    def finished_at(self) -> int | None:
        """The step at which the run is finished already; None where there is something to train or to evaluate."""
        if self.origin is None:
            return None
        step = _step_of(self.origin)
        return step if step >= self.plan.max_steps and not self.plan.evaluates_first else None


def open_run(config: TrainConfig, *, dry_run: bool = False) -> Run:
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
    try:
        origin, set_aside = _claimed(folder, config, dist, dry_run=dry_run)
        facts = replace(machine_facts(device, dist.world_size), runtime=runtime)
        machine = MachineFacts(**dist.broadcast(asdict(facts)))
        corpus = load_corpus(config.data, config.model.block_size, dist)
        plan = resolve_auto_micro_batch(config, resolve(config, machine, corpus.facts), dist)
        note = tokenizer_mismatch_note(config.data, corpus)
        if note:
            plan = replace(plan, notes=(*plan.notes, note))
        if origin is not None:
            plan = _continued(config, plan, folder, origin)
            if corpus.val and _step_of(origin) == plan.max_steps:
                evaluated = dist.on_main(lambda: folder.evaluated_at(plan.max_steps))
                plan = replace(plan, evaluates_first=not evaluated)
        elif config.init_from is not None:
            _require_same_tokenizer(plan, locate_checkpoint(config.init_from, "--init-from"))
        journal = dist.on_main(lambda: _journal(config, plan, folder, origin))
    except BaseException:
        unlock_folder(folder.path)
        raise
    return Run(config, dist, folder, origin, set_aside, corpus, plan, journal)


def restore(run: Run, state: AppState) -> None:
    """Bring the state to where the run begins: a checkpoint of it, another run's weights, or as it is.

    Raises:
        UserError: on every rank where one of them cannot.
    """
    _together(run.dist, lambda: _restore(run, state))


def _restore(run: Run, state: AppState) -> None:
    if run.origin is not None:
        verify_and_load(run.origin, state)
    elif run.config.init_from is not None:
        checkpoint = locate_checkpoint(run.config.init_from, "--init-from")
        try:
            load_model_tensors(state.model, read_weights(checkpoint))
        except UserError as error:
            raise UserError(f"--init-from {checkpoint}: {error}") from error


def write_run_files(run: Run, step: int) -> None:
    """What a run's folder holds beside its checkpoints; records past the step that it begins at are dropped."""
    folder = run.folder
    try:
        write_text(folder.config, folder.to_record(run.config, run.origin).saved_json() + "\n")
        write_json(folder.environment, environment(run.plan.machine.runtime))
        write_text(folder.tokenizer, run.corpus.tokenizer.definition)
        for records in (folder.metrics, folder.samples):
            keep_until(records, step)
        keep_jsonl(folder.lineage, lambda record: True)
        append_jsonl(folder.lineage, _lineage(run, step))
        if run.journal or folder.journal.exists():  # which may end with a torn line
            write_text(folder.journal, "".join(json.dumps(record) + "\n" for record in run.journal))
    except OSError as error:
        raise UserError(f"--run-dir {folder.path}: cannot write there: {error.strerror}") from error


def _lineage(run: Run, step: int) -> dict[str, Any]:
    """Where a start of the run began, with what, and what had changed: a line of lineage.jsonl."""
    origin, machine = run.origin, environment(run.plan.machine.runtime)
    return {
        "step": step,
        "checkpoint": str(origin) if origin else None,
        "manifest_sha256": sha256_of_file(origin / CHECKPOINT_MANIFEST) if origin else None,
        "init_from": str(run.config.init_from) if run.config.init_from and not origin else None,
        "moved_aside": run.moved_aside,
        "changes": {change.name: [change.then, change.now] for change in _changes(run.config, origin)},
        "max_steps": run.plan.max_steps,
        "world_size": run.dist.world_size,
        "torch": machine["libraries"]["torch"],
        "threads": machine["threads"],
        "cpu_capability": machine["cpu_capability"],
        "fused_attention": machine["runtime"]["fused_attention"],
        "git_commit": machine["git_commit"],
    }


def _claimed(
    folder: RunFolder, config: TrainConfig, dist: DistContext, *, dry_run: bool
) -> tuple[Path | None, tuple[str, ...]]:
    """Where the run begins, as rank 0 decides, and what it set aside; every rank must find the same there."""
    claimed, digest, set_aside = dist.on_main(lambda: _claim(folder, config, dry_run=dry_run))
    if claimed is None:
        return None, ()
    origin = Path(claimed)

    def require_same() -> None:
        try:
            same = sha256_of_file(origin / CHECKPOINT_MANIFEST) == digest
        except OSError:
            same = False
        if not same:
            raise UserError(f"rank {dist.rank} does not find {origin} as rank 0 does; {ONE_FOLDER}")

    _together(dist, require_same)
    return origin, tuple(set_aside)


def _claim(folder: RunFolder, config: TrainConfig, *, dry_run: bool) -> tuple[str | None, str | None, list[str]]:
    """Lock the folder, check that a run of `config` may use it, and clear what a killed one left there.

    Returns:
        The checkpoint to begin from, its manifest's SHA-256, and the damaged ones that were set aside.
    """
    if dry_run:
        require_possible(folder.path, "--run-dir")
    else:
        require_writable(folder.path, "--run-dir")
        lock_folder(folder.path, "--run-dir")
        require_writable(folder.checkpoints, "--run-dir")
        sweep(folder.checkpoints)
    start = find_start(folder, config)
    if config.init_from is not None and start.checkpoint is None:
        require_same_architecture(config, locate_checkpoint(config.init_from, "--init-from"))
    set_aside = []
    for checkpoint, reason in start.damaged:
        place = checkpoint if dry_run else folder.move_aside(checkpoint)
        log.warning(f"skipped {checkpoint.name}{'' if dry_run else f', now {place}'}: {reason}")
        set_aside.append(str(place))
    if start.checkpoint is None:
        return None, None, set_aside
    if start.damaged:
        log.warning(f"continuing from {start.checkpoint}, the newest checkpoint that is whole")
    return str(start.checkpoint), sha256_of_file(start.checkpoint / CHECKPOINT_MANIFEST), set_aside


def _journal(config: TrainConfig, plan: RunPlan, folder: RunFolder, origin: Path | None) -> list[Record]:
    """The run's journal with what it inherits: from the run it forks, and from the one that `--spike.journal` names."""
    step = _step_of(origin) if origin else 0
    records = read_journal(folder.journal, plan.order)
    if origin is not None and origin not in folder.committed():
        forked = run_of(origin).journal
        records = joined(records, read_journal(forked, plan.order), forked, plan.order, 0)
    given = config.spike.journal
    if given is not None:
        if not given.is_file():
            raise UserError(f"--spike.journal {given}: no such file; name the journal.jsonl of a run")
        records = joined(records, read_journal(given, plan.order), given, plan.order, step)
    return records


def _step_of(checkpoint: Path) -> int:
    return int(read_json(checkpoint / PROGRESS).get("step", 0))


def _changes(config: TrainConfig, origin: Path | None) -> list[Difference]:
    return changes(config, origin) if origin else []


def _continued(config: TrainConfig, plan: RunPlan, folder: RunFolder, origin: Path) -> RunPlan:
    """Check that `plan` may go on from `origin`, and say in it what has changed."""
    names = plan.identity.keys() - ({DTYPE_KEY} if config.resume_with_changes else set())
    require_same_identity(plan.identity, origin, names)
    step = _step_of(origin)
    if step >= plan.max_steps and origin not in folder.committed():
        raise UserError(f"--resume {origin} is at step {step} already, and the run would end at {plan.max_steps}")
    notes = [f"changed at step {step}: {change}" for change in _changes(config, origin)]
    if not _keeps_rates(config, plan, origin, step):
        notes.append(f"the first {step} steps had other learning rates than this schedule gives them")
    if unlike := environment_mismatch(origin, read_checkpoint_manifest(origin)):
        notes.append(unlike)
    return replace(plan, notes=(*plan.notes, *notes))


def _keeps_rates(config: TrainConfig, plan: RunPlan, origin: Path, step: int) -> bool:
    """Whether the schedule gives the steps already taken the rates that they had.

    Raises:
        UserError: it does not, and the user has not said that this is meant.
    """
    saved = load_config(origin / "config.json")
    horizon = {name: getattr(saved, name) for name in HORIZON}
    former = resolve(config.model_copy(update={**horizon, "lr": saved.lr}), plan.machine, plan.corpus)
    then = build_schedule(former.lr, former.max_steps)

    def keeps(lr: LRConfig) -> bool:
        now = build_schedule(lr, plan.max_steps)
        return all(then(past) == now(past) for past in range(step))

    if keeps(plan.lr):
        return True
    if config.resume_with_changes:
        return False
    fixed = plan.lr.model_copy(update={"decay_steps": former.lr.decay_steps})
    remedy = f"--lr.decay-steps {fixed.decay_steps} keeps the former decay, or " if keeps(fixed) else ""
    raise UserError(
        f"{origin} cannot be continued: its {step} steps had the learning rates of a run of {former.max_steps} steps, "
        f"and a run of {plan.max_steps} gives them others; {remedy}{FLAG} goes on with those"
    )


def _together(dist: DistContext, work: Callable[[], None]) -> None:
    """Do `work` on every rank.

    Raises:
        UserError: it failed on one; each tells its own failure, or whose it was.
    """
    failure: UserError | None = None
    try:
        work()
    except UserError as error:
        failure = error
    failed = dist.sum_on_host([float(rank == dist.rank and failure is not None) for rank in range(dist.world_size)])
    if failure is not None:
        raise failure
    if any(failed):
        raise UserError(f"rank {failed.index(1.0)} cannot read what the run begins from; {ONE_FOLDER}")


def _require_same_tokenizer(plan: RunPlan, checkpoint: Path) -> None:
    try:
        require_same_identity(plan.identity, checkpoint, {TOKENIZER_KEY})
    except UserError as error:
        theirs = run_of(checkpoint).tokenizer
        raise UserError(
            f"--init-from {checkpoint} was trained with another tokenizer; add --data.tokenizer {theirs}"
        ) from error
