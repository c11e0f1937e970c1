"""The one composition of a run, in the order in which data flows.

layout (config, plan, corpus, tokens) -> batches -> model -> optimizer -> Trainer -> observers -> run
"""

from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from gpt.checkpoint.app_state import AppState, load_model_tensors
from gpt.checkpoint.journal import Journal
from gpt.checkpoint.manager import CheckpointManager
from gpt.checkpoint.run_folder import locate_checkpoint, run_of
from gpt.checkpoint.store import read_weights
from gpt.configs.cli import load_config
from gpt.configs.observer_config import TextSampleConfig
from gpt.configs.run_plan import RunPlan
from gpt.configs.train_config import TrainConfig
from gpt.data.corpus import sequences_of
from gpt.data.data_loader import DataLoader
from gpt.data.provenance import name_documents
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.evaluation.val_loss import ValLoss
from gpt.fitting import Autocast, autocast_of, trial_loss
from gpt.layout import Layout, restore, write_run_files
from gpt.models.gpt import GPT
from gpt.optim.build import build_optimizer
from gpt.parallel.apply import build_gradient_sync, make_ready
from gpt.planning.flops import flops_per_token
from gpt.planning.hardware import find_device, peak_memory
from gpt.planning.peak import matmul_peak
from gpt.training.eval_saver import EvalSaver
from gpt.training.evaluator import Evaluator
from gpt.training.logger import Logger
from gpt.training.metrics import Meter
from gpt.training.observer import Sink
from gpt.training.profiler import Profiler
from gpt.training.replica_guard import ReplicaGuard
from gpt.training.save_timer import SaveTimer
from gpt.training.sinks.console import ConsoleSink
from gpt.training.sinks.jsonl import JsonlSink
from gpt.training.spike_guard import SpikeGuard
from gpt.training.stop_signal import StopSignal
from gpt.training.straggler_guard import OwnTime, StragglerGuard
from gpt.training.text_sampler import TextSampler
from gpt.training.train_step import TrainStep
from gpt.training.trainer import Trainer
from gpt.utils.custom_scheduler import build_schedule
from gpt.utils.distributed import DistContext
from gpt.utils.helper import si


def build(layout: Layout, console: Console | None = None) -> Trainer:
    """Compose the run.

    Args:
        layout: from `lay_out`.
        console: where rank 0 shows the run; None shows nothing.

    Raises:
        UserError: a checkpoint that is damaged or does not fit.
    """
    config, dist, plan, corpus = layout.config, layout.dist, layout.plan, layout.corpus
    prompts = _prompts(config, corpus.tokenizer)
    autocast = autocast_of(plan)
    own_time = OwnTime(dist.device)

    sequences = sequences_of(corpus, config.data, plan.batch.block_size, plan.seed)
    journal = Journal(layout.folder.journal, plan.order, layout.journal, dist)
    guard = SpikeGuard(
        config.spike,
        journal,
        scaled=plan.dtype == "float16",
        name_documents=lambda step: name_documents(
            corpus, sequences, plan.batch, journal.quarantine.batch_of(step - 1)
        ),
    )

    state = build_state(config, plan, dist)
    state.savables["spike_guard"] = guard
    restore(layout, state)
    dist.on_main(lambda: write_run_files(layout, state.progress.step))
    peak = dist.on_main(lambda: matmul_peak(dist.device, plan.machine.device_name, plan.dtype, config.data.cache_dir))

    checkpoints = CheckpointManager(
        layout.folder, config.checkpoint, config.saved_json(), dist, resumed_at=state.progress.step
    )
    trainer = Trainer(
        plan,
        state,
        loader=DataLoader(
            sequences,
            plan.batch,
            rank=dist.rank,
            device=dist.device,
            quarantine=journal.quarantine,
            waiting=own_time.waiting,
        ),
        train_step=build_train_step(config, plan, dist, state, own_time.around(autocast)),
        schedule=build_schedule(plan.lr, plan.max_steps),
        meter=Meter(
            plan.batch.tokens_per_step,
            state.skipped_updates,
            dist,
            flops_per_token=flops_per_token(plan.model),
            peak=peak * dist.world_size,
            peak_memory=partial(peak_memory, dist.device.type),
        ),
        checkpoints=checkpoints,
        journal=journal,
        resumed_from=str(layout.origin) if layout.origin else None,
    )
    trainer.attach(StopSignal(dist))
    trainer.attach(guard)
    trainer.attach(StragglerGuard(own_time, dist))
    if dist.world_size > 1 and config.parallel.check_replicas:
        trainer.attach(ReplicaGuard(state.model, config.parallel.check_replicas, plan, dist))
    if config.profile.steps:
        trainer.attach(Profiler(config.profile, layout.folder.trace if dist.is_main else None))
    if config.checkpoint.every_minutes:
        trainer.attach(SaveTimer(config.checkpoint.every_minutes, dist))
    if corpus.val:
        trainer.attach(Evaluator(state.model, [_val_loss(layout, autocast)], plan))
        trainer.attach(EvalSaver(plan, checkpoints.improves if config.checkpoint.keep_best else None))
    if prompts:
        trainer.attach(TextSampler(state.model, corpus.tokenizer, prompts, config.sample, plan))
    trainer.attach(Logger(_sinks(layout, console)))
    return trainer


