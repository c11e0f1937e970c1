"""Compose a run, in the order in which data flows.

plan -> loader -> model -> optimizer -> Trainer -> observers
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from gpt.auto_batch import build_autocast, trial_loss
from gpt.checkpoint.app_state import AppState
from gpt.checkpoint.manager import CheckpointManager
from gpt.checkpoint.rollback import RollbackTargets
from gpt.configs.observer_config import TextSampleConfig
from gpt.configs.run_plan import RunPlan
from gpt.configs.train_config import TrainConfig
from gpt.data.corpus import build_sequences
from gpt.data.data_loader import DataLoader
from gpt.data.provenance import name_documents
from gpt.data.sequences import TraceableSequences
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.evaluation.task import EvaluationTask
from gpt.evaluation.val_loss import ValLoss
from gpt.inference.generate import require_fitting_prompt, require_known_tokens
from gpt.machine.arithmetic_check import require_right_arithmetic
from gpt.machine.cuda_runtime import name_nondeterministic_operator
from gpt.machine.flops import flops_per_token
from gpt.machine.hardware import find_free_memory, peak_memory, reset_peak_memory
from gpt.machine.memory_estimate import estimate_memory
from gpt.machine.peak_flops import find_peak_flops
from gpt.models.gpt import GPT
from gpt.models.init import init_weights
from gpt.ops.cross_entropy import find_chunk_bytes
from gpt.optim.build import build_optimizer
from gpt.parallel.parallelize import build_gradient_sync, compile_or_fall_back, parallelize
from gpt.resume.find import Start
from gpt.resume.journal import Journal
from gpt.resume.restore import restore_state
from gpt.run import Run, write_run_files
from gpt.training.evaluator import Evaluator
from gpt.training.logger import Logger
from gpt.training.metrics import Meter
from gpt.training.observers.eval_saver import EvalSaver
from gpt.training.observers.hang_guard import HangGuard
from gpt.training.observers.profiler import Profiler
from gpt.training.observers.replica_guard import ReplicaGuard
from gpt.training.observers.save_timer import SaveTimer
from gpt.training.observers.spike_guard import SpikeGuard
from gpt.training.observers.stop_signal import StopSignal
from gpt.training.observers.straggler_guard import StragglerGuard
from gpt.training.observers.text_sampler import TextSampler
from gpt.training.probes.layer_norms import LayerNorms
from gpt.training.sinks.console.plan_screen import Memory, print_plan
from gpt.training.sinks.console.sink import ConsoleSink
from gpt.training.sinks.jsonl import JsonlSink
from gpt.training.step_timer import StepTimer
from gpt.training.train_step import TrainStep
from gpt.training.trainer import Trainer
from gpt.utils.custom_scheduler import build_schedule
from gpt.utils.distributed import DistContext
from gpt.utils.launch import local_world_size
from gpt.utils.progress import work_line
from gpt.utils.terminal import RunConsole


def build_trainer(run: Run, console: RunConsole | None = None) -> Trainer:
    """Compose the Trainer of a run: load the state that it starts from, then attach everything that watches it.

    Args:
        run: from `open_run`.
        console: shows the run on rank 0; None shows nothing.

    Raises:
        UserError: the checkpoint is damaged or does not fit, or the run folder cannot be written.
    """
    config, dist, plan = run.config, run.dist, run.plan
    if console:
        show_plan(run, console)
    timer = StepTimer(dist.device)
    journal = Journal(run.folder.journal, plan.order, run.journal, dist)
    sequences = build_sequences(run.corpus, config.data, plan.batch.block_size, plan.seed)
    loader = DataLoader(sequences, plan.batch, rank=dist.rank, device=dist.device, quarantine=journal.quarantine)
    prompts = encode_prompts(config.sample, run.corpus.tokenizer, plan.batch.block_size)
    state = build_state(config, plan, dist, run.start)
    targets = find_rollback_targets(run)
    spike_guard = state.savables["spike_guard"] = build_spike_guard(run, sequences, journal, targets)
    restore_state(run.start, state, dist)
    train_step, plan = build_train_step(config, plan, dist, state, loader, timer)
    run = replace(run, plan=plan)
    write_run_files(run)
    protected = targets if config.spike.rollback else None
    checkpoints = CheckpointManager(run.folder, config.checkpoint, config.saved_json(), dist, run.start.step, protected)
    trainer = build_loop(run, state, train_step, checkpoints, journal, timer)
    trainer.attach(StopSignal(dist))
    trainer.attach(spike_guard)
    trainer.attach(StragglerGuard(timer, dist))
    trainer.attach(ReplicaGuard(state.model, config.parallel.check_replicas, plan, dist))
    trainer.attach(HangGuard(timer, dist))
    trainer.attach(Profiler(config.profile, run.folder.trace if dist.is_main else None))
    trainer.attach(SaveTimer(config.checkpoint.every_minutes, dist))
    trainer.attach(Evaluator(state.model, build_evaluation_tasks(run), plan, timer))
    trainer.attach(EvalSaver(plan, checkpoints.improves if config.checkpoint.keep_best else None))
    trainer.attach(TextSampler(state.model, run.corpus.tokenizer, prompts, config.sample, plan, timer))
    if config.log.grad_norms:
        trainer.attach(LayerNorms())
    trainer.attach(JsonlSink(run.folder.metrics, run.folder.samples))
    if console:
        trainer.attach(ConsoleSink(console, plan, run.folder, timer))
    return trainer


def show_plan(run: Run, console: RunConsole) -> None:
    """Print the plan of a run; a closed stdout does not end the run."""
    with suppress(OSError):
        print_plan(console, run.plan, compare_memory(run))


def compare_memory(run: Run) -> Memory:
    """Estimate the memory that one process needs, and find what is free for it."""
    plan, device = run.plan, run.plan.machine.device
    needed = estimate_memory(
        plan.model,
        plan.batch,
        plan.optimizer,
        plan.dtype,
        rounds_residuals=plan.rounds_residuals,
        activation_checkpointing=run.config.parallel.activation_checkpointing,
        copies_state=run.config.checkpoint.asynchronous and device != "cuda",  # a GPU's state is copied to the host
        chunk_bytes=find_chunk_bytes(run.dist.device),
    )
    free = find_free_memory(device)
    return Memory(needed, free if free is None or device == "cuda" else free // local_world_size())


def build_state(config: TrainConfig, plan: RunPlan, dist: DistContext, start: Start | None = None) -> AppState:
    """Build the model and its optimizer.

    Args:
        config: the run's configuration.
        plan: resolved for it.
        dist: the ranks.
        start: where the run starts; weights that it loads are not drawn before. None: at step 0, with initial weights.
    """
    draws = start is None or not start.loads_weights
    device = torch.device("cpu") if draws and dist.is_main else dist.device
    model = GPT.build_empty(plan.model, device, rounds_residuals=plan.rounds_residuals)
    if draws:  # each weight once, and not by every rank
        dist.on_main(lambda: init_weights(model, model.config, plan.seed))
        dist.broadcast_tensors([*model.to(dist.device).parameters()])
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
) -> tuple[TrainStep, RunPlan]:
    """Build the step that updates `state`: check the machine's matmuls, parallelize the model, and compile it.

    Returns:
        The step, and the plan, which differs from `plan` if the compiler does not work here.

    Raises:
        UserError: the machine multiplies wrongly, or a reproducible run needs an operator that is not deterministic.
    """
    rows, cache_dir = plan.batch.micro_batch_size * plan.batch.block_size, config.data.cache_dir
    device_name = plan.machine.device_name
    dist.on_every_rank(
        lambda: require_right_arithmetic(dist.device, device_name, plan.dtype, plan.model, rows, cache_dir)
    )
    autocast = build_autocast(plan)
    compile_mode = config.compile_mode if plan.compiles else None
    blocks, loss = state.model.get_submodule("h").children(), state.model.get_submodule("loss")
    model = parallelize(state.model, blocks, dist, config.parallel, compile_mode=compile_mode, others=[loss])
    trial = partial(
        trial_loss,
        n_sequences=plan.batch.micro_batch_size,
        block_size=plan.batch.block_size,
        masked=config.data.document_mask,
        device=dist.device,
        autocast=autocast,
    )
    if torch.are_deterministic_algorithms_enabled():
        dist.on_every_rank(lambda: require_deterministic_operators(state.model, trial))
    if compile_mode is not None:
        with work_line("compiling the model", is_shown=dist.is_main):
            failure = compile_or_fall_back(state.model, model, trial, dist)
        if failure:
            note = f"the run is not compiled, because torch.compile does not work here: {failure}"
            plan = replace(plan, compiles=False, notes=(*plan.notes, note))
    reset_peak_memory(dist.device.type)
    train_step = TrainStep(
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
    return train_step, plan


def require_deterministic_operators(model: nn.Module, trial: Callable[[nn.Module], torch.Tensor]) -> None:
    """Check by one eager forward and backward pass that every operator has a deterministic form.

    Args:
        model: the bare model.
        trial: maps it to a loss.

    Raises:
        UserError: one has none; names it.
    """
    with name_nondeterministic_operator(), torch.compiler.set_stance("force_eager"):
        trial(model).backward()
    model.zero_grad(set_to_none=True)


def build_loop(
    run: Run, state: AppState, train_step: TrainStep, checkpoints: CheckpointManager, journal: Journal, timer: StepTimer
) -> Trainer:
    """Build the Trainer with its meter and logger; nothing is attached."""
    dist, plan = run.dist, run.plan
    peak = find_peak_flops(plan, dist, run.config.data.cache_dir)
    meter = Meter(
        plan.batch.tokens_per_step,
        state.skipped_updates,
        dist,
        flops_per_token=flops_per_token(plan.model),
        peak_flops=peak.measured,
        data_sheet_flops=peak.data_sheet,
        peak_memory=partial(peak_memory, dist.device.type),
    )
    return Trainer(
        plan,
        state,
        train_step=train_step,
        meter=meter,
        checkpoints=checkpoints,
        journal=journal,
        logger=Logger(run.config.log.sink_timeout, is_main=dist.is_main),
        timer=timer,
        resumed_from=str(run.start.checkpoint) if run.start.checkpoint else None,
    )


def find_rollback_targets(run: Run) -> RollbackTargets:
    """Find the step that the run's first launch started from; it and the scheduled checkpoints are the targets."""
    origin = run.dist.on_main(run.folder.read_origin_step)
    return RollbackTargets(run.start.step if origin is None else origin, run.config.checkpoint.interval)


