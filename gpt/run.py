"""Open a run: everything that can be found, checked and prepared without a model.

config -> machine -> run folder (where it starts) -> corpus -> plan
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from gpt.auto_batch import resolve_auto_micro_batch
from gpt.checkpoint.run_folder import RunFolder, find_run
from gpt.configs.batch_plan import plan_batch
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.run_plan import DTYPE_KEY, TOKENIZER_KEY, MachineFacts, RunPlan, resolve
from gpt.configs.train_config import TrainConfig
from gpt.configs.user_folders import temporary_folder
from gpt.data.chat_template import find_chat_template
from gpt.data.corpus import Corpus, load_corpus
from gpt.device_check import choose_device
from gpt.errors import UserError
from gpt.fast_paths import try_fast_paths
from gpt.interop.families import require_family
from gpt.machine.cpu_runtime import set_up_cpu
from gpt.machine.cuda_runtime import set_up_cuda, uses_tf32
from gpt.machine.environment import describe_environment
from gpt.machine.hardware import detect_machine
from gpt.machine.rank_identity import describe_rank
from gpt.resume.compatibility import adopt_corpus, adopt_dtype, keeps_learning_rates, require_same_identity
from gpt.resume.find import Start, claim_start, require_same_manifest
from gpt.resume.journal import Record, collect_records
from gpt.utils.atomic_io import append_jsonl, filter_jsonl, truncate_jsonl, write_json, write_text
from gpt.utils.distributed import DistContext
from gpt.utils.folder_lock import unlock_folder


@dataclass(frozen=True)
class Run:
    """A run that is resolved and checked, with its corpus prepared and no model built.

    It holds the lock of the run's folder until `close`, which a `with` block calls, or until the process ends.
    """

    config: TrainConfig
    dist: DistContext
    folder: RunFolder
    start: Start
    corpus: Corpus
    plan: RunPlan
    journal: list[Record]
    """Records of batches that are left out."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock of the run's folder."""
        unlock_folder(self.folder.path)

    @property
    def finished_at(self) -> int | None:
        """Last step of a finished run; None if there is something left to train or to evaluate."""
        is_finished = self.start.checkpoint is not None and self.start.step >= self.plan.max_steps
        return self.start.step if is_finished and not self.plan.evaluates_first else None


def open_run(config: TrainConfig, *, dry_run: bool = False) -> Run:
    """Find the machine, check everything that can be checked, prepare the corpus and resolve the plan.

    Cheap checks come before the corpus, which may take a while to prepare. With `dry_run` nothing is written to the
    run's folder.

    Raises:
        UserError: the user can mend something.
    """
    dist, machine = open_machine(config)
    config = config.on_device(machine.device)
    plan_batch(config, dist.world_size)
    folder = RunFolder(config.run_dir)
    try:
        with dist.report_lost_ranks():
            found = dist.on_main(
                lambda: claim_start(folder, config, machine.device, dry_run=dry_run).model_dump(mode="json")
            )
            start = Start.model_validate(found)
            dist.on_every_rank(lambda: require_same_manifest(start, dist.rank))
            corpus = load_corpus(config.data, config.model.block_size, dist)
            plan = resolve_auto_micro_batch(config, resolve(config, machine, corpus.facts), dist)
            plan = try_fast_paths(config, plan, dist)
            plan = _with_notes(plan, [*corpus.notes, *_note_temporary_cache(config), *_note_no_export(plan.model)])
            plan = _resume_plan(config, plan, start, has_validation=bool(corpus.val))
            records = dist.on_main(lambda: collect_records(folder, start, plan.order, config.spike.journal))
    except BaseException:
        unlock_folder(folder.path)
        raise
    return Run(config, dist, folder, start, corpus, plan, records)


def open_machine(config: TrainConfig) -> tuple[DistContext, MachineFacts]:
    """Set up this process, join the other ranks, and return the facts of rank 0's machine, which plan for all.

    Raises:
        UserError: the device is missing, or the ranks do not meet.
    """
    runtime = set_up_cpu(config.runtime, reproducible=config.parallel.reproducible)
    device, notes = choose_device(config.device, config.model, config.data.cache_dir)
    if device == "cuda":
        runtime |= set_up_cuda(reproducible=config.parallel.reproducible)
    dist = DistContext(
        device,
        config.parallel.step_timeout,
        start_timeout=config.parallel.start_timeout,
        describe=lambda: describe_rank(config),
        record_folder=config.run_dir,
    )
    if device == "cuda":
        runtime["tf32"] = uses_tf32()
    if dist.interface:
        notes = (*notes, f"the processes meet over {dist.interface} (gloo)")
    facts = dist.broadcast(asdict(replace(detect_machine(device, dist.world_size), runtime=runtime, notes=notes)))
    return dist, MachineFacts(**facts | {"notes": tuple(facts["notes"])})


def write_run_files(run: Run) -> None:
    """Write the files of a run's folder, on rank 0; drop the records of steps after the one that the run starts from.

    Raises:
        UserError: the folder cannot be written to.
    """
    run.dist.on_main(lambda: _write_run_files(run))


