"""The one composition of a run, in the order in which data flows.

config -> plan -> corpus -> tokens -> batches -> model -> optimizer -> Trainer -> observers -> run
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from gpt.checkpoint.app_state import AppState, load_model_tensors
from gpt.checkpoint.manager import CheckpointManager
from gpt.checkpoint.run_folder import RunFolder, locate_checkpoint, run_of
from gpt.checkpoint.store import PROGRESS, read_checkpoint, read_json, read_weights
from gpt.configs.cli import load_config
from gpt.configs.run_plan import RunPlan, plan_batch, resolve
from gpt.configs.train_config import TrainConfig
from gpt.data.corpus import Corpus, open_corpus, prepare
from gpt.data.data_loader import DataLoader
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.evaluation.val_loss import ValLoss
from gpt.models.gpt import GPT
from gpt.optim.build import build_optimizer
from gpt.parallel.apply import compile_in_place, distribute
from gpt.planning.hardware import find_device, machine_facts
from gpt.training.evaluator import Evaluator
from gpt.training.logger import Logger
from gpt.training.metrics import Meter
from gpt.training.sinks.console import ConsoleSink
from gpt.training.sinks.jsonl import JsonlSink
from gpt.training.stop_signal import StopSignal
from gpt.training.text_sampler import TextSampler
from gpt.training.train_step import TrainStep
from gpt.training.trainer import Trainer
from gpt.utils.atomic_io import keep_jsonl, require_writable, write_json, write_text
from gpt.utils.custom_scheduler import build_schedule
from gpt.utils.distributed import DistContext
from gpt.utils.environment import environment

Autocast = Callable[[], AbstractContextManager[object]]


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
        step = int(read_json(self.origin / PROGRESS)["step"])
        return step if step >= self.plan.max_steps else None


def lay_out(config: TrainConfig, *, dry_run: bool = False) -> Layout:
    """Find the machine, check everything that can be checked, prepare the corpus, resolve the plan.

    The cheap checks come before the corpus, whose preparation may take a while. With `dry_run` the run's folder is
    looked at and not written to.

    Raises:
        UserError: whatever the user can mend.
    """
    device = find_device(config.device)
    dist = DistContext(device)
    plan_batch(config, dist.world_size)
    folder = RunFolder(config.run_dir)
    origin = dist.on_main(lambda: _claim(folder, config, dry_run=dry_run))
    corpus = open_corpus(Path(dist.on_main(lambda: str(prepare(config.data)))))
    plan = resolve(config, machine_facts(device, dist.world_size), corpus.facts)
    return Layout(config, dist, folder, Path(origin) if origin else None, corpus, plan)


def build(layout: Layout, console: Console | None = None) -> Trainer:
    """Compose the run.

    Args:
        layout: from `lay_out`.
        console: where rank 0 shows the run; None shows nothing.

    Raises:
        UserError: a checkpoint that is damaged or does not fit.
    """
    config, dist, plan, corpus = layout.config, layout.dist, layout.plan, layout.corpus
    if dist.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what is not autocast
    autocast = partial(torch.autocast, dist.device.type, getattr(torch, plan.dtype), enabled=plan.dtype != "float32")
    prompts = {prompt: corpus.tokenizer.encode_prompt(prompt) for prompt in config.sample.prompts}

    model = GPT(config.model.model_copy(update={"vocab_size": plan.vocab_size}), seed=plan.seed).to(dist.device)
    optimizer = build_optimizer(model, config.optimizer, plan.lr.max_lr)
    scaler = torch.amp.GradScaler(dist.device.type, enabled=plan.dtype == "float16")
    state = AppState(model, optimizer, scaler, torch.zeros((), dtype=torch.int64, device=dist.device))
    _load(layout, state)
    if config.compile:
        compile_in_place(model, partial(_trial, model, plan, autocast))
    dist.on_main(lambda: _write_run_files(layout, state.progress.step))

    trainer = Trainer(
        plan,
        state,
        loader=DataLoader(corpus.train, plan.batch, seed=plan.seed, rank=dist.rank, device=dist.device),
        train_step=TrainStep(
            distribute(model, dist),
            optimizer,
            scaler,
            state.skipped_updates,
            autocast=autocast,
            tokens_per_step=plan.batch.tokens_per_step,
            world_size=dist.world_size,
            grad_clip=config.grad_clip,
            seed=plan.seed,
        ),
        schedule=build_schedule(plan.lr, plan.max_steps),
        meter=Meter(plan.batch.tokens_per_step, dist),
        checkpoints=CheckpointManager(layout.folder, config.checkpoint.keep, config.model_dump_json(indent=2), dist),
        resumed_from=str(layout.origin) if layout.origin else None,
    )
    trainer.attach(StopSignal(dist))
    if corpus.facts.val_tokens > 1:
        trainer.attach(Evaluator(model, [_val_loss(layout, autocast)], plan))
    if prompts:
        trainer.attach(TextSampler(model, corpus.tokenizer, prompts, config.sample, plan))
    if dist.is_main:
        sinks = [JsonlSink(layout.folder.metrics, layout.folder.samples)]
        trainer.attach(Logger([*sinks, *([ConsoleSink(console, config.run_dir)] if console else [])]))
    return trainer


def load_for_inference(path: Path, device: str) -> tuple[GPT, Tokenizer]:
    """A trained model and its tokenizer, from a run's folder (its newest checkpoint) or from a checkpoint.

    Raises:
        UserError: there is none, or it is damaged.
    """
    checkpoint = locate_checkpoint(path, "RUN_DIR")
    tokenizer = Tokenizer.from_file(run_of(checkpoint).tokenizer)
    weights = read_weights(checkpoint)
    config = load_config(checkpoint / "config.json").model
    model = GPT(config.model_copy(update={"vocab_size": weights["wte.weight"].shape[0]}), seed=0)
    load_model_tensors(model, weights)
    return model.to(find_device(device)).eval(), tokenizer


def _claim(folder: RunFolder, config: TrainConfig, *, dry_run: bool) -> str | None:
    origin = folder.origin(config)
    if config.init_from is not None:
        _require_same_architecture(config, locate_checkpoint(config.init_from, "--init-from"))
    if not dry_run:
        require_writable(folder.path, "--run-dir")
    return str(origin) if origin else None


def _require_same_architecture(config: TrainConfig, checkpoint: Path) -> None:
    saved = load_config(checkpoint / "config.json").model
    for name in ("n_layer", "n_head", "n_embd", "block_size", "bias"):
        there, here = getattr(saved, name), getattr(config.model, name)
        if there != here:
            flag = f"--model.{name.replace('_', '-')}"
            raise UserError(
                f"--init-from {checkpoint} is of another architecture: {flag} is {there} there and {here} here"
            )


def _load(layout: Layout, state: AppState) -> None:
    """Bring the state to where the run begins: a checkpoint of it, another run's weights, or as it is."""
    if layout.origin is not None:
        read_checkpoint(layout.origin, state)
    elif layout.config.init_from is not None:
        checkpoint = locate_checkpoint(layout.config.init_from, "--init-from")
        theirs = run_of(checkpoint).tokenizer
        if theirs.exists() and Tokenizer.from_file(theirs).sha256 != layout.corpus.tokenizer.sha256:
            raise UserError(
                f"--init-from {checkpoint} was trained with another tokenizer; add --data.tokenizer {theirs}"
            )
        load_model_tensors(state.model, read_weights(checkpoint))


