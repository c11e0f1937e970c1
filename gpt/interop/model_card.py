"""README.md of an exported model: data, configuration, losses, evaluation and proof."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt import __version__
from gpt.checkpoint.manifest import PROGRESS, read_checkpoint_manifest
from gpt.checkpoint.run_folder import find_run
from gpt.configs.load import load_config
from gpt.configs.train_config import TrainConfig
from gpt.data.tokenizer import Tokenizer
from gpt.utils.atomic_io import read_json, read_jsonl
from gpt.utils.helper import format_count, printable

TRAIN_LOSS = "train/loss"


@dataclass(frozen=True)
class Origin:
    """Checkpoint that is exported, and the facts of its run."""

    checkpoint: Path
    config: TrainConfig
    """Configuration of the steps taken."""
    step: int
    tokens: int
    """Tokens trained on."""
    train_loss: float | None
    """Last reported loss up to this step, in nats per token."""
    evaluation: Mapping[str, float]
    """Metrics of this checkpoint's evaluation."""


def read_origin(checkpoint: Path) -> Origin:
    """Read the facts of a checkpoint, which should be verified before.

    Raises:
        UserError: a file of it is missing or damaged.
    """
    progress = read_json(checkpoint / PROGRESS)
    step = progress.get("step", 0)
    losses = [
        record[TRAIN_LOSS]
        for record in read_jsonl(find_run(checkpoint).metrics)
        if TRAIN_LOSS in record and record.get("step", 0) <= step
    ]
    return Origin(
        checkpoint=checkpoint,
        config=load_config(checkpoint / "config.json"),
        step=step,
        tokens=progress.get("tokens", 0),
        train_loss=losses[-1] if losses else None,
        evaluation=read_checkpoint_manifest(checkpoint).metrics,
    )


def write_model_card(
    *,
    name: str,
    library: str,
    architecture: str,
    n_parameters: int,
    dtype: str,
    origin: Origin,
    tokenizer: Tokenizer,
    proof: str,
) -> str:
    """Return the Markdown of a model card.

    Args:
        name: name of the model.
        library: library that loads it, as the Hugging Face hub names it.
        architecture: class of transformers, or architecture of llama.cpp.
        n_parameters: number of parameters.
        dtype: type of the weights in the files.
        origin: where the model comes from.
        tokenizer: its tokenizer.
        proof: result of the comparison with the source.
    """
    config = origin.config
    model = config.model.resolve()
    sources = ", ".join(_shorten(source) for source in config.data.source) if origin.step else "not recorded"
    end_of_text = "none" if tokenizer.end_of_text is None else tokenizer.name_token(tokenizer.end_of_text)
    sections: Sequence[tuple[str, Mapping[str, Any]]] = (
        (
            "Model",
            {
                "class": f"`{architecture}`",
                "parameters": f"{n_parameters:,}",
                "type of the weights": dtype,
                "context": f"{model.block_size:,} tokens",
                "vocabulary": f"{tokenizer.vocab_size:,} tokens, end of text `{end_of_text}`",
            },
        ),
        (
            "Training data",
            {
                "sources": sources,
                "tokens trained on": format_count(origin.tokens),
                "tokenizer": f"`{_shorten(config.data.tokenizer)}`",
            },
        ),
        ("Results", _list_results(origin)),
        ("Configuration", _list_settings(config)),
    )
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation", "---", "", f"# {name}", ""]
    lines += [f"Exported by gpt-training-pipeline {__version__} from step {origin.step:,} of a run.", ""]
    for title, rows in sections:
        lines += [f"## {title}", "", "| | |", "| --- | --- |"]
        lines += [f"| {key} | {_escape(value)} |" for key, value in rows.items()]
        lines.append("")
    lines += ["## Proof", "", f"The export was compared with its source. {proof}.", ""]
    return "\n".join(lines)


def _list_results(origin: Origin) -> dict[str, str]:
    loss = {} if origin.train_loss is None else {"train/loss (nats per token)": f"{origin.train_loss:.4f}"}
    return loss | {name: f"{value:.4f}" for name, value in sorted(origin.evaluation.items())} or {"none": "recorded"}


def _list_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that the weights depend on, by their flags."""
    sections = {name: getattr(config, name) for name in ("model", "lr", "optimizer")}
    sections["model"] = config.model.resolve()
    settings = {name: getattr(config, name) for name in ("seed", "tokens_per_step", "grad_clip", "dtype")}
    settings |= {f"{name}.{key}": value for name, section in sections.items() for key, value in section}
    return {f"`--{name.replace('_', '-')}`": value for name, value in settings.items()}


def _shorten(source: str) -> str:
    """Return a source without the folders of the machine that it was on."""
    return Path(source).name if Path(source).is_absolute() else source


def _escape(value: Any) -> str:
    return printable(str(value)).replace("|", "\\|").replace("\n", " ")