def build_spike_guard(
    run: Run, sequences: TraceableSequences, journal: Journal, targets: RollbackTargets
) -> SpikeGuard:
    """Build the guard against spikes, which names the documents of a bad step."""

    def name_documents_of(step: int) -> str:
        return name_documents(run.corpus, sequences, run.plan.batch, journal.quarantine.find_batch(step - 1))

    scaled = run.plan.dtype == "float16"
    return SpikeGuard(run.config.spike, journal, targets, scaled=scaled, name_documents=name_documents_of)


def build_evaluation_tasks(run: Run) -> list[EvaluationTask]:
    """Build the tasks that score the model during the run; none without a validation set."""
    if not run.corpus.val:
        return []
    val_loss = ValLoss(
        run.corpus.val,
        block_size=run.plan.batch.block_size,
        batch_size=run.plan.batch.micro_batch_size,
        batches=run.plan.eval_batches,
        document_mask=run.config.data.document_mask,
        autocast=build_autocast(run.plan),
        dist=run.dist,
    )
    return [val_loss]


def encode_prompts(config: TextSampleConfig, tokenizer: Tokenizer, block_size: int) -> dict[str, list[int]]:
    """Return prompt -> token ids; the default prompt becomes the empty one where it does not fit.

    Raises:
        UserError: a prompt that the user gave cannot be encoded or exceeds the context, or a stop token is unknown.
    """
    ids: dict[str, list[int]] = {}
    for prompt in config.prompts:
        try:
            tokens = tokenizer.encode_prompt(prompt)
            require_fitting_prompt(tokens, block_size)
        except UserError as error:
            if config.prompts != TextSampleConfig().prompts:
                raise UserError(f"--sample.prompts {prompt!r}: {error}") from error
            prompt, tokens = "", tokenizer.encode_prompt("")
        ids[prompt] = tokens
    require_known_tokens(config.stop_tokens, tokenizer.vocab_size)
    return ids
