"""resolve(config, machine, corpus) -> RunPlan: all derived numbers, and the checks across sections."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gpt.configs.batch_plan import BatchPlan, plan_batch
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.lr_config import LRConfig
from gpt.configs.optimizer_config import OptimizerConfig
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError

CORPUS_KEY, TOKENIZER_KEY, DTYPE_KEY = "the corpus's SHA-256", "the tokenizer's SHA-256", "--dtype"
CONTENT_KEY = "the SHA-256 of the corpus's content"
"""Keys of a run's identity that others compare by name."""

FLOAT16_NOTE = "--dtype auto is float16 with a loss scaler: this GPU has no bfloat16"
MAX_USEFUL_EPOCHS = 4
"""Passes over a text up to which it teaches almost as much as new text (Muennighoff et al. 2023, "Scaling
Data-Constrained Language Models")."""
HIGH_ADAMW_LR = 0.01
"""Highest learning rate above which a plan warns if AdamW updates all weights; docs/EXPERIMENTS.md has a comparison."""


@dataclass(frozen=True)
class MachineFacts:
    """Hardware and process settings of a run; filled by `gpt.machine.hardware`."""

    device: str
    """cpu, cuda or mps: resolved, never auto."""
    device_name: str
    has_bfloat16: bool
    """The device has bfloat16 arithmetic, not just a conversion."""
    world_size: int = 1
    """Processes that train together."""
    runtime: dict[str, int | bool] = field(default_factory=dict)
    """Settings applied in each process, under the names of RuntimeConfig."""
    max_micro_batch: int = 1
    """Upper bound of --micro-batch-size auto, in sequences; filled by `gpt.auto_batch`."""
    gpu_count: int = 0
    """GPUs that this process could use."""
    notes: tuple[str, ...] = ()
    """Remarks on how the device was chosen."""


@dataclass(frozen=True)
class StreamFacts:
    """A stream of training tokens: one source of a weighted mixture, or all sources in a row."""

    name: str
    tokens: int
    packed_sequences: int = 0
    """Sequences that its documents are packed into; 0 for packing=stream."""


@dataclass(frozen=True)
class CorpusFacts:
    """Sizes and digests of a prepared corpus; filled by `gpt.data.corpus`."""

    vocab_size: int
    streams: tuple[StreamFacts, ...]
    """Streams to train on."""
    sha256: str = ""
    """Digest of all prepared files."""
    content_sha256: str = ""
    """Digest of the prepared tokens alone, which the names of the sources do not change."""
    tokenizer_sha256: str = ""
    val_tokens: int = 0
    val_bytes: int = 0
    """Bytes of the validation text, end-of-text tokens not counted."""
    val_documents: int = 0
    xz_bits_per_byte: float | None = None
    """Size of the validation text after `xz -9e`; None if it is too long to compress."""

    @property
    def train_tokens(self) -> int:
        """Tokens over all streams."""
        return sum(stream.tokens for stream in self.streams)


@dataclass(frozen=True)
class SourcePlan:
    """A source's share of a run."""

    name: str
    share: float
    """Fraction of the training sequences."""
    epochs: float
    """Passes over the source."""


