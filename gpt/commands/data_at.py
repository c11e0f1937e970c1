"""`gpt data-at RUN_DIR --step N`: show the documents that a step of a run was trained on."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from gpt.commands.output import print_json
from gpt.configs.base import MAX_COUNT, FilePath
from gpt.configs.cli import JsonOutput, parse
from gpt.configs.fields import POSITIONAL
from gpt.configs.load import load_config
from gpt.configs.run_plan import CORPUS_KEY, MachineFacts, RunPlan, resolve
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError
from gpt.utils.helper import plural, printable

if TYPE_CHECKING:
    from gpt.checkpoint.run_folder import RunFolder
    from gpt.data.corpus import Corpus

log = logging.getLogger(__name__)

MAX_SHOWN_TOKENS = 32
"""Tokens of each document that are shown as text."""


class DataAtCommand(JsonOutput):
    """Show the documents that a step of a run was, or will be, trained on."""

    run_dir: Annotated[FilePath, POSITIONAL]
    """Folder of the run."""
    step: int = Field(ge=1, le=MAX_COUNT)
    """Step to show, numbered as in metrics.jsonl: the first step is 1."""


def run(argv: Sequence[str]) -> int:
    """Parse the flags, find the step's global batch, and print its documents."""
    command = parse(DataAtCommand, argv, prog="gpt data-at")

    from gpt.checkpoint.run_folder import RunFolder

    batch = describe_batch(RunFolder(command.run_dir), command.step)
    if command.as_json:
        print_json(batch)
    else:
        _print_batch(batch)
    return 0


def describe_batch(folder: "RunFolder", step: int) -> dict[str, Any]:
    """Return the documents of the global batch that a run's step consumes, sequence by sequence, as JSON-able values.

    Raises:
        UserError: the folder is no run, or its corpus has changed.
    """
    from gpt.checkpoint.run_folder import no_run_error
    from gpt.data.corpus import build_sequences
    from gpt.data.provenance import find_excerpts
    from gpt.resume.journal import build_quarantine, read_journal

    if not folder.config.is_file():
        raise no_run_error(folder.path)
    config = load_config(folder.config)
    corpus, plan = _open_corpus_and_plan(folder, config)
    if step > plan.max_steps:
        log.warning(
            "--step %d is beyond the run, which ends at step %d; a longer run would train on these documents",
            step,
            plan.max_steps,
        )
    index = build_quarantine(read_journal(folder.journal, plan.order)).find_batch(step - 1)
    sequences = build_sequences(corpus, config.data, plan.batch.block_size, plan.seed)
    return {
        "step": step,
        "global_batch": index,
        "block_size": plan.batch.block_size,
        "sequences": [
            [
                {
                    "source": excerpt.source,
                    "shard": excerpt.shard.name,
                    "document": excerpt.document,
                    "first_token": excerpt.offset,
                    "tokens": excerpt.length,
                    "place": str(excerpt),
                    "text": corpus.tokenizer.decode(excerpt.read(MAX_SHOWN_TOKENS).tolist()),
                }
                for excerpt in excerpts
            ]
            for excerpts in find_excerpts(corpus, sequences, plan.batch, index)
        ],
    }


def _print_batch(batch: dict[str, Any]) -> None:
    count = plural(len(batch["sequences"]), "sequence")
    print(f"step {batch['step']}: global batch {batch['global_batch']}, {count} of {batch['block_size']} tokens")
    for number, excerpts in enumerate(batch["sequences"]):
        print(f"sequence {number}")
        for excerpt in excerpts:
            text = printable(excerpt["text"]).replace("\n", "\\n").replace("\t", "\\t")
            ellipsis = "..." if excerpt["tokens"] > MAX_SHOWN_TOKENS else ""
            print(f"  {printable(excerpt['place'])}: {text}{ellipsis}")


def _open_corpus_and_plan(folder: "RunFolder", config: TrainConfig) -> tuple["Corpus", RunPlan]:
    """Open a run's corpus and plan the run for one process, which consumes the same global batches.

    Raises:
        UserError: the corpus has changed since the run, or the run's step size is not known yet.
    """
    from gpt.checkpoint.manifest import PROGRESS
    from gpt.data.corpus import open_corpus, prepare_corpus
    from gpt.resume.compatibility import adopt_corpus, require_same_identity
    from gpt.utils.atomic_io import read_json

    corpus = open_corpus(prepare_corpus(config.data), config.data, config.model.block_size)
    checkpoints = folder.list_checkpoints()
    identity = read_json(checkpoints[-1] / PROGRESS)["identity"] if checkpoints else {}
    tokens_per_step = identity.get("--tokens-per-step", config.tokens_per_step)
    if not tokens_per_step:
        raise UserError(
            f"{folder.path}: --tokens-per-step 0 depends on the number of processes, and no checkpoint records it yet; "
            "try again after the first checkpoint"
        )
    sizes = {"micro_batch_size": 1, "tokens_per_step": tokens_per_step}
    plan = resolve(config.model_copy(update=sizes), MachineFacts("cpu", "", has_bfloat16=False), corpus.facts)
    if checkpoints:
        plan = adopt_corpus(plan, identity)
        require_same_identity(identity, plan.identity, {CORPUS_KEY}, checkpoints[-1])
    return corpus, plan
