"""tokens_per_step -> micro-batches, processes and accumulation steps."""

from dataclasses import dataclass

from gpt.configs.train_config import MAX_MICRO_BATCH_SIZE, TrainConfig
from gpt.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """Sizes of a step's batch; derived without a corpus, so they are checked before one is prepared."""

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


def plan_batch(config: TrainConfig, world_size: int, max_micro_batch: int = 1) -> BatchPlan:
    """Divide `tokens_per_step` into micro-batches; an automatic size is at most `max_micro_batch` sequences.

    Args:
        config: the configuration; a size of auto-cuda counts as auto.
        world_size: number of ranks.
        max_micro_batch: upper bound of an automatic size.

    Raises:
        UserError: the sizes do not divide.
    """
    block_size = config.model.block_size
    size = 1 if isinstance(config.micro_batch_size, str) else config.micro_batch_size
    unit = size * block_size * world_size
    tokens = config.tokens_per_step or unit
    if tokens % unit:
        raise UserError(_explain_indivisible(tokens, size, block_size, world_size))
    if config.parallel.reproducible:
        _require_binary_tree(config, world_size, n_leaves=tokens // (size * block_size))
    if isinstance(config.micro_batch_size, str):
        size = max(n for n in find_divisors(tokens // unit) if n <= max_micro_batch)
    return BatchPlan(size, block_size, world_size, tokens // (size * block_size * world_size))


def find_divisors(number: int) -> list[int]:
    """Return the divisors of `number` in ascending order, up to MAX_MICRO_BATCH_SIZE."""
    return [n for n in range(1, min(number, MAX_MICRO_BATCH_SIZE) + 1) if number % n == 0]


def _explain_indivisible(tokens: int, size: int, block_size: int, world_size: int) -> str:
    unit = size * block_size * world_size
    below = tokens - tokens % unit
    nearest = " or ".join(str(n) for n in (below, below + unit) if n)
    largest = min(size, tokens // (block_size * world_size))
    fitting = next((n for n in range(largest, 0, -1) if tokens % (n * block_size * world_size) == 0), None)
    remedy = f", or --micro-batch-size {fitting}" if fitting else ""
    return (
        f"--tokens-per-step {tokens} is not divisible by micro_batch_size*block_size*processes="
        f"{size}*{block_size}*{world_size}={unit} (nearest: {nearest}{remedy})"
    )


def _require_binary_tree(config: TrainConfig, world_size: int, n_leaves: int) -> None:
    """Check that a step's micro-batches, over all processes, are the leaves of a complete binary tree.

    Raises:
        UserError: they are not, or their number depends on the machine.
    """
    flag = "--parallel.reproducible"
    if isinstance(config.micro_batch_size, str):
        size = config.micro_batch_size
        raise UserError(f"{flag}: --micro-batch-size {size} depends on the machine, and decides bits; set a number")
    if config.tokens_per_step == 0:
        raise UserError(f"{flag}: --tokens-per-step 0 grows with the number of processes; set a number")
    if world_size & (world_size - 1):
        below = 1 << (world_size.bit_length() - 1)
        raise UserError(f"{flag}: {world_size} processes are not a power of two (nearest: {below} or {2 * below})")
    if n_leaves & (n_leaves - 1):
        below = 1 << (n_leaves.bit_length() - 1)
        unit = config.tokens_per_step // n_leaves
        raise UserError(
            f"{flag}: --tokens-per-step {config.tokens_per_step} makes {n_leaves} micro-batches of --micro-batch-size "
            f"{config.micro_batch_size}, which is not a power of two (nearest: {below * unit} or {2 * below * unit})"
        )
