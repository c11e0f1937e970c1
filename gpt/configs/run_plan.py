"""resolve(config, machine, corpus) -> RunPlan: every derived number and every check across sections."""

import hashlib
import json
import math
from dataclasses import dataclass, field

from gpt.configs.gpt_config import GPTConfig
from gpt.configs.lr_config import LRConfig
from gpt.configs.optimizer_config import OptimizerConfig
from gpt.configs.train_config import MAX_MICRO_BATCH_SIZE, TrainConfig
from gpt.errors import UserError

CORPUS, TOKENIZER, DTYPE = "the corpus's SHA-256", "the tokenizer's SHA-256", "--dtype"
"""Their names in a run's identity."""


@dataclass(frozen=True)
class MachineFacts:
    """What the machine offers; filled by `gpt.machine.hardware`."""

    device: str
    """cpu, cuda or mps: resolved, never auto."""
    device_name: str
    has_bfloat16: bool
    """The device has bfloat16 arithmetic, not just a conversion."""
    world_size: int = 1
    """Processes that train together."""
    runtime: dict[str, int | bool] = field(default_factory=dict)
    """What was set in each process, under the names of RuntimeConfig."""
    max_micro_batch: int = 1
    """What --micro-batch-size auto may be at most; filled by `gpt.auto_batch`."""


@dataclass(frozen=True)
class StreamFacts:
    """What is drawn from in training: a source that has a weight, or all of them together."""

    name: str
    tokens: int
    packed_sequences: int = 0
    """Sequences that its documents are packed in; 0 where windows are cut."""


@dataclass(frozen=True)
class CorpusFacts:
    """What the prepared corpus holds; filled by `gpt.data.corpus`."""

    vocab_size: int
    streams: tuple[StreamFacts, ...]
    """What is trained on."""
    sha256: str = ""
    """Digest of everything that was prepared."""
    tokenizer_sha256: str = ""
    val_tokens: int = 0
    val_bytes: int = 0
    """Bytes of the validation text, end-of-text tokens not counted."""
    val_documents: int = 0
    xz_bits_per_byte: float | None = None
    """What `xz -9e` needs for the validation text; None where it was too long to compress."""

    @property
    def train_tokens(self) -> int:
        """Over all streams."""
        return sum(stream.tokens for stream in self.streams)


@dataclass(frozen=True)
class SourcePlan:
    """A source's share of a run."""

    name: str
    share: float
    """Of the sequences."""
    epochs: float
    """Passes over it."""