def _write_run_files(run: Run) -> None:
    folder, environment = run.folder, describe_environment(run.plan.machine.runtime)
    try:
        write_text(folder.config, folder.record_origin(run.config, run.start.checkpoint).saved_json() + "\n")
        write_json(folder.environment, environment)
        run.corpus.tokenizer.save(folder.path)
        _keep_chat_template(run)
        for records in (folder.metrics, folder.samples):
            truncate_jsonl(records, run.start.step)
        if run.journal or folder.journal.exists():  # its last line may be torn
            write_text(folder.journal, "".join(json.dumps(record) + "\n" for record in run.journal))
        filter_jsonl(folder.lineage, lambda record: True)  # drops a torn last line
        append_jsonl(folder.lineage, _lineage_record(run, environment))
    except OSError as error:
        raise UserError(f"--run-dir {folder.path}: cannot write there: {error.strerror}") from error


def _keep_chat_template(run: Run) -> None:
    """Copy the chat template of another run whose weights this one starts from, if it has one."""
    origin = run.start.checkpoint if run.start.is_fork else run.start.init_from
    template = None if origin is None else find_chat_template(find_run(origin).path)
    if template is not None:
        template.save(run.folder.path)


def _lineage_record(run: Run, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return one line of lineage.jsonl: where this launch starts, with what, and what has changed."""
    start = run.start
    return {
        "step": start.step,
        "checkpoint": str(start.checkpoint) if start.checkpoint else None,
        "manifest_sha256": start.manifest_sha256,
        "init_from": str(run.config.init_from) if start.init_from else None,
        "moved_aside": [str(path) for path in start.moved_aside],
        "changes": {item.name: [item.saved, item.current] for item in start.differences},
        "max_steps": run.plan.max_steps,
        "world_size": run.dist.world_size,
        "torch": environment["libraries"]["torch"],
        "compiled": run.plan.compiles,
        "threads": environment["threads"],
        "cpu_capability": environment["cpu_capability"],
        "fused_attention": environment["runtime"]["fused_attention"],
        "sleep_when_busy": environment["runtime"]["sleep_when_busy"],
        "git_commit": environment["git_commit"],
        "device": run.plan.machine.device_name,
        "dtype": run.plan.dtype,
        "micro_batch_size": run.plan.batch.micro_batch_size,
        "runtime": environment["runtime"],
        "notes": list(run.plan.notes),
    }


def _resume_plan(config: TrainConfig, plan: RunPlan, start: Start, *, has_validation: bool) -> RunPlan:
    """Check that `plan` may go on from `start`, and note in it what has changed.

    Raises:
        UserError: corpus, tokenizer, dtype, batch or past learning rates differ, or a fork starts past the horizon.
    """
    if start.init_from is not None:
        _require_same_tokenizer(plan, start, start.init_from)
    if start.weights_note is not None:
        plan = _with_notes(plan, [start.weights_note])
    if start.checkpoint is None or start.saved is None:
        return plan
    plan = adopt_dtype(config, adopt_corpus(plan, start.identity), start.identity)
    names = plan.identity.keys() - ({DTYPE_KEY} if config.resume_with_changes else set())
    require_same_identity(start.identity, plan.identity, names, start.checkpoint, start.differences)
    if start.is_fork and start.step >= plan.max_steps:
        raise UserError(
            f"--resume {start.checkpoint} is at step {start.step} already, and this run would end at {plan.max_steps}; "
            "raise --max-steps"
        )
    notes = [f"changed at step {start.step}: {item}" for item in start.differences]
    if not keeps_learning_rates(config, plan, start.saved, start.step, start.checkpoint):
        notes.append(f"the first {start.step} steps had other learning rates than this schedule gives them")
    if start.mismatch:
        notes.append(start.mismatch)
    ends_here = has_validation and start.step == plan.max_steps
    return replace(_with_notes(plan, notes), evaluates_first=ends_here and not start.is_evaluated)


def _require_same_tokenizer(plan: RunPlan, start: Start, init_from: Path) -> None:
    try:
        require_same_identity(start.identity, plan.identity, {TOKENIZER_KEY}, init_from)
    except UserError as error:
        tokenizer = find_run(init_from).tokenizer
        raise UserError(
            f"--init-from {init_from} was trained with another tokenizer; add --data.tokenizer {tokenizer}"
        ) from error


def _note_temporary_cache(config: TrainConfig) -> list[str]:
    """Return a note for the user if prepared tokens are kept among temporary files, for want of a home folder."""
    cache_dir = config.data.cache_dir
    if cache_dir != temporary_folder():
        return []
    return [f"there is no home folder, so prepared tokens are in {cache_dir}; --data.cache-dir names another folder"]


def _note_no_export(model: GPTConfig) -> list[str]:
    """Return a note for the user if no other program can load a model of this architecture."""
    try:
        require_family(model)
    except UserError as error:
        return [f"gpt export cannot write this model: {error}"]
    return []


def _with_notes(plan: RunPlan, notes: Sequence[str]) -> RunPlan:
    return replace(plan, notes=(*plan.notes, *notes))