def _trial(model: GPT, plan: RunPlan, autocast: Autocast) -> None:
    shape = (plan.batch.micro_batch_size, plan.batch.block_size)
    tokens = torch.zeros(shape, dtype=torch.int64, device=next(model.parameters()).device)
    with autocast():
        loss = model(tokens, tokens)
    loss.backward()


def _val_loss(layout: Layout, autocast: Autocast) -> ValLoss:
    plan = layout.plan
    return ValLoss(
        layout.corpus.val,
        plan.corpus.val_bytes,
        block_size=plan.batch.block_size,
        batch_size=plan.batch.micro_batch_size,
        batches=plan.eval_batches,
        autocast=autocast,
        dist=layout.dist,
    )


def _write_run_files(layout: Layout, step: int) -> None:
    """What a run's folder holds beside its checkpoints; records past the step that it begins at are dropped."""
    folder = layout.folder
    try:
        write_text(folder.config, layout.config.model_dump_json(indent=2) + "\n")
        write_json(folder.environment, environment())
        write_text(folder.tokenizer, layout.corpus.tokenizer.definition)
        for records in (folder.metrics, folder.samples):
            keep_jsonl(records, lambda record: record["step"] <= step)
    except OSError as error:
        raise UserError(f"--run-dir {folder.path}: cannot write there: {error.strerror}") from error