def build_state(config: TrainConfig, plan: RunPlan, dist: DistContext) -> AppState:
    """The model and its optimizer, at the beginning."""
    if dist.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what is not autocast
    model = GPT(plan.model, seed=plan.seed).to(dist.device)
    optimizer = build_optimizer(
        model,
        config.optimizer,
        plan.lr.max_lr,
        hidden=model.hidden_matrices(),
        precision=torch.bfloat16 if plan.dtype == "bfloat16" else torch.float32,
    )
    scaler = torch.amp.GradScaler(dist.device.type, enabled=plan.dtype == "float16")
    skipped_updates = torch.zeros((), dtype=torch.int64, device=dist.device)
    return AppState(model, optimizer, scaler, skipped_updates, plan.identity)


def build_train_step(
    config: TrainConfig, plan: RunPlan, dist: DistContext, state: AppState, autocast: Autocast
) -> TrainStep:
    """What updates `state`; compiles the model where that is asked for, and joins the processes."""
    model = make_ready(
        state.model,
        state.model.get_submodule("h").children(),
        dist,
        config.parallel,
        compile_mode=config.compile_mode if config.compile else None,
        trial=partial(
            trial_loss,
            n_sequences=plan.batch.micro_batch_size,
            block_size=plan.batch.block_size,
            masked=config.data.document_mask,
            device=dist.device,
            autocast=autocast,
        ),
    )
    return TrainStep(
        model,
        state.optimizer,
        state.scaler,
        state.skipped_updates,
        gradients=build_gradient_sync(model, dist, config.parallel),
        autocast=autocast,
        grad_clip=config.grad_clip,
        seed=plan.seed,
    )


def load_for_inference(path: Path, device: str) -> tuple[GPT, Tokenizer]:
    """A trained model and its tokenizer, from a run's folder (its newest checkpoint) or from a checkpoint.

    Raises:
        UserError: there is none, or it is damaged.
    """
    checkpoint = locate_checkpoint(path, "RUN_DIR")
    tokenizer = Tokenizer.from_file(run_of(checkpoint).tokenizer)
    weights = read_weights(checkpoint)
    config = load_config(checkpoint / "config.json").model
    embedding = weights.get("wte.weight", torch.empty(0))
    config = config.model_copy(update={"vocab_size": len(embedding)})
    if config.n_parameters != sum(tensor.numel() for tensor in weights.values()):  # before memory for them is asked for
        raise UserError(
            f"{checkpoint}: config.json is of a model of {si(config.n_parameters)} parameters, not of this one"
        )
    model = GPT(config, seed=0)
    load_model_tensors(model, weights)
    return model.to(find_device(device)).eval(), tokenizer


def _prompts(config: TrainConfig, tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Prompts and their tokens; the default one, where the corpus lacks its characters, becomes the empty prompt."""
    tokens: dict[str, list[int]] = {}
    for prompt in config.sample.prompts:
        try:
            tokens[prompt] = tokenizer.encode_prompt(prompt)
        except UserError as error:
            if config.sample.prompts != TextSampleConfig().prompts:
                raise UserError(f"--sample.prompts {prompt!r}: {error}") from error
            tokens[""] = tokenizer.encode_prompt("")
    return tokens


def _sinks(layout: Layout, console: Console | None) -> list[Sink]:
    """What records the run: on rank 0 alone."""
    if not layout.dist.is_main:
        return []
    files = JsonlSink(layout.folder.metrics, layout.folder.samples)
    return [files, ConsoleSink(console, layout.plan, layout.folder.path)] if console else [files]


def _val_loss(layout: Layout, autocast: Autocast) -> ValLoss:
    plan = layout.plan
    return ValLoss(
        layout.corpus.val,
        block_size=plan.batch.block_size,
        batch_size=plan.batch.micro_batch_size,
        batches=plan.eval_batches,
        masked=layout.config.data.document_mask,
        autocast=autocast,
        dist=layout.dist,
    )