@dataclass(frozen=True)
class RunPlan:
    """All numbers of a run, derived from configuration, machine and corpus."""

    machine: MachineFacts
    corpus: CorpusFacts
    batch: BatchPlan
    reproducible: bool
    """Bit-exact at every number of processes."""
    seed: int
    dtype: str
    """float32, bfloat16 or float16."""
    rounds_residuals: bool
    """The residual stream has that dtype, too; otherwise float32."""
    compiles: bool
    """The blocks and the loss are compiled."""
    model: GPTConfig
    """Resolved architecture: every derived size is filled in; `vocab_size` is the tokenizer's or more."""
    max_steps: int
    windows_per_epoch: int
    """Training sequences in one pass over the corpus."""
    sources: tuple[SourcePlan, ...]
    """Sources to train on."""
    lr: LRConfig
    """Schedule, with `decay_steps` resolved."""
    optimizer: OptimizerConfig
    log_interval: int
    eval_interval: int
    checkpoint_interval: int
    eval_batches: int
    evaluates_first: bool = False
    """The run resumes at its last step, which has not been evaluated yet."""
    notes: tuple[str, ...] = field(default=())
    """Remarks for the user on how values were chosen."""

    @property
    def identity(self) -> dict[str, str | int]:
        """Resolved values that a resumed run must share with its checkpoint, because its losses depend on them.

        They come from the corpus and the machine, not from the configuration; the keys name what a user can change.
        """
        identity: dict[str, str | int] = {
            CORPUS_KEY: self.corpus.sha256,
            CONTENT_KEY: self.corpus.content_sha256,
            TOKENIZER_KEY: self.corpus.tokenizer_sha256,
            DTYPE_KEY: self.dtype,
            "--tokens-per-step": self.batch.tokens_per_step,
        }
        if self.reproducible:  # these decide the bits of a step, too
            identity["--micro-batch-size"] = self.batch.micro_batch_size
            identity["--runtime.threads"] = self.machine.runtime.get("threads", 1)
            if self.dtype == "bfloat16":
                identity["--runtime.fused-attention"] = self.machine.runtime.get("fused_attention", False)
        return identity

    @property
    def order(self) -> str:
        """Digest of the values that decide which sequences make up each global batch."""
        shares = [source.share for source in self.sources]
        facts = [self.corpus.sha256, self.seed, self.batch.tokens_per_step, self.batch.block_size]
        return hashlib.sha256(json.dumps([*facts, self.windows_per_epoch, shares]).encode()).hexdigest()

    @property
    def epochs(self) -> float:
        """Passes over the training set."""
        return self.max_steps * self.batch.sequences_per_step / self.windows_per_epoch

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-able values, derived numbers included."""
        return asdict(self) | {
            "batch": asdict(self.batch)
            | {"sequences_per_step": self.batch.sequences_per_step, "tokens_per_step": self.batch.tokens_per_step},
            "corpus": asdict(self.corpus) | {"train_tokens": self.corpus.train_tokens},
            "model": self.model.model_dump(mode="json") | {"n_parameters": self.model.n_parameters},
            "lr": self.lr.model_dump(mode="json"),
            "optimizer": self.optimizer.model_dump(mode="json"),
            "tokens": self.max_steps * self.batch.tokens_per_step,
            "epochs": self.epochs,
        }

    def evaluates_at(self, step: int) -> bool:
        """Return whether the model is evaluated after `step`."""
        return step == self.max_steps or _is_due(step, self.eval_interval)

    def saves_at(self, step: int) -> bool:
        """Return whether a checkpoint is written after `step`."""
        return step == self.max_steps or _is_due(step, self.checkpoint_interval)

    def logs_at(self, step: int) -> bool:
        """Return whether metrics are reported after `step`.

        Evaluations and saves close a reporting window, so that tokens per second are measured over training alone.
        """
        return step == 1 or _is_due(step, self.log_interval) or self.evaluates_at(step) or self.saves_at(step)


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def count_windows(n_tokens: int, block_size: int) -> int:
    """Return the number of sequences of `block_size` targets in one epoch over `n_tokens`.

    An epoch starts at a random offset below `block_size` (see `gpt.data.order`), which costs up to one window.
    """
    return max(1, (n_tokens - block_size) // block_size)


def resolve(config: TrainConfig, machine: MachineFacts, corpus: CorpusFacts) -> RunPlan:
    """Derive all numbers of a run.

    Raises:
        UserError: values that do not fit together; names the nearest that do.
    """
    batch = plan_batch(config, machine.world_size, machine.max_micro_batch)
    vocab_size = config.model.vocab_size or corpus.vocab_size
    model = config.model.model_copy(update={"vocab_size": vocab_size}).resolve()
    sequences = _count_sequences(config, batch, corpus)
    if config.model.vocab_size and config.model.vocab_size < corpus.vocab_size:
        raise UserError(
            f"--model.vocab-size {config.model.vocab_size} is smaller than the tokenizer's {corpus.vocab_size} "
            f"(nearest: {corpus.vocab_size}, or 0 for the tokenizer's own)"
        )
    per_epoch = sum(sequences.values())
    max_steps = _resolve_max_steps(config, batch, per_epoch)
    dtype = _resolve_dtype(config, machine)
    sources = _plan_sources(config, sequences, max_steps * batch.sequences_per_step)
    return RunPlan(
        machine=machine,
        corpus=corpus,
        batch=batch,
        reproducible=config.parallel.reproducible,
        seed=config.seed,
        dtype=dtype,
        rounds_residuals=config.residual_dtype == "compute",
        compiles=resolve_compile(config, machine.device),
        model=model,
        max_steps=max_steps,
        windows_per_epoch=per_epoch,
        sources=sources,
        lr=config.lr.model_copy(update={"decay_steps": _resolve_decay_steps(config.lr, max_steps)}),
        optimizer=config.optimizer,
        log_interval=config.log.interval,
        eval_interval=config.eval.interval,
        checkpoint_interval=config.checkpoint.interval,
        eval_batches=config.eval.batches,
        notes=(
            *machine.notes,
            *_note_batch(config, machine, batch),
            *_note_device(config, machine, dtype),
            *_note_schedule(config, max_steps),
            *_note_data(config, corpus, sources),
        ),
    )


def _note_batch(config: TrainConfig, machine: MachineFacts, batch: BatchPlan) -> list[str]:
    if config.micro_batch_size != "auto":
        return []
    bound = "make a CPU faster or fit in memory" if machine.device == "cpu" else "fit in memory"
    return [
        f"--micro-batch-size auto is {batch.micro_batch_size}, which divides the step: "
        f"at most {machine.max_micro_batch} sequences {bound}"
    ]


def _note_schedule(config: TrainConfig, max_steps: int) -> list[str]:
    notes = []
    if config.lr.warmup_steps >= max_steps:
        length = f"all {max_steps} steps" if max_steps > 1 else "the only step"
        warmup = f"{config.lr.warmup_steps} step{'' if config.lr.warmup_steps == 1 else 's'}"
        notes.append(f"warmup of {warmup} lasts for {length} of the run")
    if config.spike.rollback and not config.checkpoint.interval:
        notes.append("--checkpoint.interval is 0, so --spike.rollback goes back to the first step")
    if config.optimizer.name == "adamw" and config.lr.max_lr > HIGH_ADAMW_LR:
        notes.append(
            f"--lr.max-lr {config.lr.max_lr:g} suits the few weights that muon leaves to adamw; adamw alone usually "
            "needs 1e-4 to 3e-3"
        )
    return notes


def _note_data(config: TrainConfig, corpus: CorpusFacts, sources: Sequence[SourcePlan]) -> list[str]:
    notes = ["no validation set: val/loss is not reported"] if corpus.val_tokens < 2 else []
    remedy = "add text or lower --max-steps" if config.model.dropout else "add text, or train the preset small-text"
    return notes + [
        f"{source.name} is read {source.epochs:.1f} times: beyond {MAX_USEFUL_EPOCHS} epochs a text teaches less and "
        f"less; {remedy}"
        for source in sources
        if source.epochs > MAX_USEFUL_EPOCHS
    ]


def _count_sequences(config: TrainConfig, batch: BatchPlan, corpus: CorpusFacts) -> dict[str, int]:
    """Return stream name -> sequences in one pass over the stream.

    Raises:
        UserError: the weights do not fit the sources, or a stream is too short for one sequence.
    """
    weights, streams = config.data.weights, corpus.streams
    if weights and len(weights) != len(streams):
        names = ", ".join(stream.name for stream in streams)
        raise UserError(f"--data.weights: {len(weights)} for {len(streams)} sources ({names}); give one for each")
    for stream in streams:
        if stream.tokens < 2:
            raise UserError(f"{stream.name} is too short: {stream.tokens} training tokens; add text to it")
        if stream.tokens <= batch.block_size:
            raise UserError(
                f"the training text of {stream.name} has {stream.tokens} tokens, "
                f"too few for --model.block-size {batch.block_size} (nearest: {stream.tokens - 1})"
            )
    return {
        stream.name: stream.packed_sequences or count_windows(stream.tokens, batch.block_size) for stream in streams
    }


def _plan_sources(config: TrainConfig, sequences: dict[str, int], total: int) -> tuple[SourcePlan, ...]:
    weights = config.data.weights or tuple(sequences.values())
    shares = [weight / sum(weights) for weight in weights]
    return tuple(
        SourcePlan(name, share, share * total / count)
        for share, (name, count) in zip(shares, sequences.items(), strict=True)
    )


def _resolve_max_steps(config: TrainConfig, batch: BatchPlan, per_epoch: int) -> int:
    """Return the steps until the earliest of max_steps, max_tokens and epochs."""
    bounds = []
    if config.max_steps:
        bounds.append(config.max_steps)
    if config.max_tokens:
        bounds.append(-(-config.max_tokens // batch.tokens_per_step))
    if config.epochs:
        bounds.append(math.ceil(config.epochs * per_epoch / batch.sequences_per_step))
    return min(bounds)


def _resolve_decay_steps(lr: LRConfig, max_steps: int) -> int:
    if lr.decay_steps or lr.schedule in ("constant", "inverse-sqrt"):
        return lr.decay_steps
    if lr.schedule == "wsd":
        return max(1, max_steps // 5)
    return max(1, max_steps - lr.warmup_steps)


def resolve_compile(config: TrainConfig, device: str) -> bool:
    """Return whether a run on `device`, cpu, cuda or mps, is compiled."""
    return device == "cuda" if config.compile == "auto" else config.compile == "on"


def _resolve_dtype(config: TrainConfig, machine: MachineFacts) -> str:
    if config.dtype != "auto":
        return config.dtype
    if machine.has_bfloat16:
        return "bfloat16"
    return "float16" if machine.device == "cuda" else "float32"


def _note_device(config: TrainConfig, machine: MachineFacts, dtype: str) -> list[str]:
    """Return remarks on the device: its number of processes, its dtype, and the bits that it promises."""
    notes = []
    if machine.device == "cuda" and machine.world_size == 1 and machine.gpu_count > 1:
        notes.append(
            f"1 of {machine.gpu_count} GPUs is used; torchrun --nproc-per-node {machine.gpu_count} -m gpt.main ... "
            "uses all of them"
        )
    if machine.device == "cuda" and config.dtype == "auto" and dtype == "float16":
        notes.append(FLOAT16_NOTE)
    if dtype == "float32" and config.residual_dtype == "compute":
        notes.append("--residual-dtype compute changes nothing: --dtype is float32")
    if dtype == "float32" and machine.runtime.get("tf32"):
        notes.append("--dtype float32 multiplies in TF32 on this GPU: 10 bits of mantissa instead of 23")
    if config.parallel.reproducible and machine.device == "cuda":
        notes.append(
            "--parallel.reproducible is bit-exact on GPUs of one kind, with one driver and build of torch; "
            "gpt verify-resume checks it on yours"
        )
    if config.parallel.reproducible and machine.device == "mps":
        notes.append("--parallel.reproducible is not bit-exact on MPS, whose kernels may add in any order")
    return notes
