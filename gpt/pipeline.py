"""The one composition of a run, in the order in which data flows.

layout (config, plan, corpus, tokens) -> batches -> model -> optimizer -> Trainer -> observers -> run
"""

from functools import partial

import torch
from rich.console import Console

from gpt.auto_batch import autocast_of, trial_loss
from gpt.checkpoint.app_state import AppState
from gpt.checkpoint.manager import CheckpointManager
from gpt.configs.observer_config import TextSampleConfig
from gpt.configs.run_plan import RunPlan
from gpt.configs.train_config import TrainConfig
from gpt.data.corpus import build_sequences
from gpt.data.data_loader import DataLoader
from gpt.data.provenance import name_documents
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.evaluation.val_loss import ValLoss
from gpt.machine.flops import flops_per_token
from gpt.machine.hardware import peak_memory
from gpt.machine.peak_flops import measured_peak_flops
from gpt.models.gpt import GPT
from gpt.optim.build import build_optimizer
from gpt.parallel.parallelize import build_gradient_sync, compile_or_fall_back, parallelize
from gpt.resume.journal import Journal
from gpt.resume.restore import restore_state
from gpt.run import Run, write_run_files
from gpt.training.evaluator import Evaluator
from gpt.training.logger import Logger
from gpt.training.metrics import Meter
from gpt.training.observers.eval_saver import EvalSaver
from gpt.training.observers.profiler import Profiler
from gpt.training.observers.replica_guard import ReplicaGuard
from gpt.training.observers.save_timer import SaveTimer
from gpt.training.observers.spike_guard import SpikeGuard
from gpt.training.observers.stop_signal import StopSignal
from gpt.training.observers.straggler_guard import StragglerGuard
from gpt.training.observers.text_sampler import TextSampler
from gpt.training.probes.layer_norms import LayerNorms
from gpt.training.sinks.console import ConsoleSink
from gpt.training.sinks.jsonl import JsonlSink
from gpt.training.step_timer import StepTimer
from gpt.training.train_step import TrainStep
from gpt.training.trainer import Trainer
from gpt.utils.custom_scheduler import build_schedule
from gpt.utils.distributed import DistContext


def build_trainer(run: Run, console: Console | None = None) -> Trainer:
    """Compose the run.

    Args:
        run: from `open_run`.
        console: where rank 0 shows the run; None shows nothing.

    Raises:
        UserError: a checkpoint that is damaged or does not fit.
    """
    config, dist, plan, corpus = run.config, run.dist, run.plan, run.corpus
    prompts = _prompts(config, corpus.tokenizer)
    timer = StepTimer(dist.device)

    sequences = build_sequences(corpus, config.data, plan.batch.block_size, plan.seed)
    journal = Journal(run.folder.journal, plan.order, run.journal, dist)
    guard = SpikeGuard(
        config.spike,
        journal,
        scaled=plan.dtype == "float16",
        name_documents=lambda step: name_documents(
            corpus, sequences, plan.batch, journal.quarantine.find_batch(step - 1)
        ),
    )

    state = build_state(config, plan, dist)
    state.savables["spike_guard"] = guard
    restore_state(run.start, state, dist)
    write_run_files(run)
    peak = dist.on_main(
        lambda: measured_peak_flops(dist.device, plan.machine.device_name, plan.dtype, config.data.cache_dir)
    )

    checkpoints = CheckpointManager(
        run.folder, config.checkpoint, config.saved_json(), dist, resumed_at=state.progress.step
    )
    loader = DataLoader(sequences, plan.batch, rank=dist.rank, device=dist.device, quarantine=journal.quarantine)
    trainer = Trainer(
        plan,
        state,
        train_step=build_train_step(config, plan, dist, state, loader, timer),
        meter=Meter(
            plan.batch.tokens_per_step,
            state.skipped_updates,
            dist,
            flops_per_token=flops_per_token(plan.model),
            peak_flops=peak * dist.world_size,
            peak_memory=partial(peak_memory, dist.device.type),
        ),
        checkpoints=checkpoints,
        journal=journal,
        logger=Logger(config.log.sink_timeout, is_main=dist.is_main),
        resumed_from=str(run.start.checkpoint) if run.start.checkpoint else None,
    )
    trainer.attach(StopSignal(dist))
    trainer.attach(guard)
    trainer.attach(StragglerGuard(timer, dist))
    if dist.world_size > 1 and config.parallel.check_replicas:
        trainer.attach(ReplicaGuard(state.model, config.parallel.check_replicas, plan, dist))
    if config.profile.steps:
        trainer.attach(Profiler(config.profile, run.folder.trace if dist.is_main else None))
    if config.checkpoint.every_minutes:
        trainer.attach(SaveTimer(config.checkpoint.every_minutes, dist))
    if corpus.val:
        trainer.attach(Evaluator(state.model, [_val_loss(run)], plan))
        trainer.attach(EvalSaver(plan, checkpoints.improves if config.checkpoint.keep_best else None))
    if prompts:
        trainer.attach(TextSampler(state.model, corpus.tokenizer, prompts, config.sample, plan))
    if config.log.grad_norms:
        trainer.attach(LayerNorms())
    trainer.attach(JsonlSink(run.folder.metrics, run.folder.samples))
    if console:
        trainer.attach(ConsoleSink(console, plan, run.folder.path))
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
    config: TrainConfig, plan: RunPlan, dist: DistContext, state: AppState, loader: DataLoader, timer: StepTimer
) -> TrainStep:
    """Build the step that updates `state`: parallelize the model, and compile it if configured."""
    autocast = autocast_of(plan)
    compile_mode = config.compile_mode if config.compile else None
    blocks = state.model.get_submodule("h").children()
    model = parallelize(state.model, blocks, dist, config.parallel, compile_mode=compile_mode)
    if compile_mode is not None:
        trial = partial(
            trial_loss,
            n_sequences=plan.batch.micro_batch_size,
            block_size=plan.batch.block_size,
            masked=config.data.document_mask,
            device=dist.device,
            autocast=autocast,
        )
        compile_or_fall_back(state.model, model, trial)
    return TrainStep(
        model,
        state,
        plan,
        loader=loader,
        schedule=build_schedule(plan.lr, plan.max_steps),
        autocast=autocast,
        gradients=build_gradient_sync(model, dist, config.parallel),
        grad_clip=config.grad_clip,
        timer=timer,
    )


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


def _val_loss(run: Run) -> ValLoss:
    plan = run.plan
    return ValLoss(
        run.corpus.val,
        block_size=plan.batch.block_size,
        batch_size=plan.batch.micro_batch_size,
        batches=plan.eval_batches,
        masked=run.config.data.document_mask,
        autocast=autocast_of(plan),
        dist=run.dist,
    )
