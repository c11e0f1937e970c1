"""`gpt data-at RUN_DIR --step N`: the documents that a step of a run was trained on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from gpt.configs.base import MAX_COUNT, Config
from gpt.configs.cli import POSITIONAL, parse
from gpt.configs.load import load_config
from gpt.configs.run_plan import CORPUS_KEY, MachineFacts, RunPlan, resolve
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError
from gpt.utils.helper import plural, printable

if TYPE_CHECKING:
    from gpt.checkpoint.run_folder import RunFolder
    from gpt.data.corpus import Corpus

SHOWN = 32
"""Tokens of each document that are shown as text."""


class DataAtCommand(Config):
    """Show the documents that a step of a run was, or will be, trained on."""

    run_dir: Annotated[Path, POSITIONAL]
    """A run's folder."""
    step: int = Field(ge=1, le=MAX_COUNT)
    """The step, as metrics.jsonl numbers them: the first one is 1."""


def run(argv: Sequence[str]) -> int:
    """Parse, find the batch, and print it."""
    command = parse(DataAtCommand, argv, prog="gpt data-at")

    from gpt.checkpoint.run_folder import RunFolder
    from gpt.data.corpus import build_sequences
    from gpt.data.provenance import find_excerpts
    from gpt.resume.journal import build_quarantine, read_journal

    folder = RunFolder(command.run_dir)
    config = load_config(folder.config)
    corpus, plan = _open(folder, config)
    index = build_quarantine(read_journal(folder.journal, plan.order)).find_batch(command.step - 1)
    sequences = build_sequences(corpus, config.data, plan.batch.block_size, plan.seed)
    print(
        f"step {command.step}: global batch {index}, {plural(plan.batch.sequences_per_step, 'sequence')} "
        f"of {plan.batch.block_size} tokens"
    )
    for number, excerpts in enumerate(find_excerpts(corpus, sequences, plan.batch, index)):
        print(f"sequence {number}")
        for excerpt in excerpts:
            text = corpus.tokenizer.decode(excerpt.read(SHOWN).tolist())
            shown = printable(text).replace("\n", "\\n").replace("\t", "\\t")
            print(f"  {printable(str(excerpt))}: {shown}{'...' if excerpt.length > SHOWN else ''}")
    return 0


def _open(folder: "RunFolder", config: TrainConfig) -> tuple["Corpus", RunPlan]:
    """A run's corpus, and its plan as one process would have it, which takes the same global batches.

    Raises:
        UserError: the corpus is not the run's any more, or the size of its steps is not known yet.
    """
    from gpt.checkpoint.manifest import PROGRESS
    from gpt.data.corpus import open_corpus, prepare_corpus
    from gpt.resume.compatibility import require_same_identity
    from gpt.utils.atomic_io import read_json

    corpus = open_corpus(prepare_corpus(config.data), config.data, config.model.block_size)
    checkpoints = folder.committed()
    identity = read_json(checkpoints[-1] / PROGRESS)["identity"] if checkpoints else {}
    tokens_per_step = identity.get("--tokens-per-step", config.tokens_per_step)
    if not tokens_per_step:
        raise UserError(f"{folder.path}: --tokens-per-step 0 leaves the size of a step to its first checkpoint")
    sizes = {"micro_batch_size": 1, "tokens_per_step": tokens_per_step}
    plan = resolve(config.model_copy(update=sizes), MachineFacts("cpu", "", has_bfloat16=False), corpus.facts)
    if checkpoints:
        require_same_identity(identity, plan.identity, {CORPUS_KEY}, checkpoints[-1])
    return corpus, plan