@dataclass(frozen=True)
class BatchPlan:
    """How a step's tokens are cut up; needs no corpus, so it is checked before one is prepared."""

    micro_batch_size: int
    block_size: int
    world_size: int
    grad_accum_steps: int

    @property
    def sequences_per_step(self) -> int:
        """Sequences over all processes and micro-batches of one update."""
        return self.micro_batch_size * self.grad_accum_steps * self.world_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens over all processes and micro-batches of one update."""
        return self.sequences_per_step * self.block_size


@dataclass(frozen=True)
class RunPlan:
    """Every number that is derived from configuration, machine and corpus together."""

    machine: MachineFacts
    corpus: CorpusFacts
    batch: BatchPlan
    reproducible: bool
    """Every bit is to be the same at every number of processes."""
    seed: int
    dtype: str
    """float32, bfloat16 or float16."""
    model: GPTConfig
    """Resolved: every derived size is filled in; `vocab_size` is the tokenizer's, or more."""
    max_steps: int
    windows_per_epoch: int
    """Training sequences in one pass over the corpus."""
    sources: tuple[SourcePlan, ...]
    """What is trained on."""
    lr: LRConfig
    """With `decay_steps` filled in."""
    optimizer: OptimizerConfig
    log_interval: int
    eval_interval: int
    checkpoint_interval: int
    eval_batches: int
    evaluates_first: bool = False
    """The run begins at its last step, after which the model has not been evaluated."""
    notes: tuple[str, ...] = field(default=())
    """What the user should know of how the values were chosen."""

    @property
    def identity(self) -> dict[str, str | int]:
        """What the configuration does not say and a continued run must share, or its losses would mean something else.

        The values are resolved from the corpus and the machine, under names that a user can act on.
        """
        identity: dict[str, str | int] = {
            CORPUS: self.corpus.sha256,
            TOKENIZER: self.corpus.tokenizer_sha256,
            DTYPE: self.dtype,
            "--tokens-per-step": self.batch.tokens_per_step,
        }
        if self.reproducible:  # what else decides the bits of a step
            identity["--micro-batch-size"] = self.batch.micro_batch_size
            identity["--runtime.threads"] = self.machine.runtime.get("threads", 1)
            if self.dtype == "bfloat16":
                identity["--runtime.fused-attention"] = self.machine.runtime.get("fused_attention", False)
        return identity

    @property
    def order(self) -> str:
        """Digest of all that decides which sequences make up each global batch."""
        shares = [source.share for source in self.sources]
        facts = [self.corpus.sha256, self.seed, self.batch.tokens_per_step, self.batch.block_size]
        return hashlib.sha256(json.dumps([*facts, self.windows_per_epoch, shares]).encode()).hexdigest()

    @property
    def epochs(self) -> float:
        """Passes over the training set."""
        return self.max_steps * self.batch.sequences_per_step / self.windows_per_epoch

    def evaluates_at(self, step: int) -> bool:
        """Whether the model is evaluated after `step`."""
        return step == self.max_steps or _is_due(step, self.eval_interval)

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is written after `step`."""
        return step == self.max_steps or _is_due(step, self.checkpoint_interval)

    def logs_at(self, step: int) -> bool:
        """Whether metrics are reported after `step`.

        Evaluations and saves close a reporting window, so that a reported rate is of training alone.
        """
        return step == 1 or _is_due(step, self.log_interval) or self.evaluates_at(step) or self.saves_at(step)


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def windows_per_epoch(n_tokens: int, block_size: int) -> int:
    """Sequences of `block_size` targets in one epoch over `n_tokens`.

    An epoch starts at a drawn offset below `block_size` (see `gpt.data.order`), which costs up to one window.
    """
    return max(1, (n_tokens - block_size) // block_size)


def divisors(number: int) -> list[int]:
    """Ascending, up to the largest micro-batch."""
    return [n for n in range(1, min(number, MAX_MICRO_BATCH_SIZE) + 1) if number % n == 0]


def plan_batch(config: TrainConfig, world_size: int, max_micro_batch: int = 1) -> BatchPlan:
    """Cut `tokens_per_step` into micro-batches, of at most `max_micro_batch` where their size is auto.

    Raises:
        UserError: the sizes do not divide.
    """
    block_size = config.model.block_size
    size = 1 if config.micro_batch_size == "auto" else config.micro_batch_size
    unit = size * block_size * world_size
    tokens = config.tokens_per_step or unit
    if tokens % unit:
        below = tokens - tokens % unit
        nearest = " or ".join(str(n) for n in (below, below + unit) if n)
        most = min(size, tokens // (block_size * world_size))
        fitting = next((n for n in range(most, 0, -1) if tokens % (n * block_size * world_size) == 0), None)
        remedy = f", or --micro-batch-size {fitting}" if fitting else ""
        raise UserError(
            f"--tokens-per-step {tokens} is not divisible by micro_batch_size*block_size*processes="
            f"{size}*{block_size}*{world_size}={unit}; nearest: {nearest}{remedy}"
        )
    if config.parallel.reproducible:
        _require_tree(config, world_size, n_leaves=tokens // (size * block_size))
    if config.micro_batch_size == "auto":
        size = max(n for n in divisors(tokens // unit) if n <= max_micro_batch)
    return BatchPlan(size, block_size, world_size, tokens // (size * block_size * world_size))


def _require_tree(config: TrainConfig, world_size: int, n_leaves: int) -> None:
    """Check that the micro-batches of a step, over all processes, are the leaves of a whole binary tree.

    Raises:
        UserError: they are not, or are not the same at every number of processes.
    """
    flag = "--parallel.reproducible"
    if config.micro_batch_size == "auto":
        raise UserError(f"{flag}: --micro-batch-size auto is chosen by the machine, and decides bits; give a number")
    if config.tokens_per_step == 0:
        raise UserError(f"{flag}: --tokens-per-step 0 grows with the number of processes; give a number")
    if world_size & (world_size - 1):
        below = 1 << (world_size.bit_length() - 1)
        raise UserError(f"{flag} needs a power of two of processes, not {world_size}; nearest: {below} or {2 * below}")
    if n_leaves & (n_leaves - 1):
        below = 1 << (n_leaves.bit_length() - 1)
        unit = config.tokens_per_step // n_leaves
        raise UserError(
            f"{flag} needs a power of two of micro-batches in a step: --tokens-per-step {config.tokens_per_step} makes "
            f"{n_leaves} of --micro-batch-size {config.micro_batch_size}; nearest: {below * unit} or {2 * below * unit}"
        )


def resolve(config: TrainConfig, machine: MachineFacts, corpus: CorpusFacts) -> RunPlan:
    """Derive a run's numbers.

    Raises:
        UserError: values that do not fit together, with the nearest that do.
    """
    batch = plan_batch(config, machine.world_size, machine.max_micro_batch)
    sequences = _sequences(config, batch, corpus)
    if config.model.vocab_size and config.model.vocab_size < corpus.vocab_size:
        raise UserError(
            f"--model.vocab-size {config.model.vocab_size} is smaller than the tokenizer's {corpus.vocab_size}; "
            f"nearest: {corpus.vocab_size}, or 0 for the tokenizer's own"
        )
    per_epoch = sum(sequences.values())
    max_steps = _horizon(config, batch, per_epoch)
    notes = []
    if config.micro_batch_size == "auto":
        bound = "are of use to a CPU or fit in memory" if machine.device == "cpu" else "fit in memory"
        notes.append(
            f"--micro-batch-size auto is {batch.micro_batch_size}, which divides the step: "
            f"at most {machine.max_micro_batch} sequences {bound}"
        )
    if config.parallel.reproducible and machine.device != "cpu":
        notes.append("--parallel.reproducible promises every bit on a CPU; kernels of a GPU may add in any order")
    if config.lr.warmup_steps >= max_steps:
        notes.append(f"warmup of {config.lr.warmup_steps} steps lasts the whole run of {max_steps}")
    if corpus.val_tokens < 2:
        notes.append("no validation set: val/loss is not reported")
    return RunPlan(
        machine=machine,
        corpus=corpus,
        batch=batch,
        reproducible=config.parallel.reproducible,
        seed=config.seed,
        dtype=_dtype(config, machine),
        model=config.model.model_copy(update={"vocab_size": config.model.vocab_size or corpus.vocab_size}).resolved(),
        max_steps=max_steps,
        windows_per_epoch=per_epoch,
        sources=_shares(config, sequences, max_steps * batch.sequences_per_step),
        lr=config.lr.model_copy(update={"decay_steps": _decay_steps(config.lr, max_steps)}),
        optimizer=config.optimizer,
        log_interval=config.log.interval,
        eval_interval=config.eval.interval,
        checkpoint_interval=config.checkpoint.interval,
        eval_batches=config.eval.batches,
        notes=tuple(notes),
    )


def _sequences(config: TrainConfig, batch: BatchPlan, corpus: CorpusFacts) -> dict[str, int]:
    """Sequences in one pass over each stream.

    Raises:
        UserError: the weights do not fit the sources, or a stream is too short for one sequence.
    """
    weights, streams = config.data.weights, corpus.streams
    if weights and len(weights) != len(streams):
        names = ", ".join(stream.name for stream in streams)
        raise UserError(f"--data.weights: {len(weights)} for {len(streams)} sources ({names}); give one for each")
    for stream in streams:
        if stream.tokens < 2:
            raise UserError(f"{stream.name} is too short: {stream.tokens} tokens to train on")
        if stream.tokens <= batch.block_size:
            raise UserError(
                f"the training text of {stream.name} has {stream.tokens} tokens, "
                f"too few for --model.block-size {batch.block_size}; nearest: {stream.tokens - 1}"
            )
    return {
        stream.name: stream.packed_sequences or windows_per_epoch(stream.tokens, batch.block_size) for stream in streams
    }


def _shares(config: TrainConfig, sequences: dict[str, int], total: int) -> tuple[SourcePlan, ...]:
    weights = config.data.weights or tuple(sequences.values())
    shares = [weight / sum(weights) for weight in weights]
    return tuple(
        SourcePlan(name, share, share * total / count)
        for share, (name, count) in zip(shares, sequences.items(), strict=True)
    )


def _horizon(config: TrainConfig, batch: BatchPlan, per_epoch: int) -> int:
    """Steps until the earliest of the bounds that are set."""
    bounds = []
    if config.max_steps:
        bounds.append(config.max_steps)
    if config.max_tokens:
        bounds.append(-(-config.max_tokens // batch.tokens_per_step))
    if config.epochs:
        bounds.append(math.ceil(config.epochs * per_epoch / batch.sequences_per_step))
    return min(bounds)


def _decay_steps(lr: LRConfig, max_steps: int) -> int:
    if lr.decay_steps or lr.schedule in ("constant", "inverse-sqrt"):
        return lr.decay_steps
    if lr.schedule == "wsd":
        return max(1, max_steps // 5)
    return max(1, max_steps - lr.warmup_steps)


def _dtype(config: TrainConfig, machine: MachineFacts) -> str:
    if config.dtype == "auto":
        return "bfloat16" if machine.has_bfloat16 else "float32"
    return config.dtype
