"""Estimate of the memory of a training run, from its sizes alone."""

from dataclasses import dataclass

from gpt.configs.batch_plan import BatchPlan
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.optimizer_config import OptimizerConfig
from gpt.machine.flops import linear_layers
from gpt.ops.cross_entropy import CHUNK_BYTES
from gpt.ops.recompute import RECOMPUTE_MIN_BYTES

FLOAT32_BYTES = 4
SCRATCH_BYTES = 2**23
"""Upper estimate of the tiles that functions compute in (`_ELEMENTS_PER_TILE` in gpt.ops)."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process needs at the peak of a step, without the program itself."""

    weights: int
    gradients: int
    optimizer: int
    """State of the optimizer."""
    activations: int
    """Tensors saved for backward, and the temporary ones at the peak."""
    checkpoint: int = 0
    """Copy of the state that is written in the background."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.checkpoint


def estimate_memory(
    model: GPTConfig,
    batch: BatchPlan,
    optimizer: OptimizerConfig,
    dtype: str,
    *,
    rounds_residuals: bool = False,
    activation_checkpointing: str = "none",
    copies_state: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> MemoryEstimate:
    """Estimate the memory of one process.

    Weights, gradients and optimizer are exact. Activations are those of eager attention without a T x T tensor.

    Args:
        model: resolved configuration, vocab_size included.
        batch: sizes of a step.
        optimizer: AdamW has two values per parameter; Muon has one for each of its matrices.
        dtype: float32, bfloat16 or float16.
        rounds_residuals: whether the residual stream has this dtype, and not float32.
        activation_checkpointing: none, block or selective.
        copies_state: whether a checkpoint is copied in the same memory.
        chunk_bytes: bytes of logits that the loss materialises at a time.
    """
    weights = FLOAT32_BYTES * model.n_parameters
    *hidden, _ = linear_layers(model)
    matrices = sum(linear.n_in * linear.n_out * linear.layers for linear in hidden)
    size = DTYPE_BYTES[dtype]
    state = 2 * weights - (FLOAT32_BYTES * matrices if optimizer.name == "muon" else 0)
    return MemoryEstimate(
        weights=weights,
        gradients=weights,
        optimizer=state,
        activations=_estimate_activations(
            model, batch, size, size if rounds_residuals else FLOAT32_BYTES, activation_checkpointing, chunk_bytes
        ),
        checkpoint=weights + state if copies_state else 0,
    )


def _estimate_activations(
    model: GPTConfig, batch: BatchPlan, size: int, stream_size: int, checkpointing: str, chunk_bytes: int
) -> int:
    """Return the bytes of a micro-batch; the sizes are those of the compute dtype and of the residual stream's."""
    n_tokens = batch.micro_batch_size * batch.block_size
    stream = stream_size * model.n_embd  # bytes per token of the residual stream
    if model.norm == "rmsnorm" and n_tokens * stream < RECOMPUTE_MIN_BYTES:
        stream = FLOAT32_BYTES * model.n_embd  # it saves a float32 copy
    block = _block_bytes_per_token(model, n_tokens, size, stream)
    matmuls = size * (sum(model.qkv_sizes) + sum(model.fc_sizes) + 2 * model.n_embd)
    saved = model.n_layer * {"none": block, "block": stream, "selective": stream + matmuls}[checkpointing]
    recomputed = 0 if checkpointing == "none" else block  # of the block that backward is in
    rounded_weights = 0
    if size < FLOAT32_BYTES and n_tokens * stream < RECOMPUTE_MIN_BYTES:  # see gpt.ops.linear
        *hidden, _ = linear_layers(model)
        rounded_weights = size * sum(linear.n_in * linear.n_out * linear.layers for linear in hidden)
    # The loss needs the head's gradient, its rounded weight, some of the logits, and the hidden states' gradient.
    head = model.vocab_size * model.n_embd
    logits = min(n_tokens * model.vocab_size * size, chunk_bytes)
    loss = FLOAT32_BYTES * head + (size * head if size < FLOAT32_BYTES else 0) + logits
    loss += n_tokens * model.n_embd * (size + FLOAT32_BYTES)
    backward = FLOAT32_BYTES * head + n_tokens * (recomputed + size * 3 * sum(model.fc_sizes))
    return n_tokens * (saved + 2 * stream) + rounded_weights + max(loss + SCRATCH_BYTES, backward)


def _block_bytes_per_token(model: GPTConfig, n_tokens: int, size: int, stream: int) -> int:
    """Return the bytes per token that a block saves for backward (see gpt.models.gpt)."""
    normed = 0 if n_tokens * stream >= RECOMPUTE_MIN_BYTES else size * model.n_embd
    queries, keys, _ = model.qkv_sizes
    attention = size * (sum(model.qkv_sizes) + queries) + FLOAT32_BYTES * model.n_head
    if model.position == "rotary":
        attention += size * (queries + keys)
    if model.qk_norm:
        attention += FLOAT32_BYTES * (queries + keys)
    if model.n_kv_head < model.n_head:
        attention += size * 2 * queries
    fc, hidden = sum(model.fc_sizes), model.intermediate_size
    is_recomputed = n_tokens * fc * size >= RECOMPUTE_MIN_BYTES
    inside = hidden if model.mlp == "swiglu" else 0  # SiLU of the gate
    mlp = size * (fc if is_recomputed else fc + inside + hidden)
    return 2 * (stream + normed) + attention + mlp
