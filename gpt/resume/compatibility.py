"""What may change when a run is continued, field by field."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError

FLAG = "--resume-with-changes"


class Change(Enum):
    """What becomes of a changed field; the value says so to the user."""

    SAFE = "safe"
    """Goes through: it decides where a run runs and what is watched of it, and no number that it computes but by
    rounding."""
    SAFE_IF_LR_UNCHANGED = "safe where the steps taken keep their learning rates"
    """Goes through where the run is the one that the new value would have given from its first step; else as
    NEEDS_FLAG. Only the resolved plan can tell: see `gpt.run`."""
    SAFE_WITHOUT_DROPOUT = "safe without dropout"
    """Rounding alone, but what dropout draws is addressed by micro-batches: with dropout as NEEDS_FLAG."""
    NEEDS_FLAG = f"needs {FLAG}"
    """The run goes on, but it is another experiment than it was, and the user has to say so."""
    FORBIDDEN = "never changes within a run"
    """The state means something else under another value, or a step's place in the data does."""


def _each(change: Change, section: str, names: str) -> dict[str, Change]:
    return {f"{section}.{name}" if section else name: change for name in names.split()}


CONTRACT: dict[str, Change] = {
    **_each(Change.SAFE, "", "run_dir device compile compile_mode resume resume_with_changes"),
    **_each(Change.SAFE, "data", "cache_dir workers"),
    **_each(Change.SAFE, "parallel", "activation_checkpointing check_replicas step_timeout"),
    **_each(Change.SAFE, "runtime", "threads keep_freed_memory flush_denormals fused_attention"),
    **_each(Change.SAFE, "log", "interval"),
    **_each(Change.SAFE, "eval", "interval batches"),
    **_each(Change.SAFE, "checkpoint", "interval every_minutes keep keep_best asynchronous"),
    **_each(Change.SAFE, "spike", "max_skips window threshold least_rise rollback max_rollbacks"),
    **_each(Change.SAFE, "spike", "journal"),  # its records are the run's own once it has begun
    **_each(Change.SAFE, "sample", "max_new_tokens temperature top_k top_p prompts"),
    **_each(Change.SAFE, "profile", "start steps"),
    **_each(Change.SAFE_WITHOUT_DROPOUT, "", "micro_batch_size"),
    **_each(Change.SAFE_IF_LR_UNCHANGED, "", "max_steps max_tokens epochs"),
    **_each(Change.SAFE_IF_LR_UNCHANGED, "lr", "decay_steps"),
    **_each(Change.NEEDS_FLAG, "lr", "schedule max_lr min_lr warmup_steps"),
    **_each(Change.NEEDS_FLAG, "optimizer", "muon_lr muon_momentum weight_decay beta1 beta2"),
    **_each(Change.NEEDS_FLAG, "", "grad_clip"),
    **_each(Change.NEEDS_FLAG, "parallel", "reproducible"),
    **_each(Change.NEEDS_FLAG, "", "dtype"),  # of autocast: what is saved is of the same types under each
    **_each(Change.NEEDS_FLAG, "model", "dropout"),  # no weight depends on it
    **_each(Change.FORBIDDEN, "model", "n_layer n_head n_kv_head n_embd block_size vocab_size bias position norm mlp"),
    **_each(Change.FORBIDDEN, "model", "qk_norm logit_softcap head_dim intermediate_size norm_eps rope_theta"),
    **_each(Change.FORBIDDEN, "model", "tie_embeddings qkv_bias attn_out_bias mlp_bias"),
    **_each(Change.FORBIDDEN, "optimizer", "name"),  # its state is another one
    **_each(Change.FORBIDDEN, "data", "source weights val_source val_fraction text_field on_error deduplicate"),
    **_each(Change.FORBIDDEN, "data", "tokenizer vocab_size packing document_mask"),
    # Step s reads the sequences from s * sequences per step on, in an order that the seed decides: under another number
    # or order the run would repeat some and leave out others.
    **_each(Change.FORBIDDEN, "", "seed tokens_per_step"),
    **_each(Change.FORBIDDEN, "", "init_from"),  # where the run began is past
}
"""Every field of TrainConfig; one that is missing here fails a test."""


@dataclass(frozen=True)
class Difference:
    """A field that has another value than when the checkpoint was saved."""

    name: str
    """Dotted."""
    then: Any
    now: Any
    change: Change

    def __str__(self) -> str:
        return f"{self.name} {self.then} -> {self.now} ({self.change.value})"


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of a configuration that was dumped."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def differences(then: TrainConfig, now: TrainConfig) -> list[Difference]:
    """What changed between two configurations; SAFE_WITHOUT_DROPOUT is decided."""
    former, present = (leaves(config.model_dump(mode="json")) for config in (then, now))
    return [
        Difference(name, value, present[name], _decided(CONTRACT[name], then, now))
        for name, value in former.items()
        if value != present[name]
    ]


def require_allowed(changed: Sequence[Difference], place: str, *, with_changes: bool) -> None:
    """Check that a run may be continued with these differences.

    Args:
        changed: from `differences`.
        place: what holds the run, for the message.
        with_changes: whether the user said so.

    Raises:
        UserError: names every field that stands in the way, and the flag where one allows it.
    """
    never, flagged = (
        [f"{field.name} is {field.then} there and {field.now} here" for field in changed if field.change is change]
        for change in (Change.FORBIDDEN, Change.NEEDS_FLAG)
    )
    if with_changes:
        flagged = []
    if not never and not flagged:
        return
    listed = never + ([f"{', '.join(flagged)} ({FLAG} allows that)"] if flagged else [])
    remedy = "take the same values or another --run-dir" if never else f"take the same values or add {FLAG}"
    raise UserError(f"{place} holds a run of another configuration: {', '.join(listed)}; {remedy}")


def _decided(change: Change, then: TrainConfig, now: TrainConfig) -> Change:
    if change is not Change.SAFE_WITHOUT_DROPOUT:
        return change
    return Change.NEEDS_FLAG if then.model.dropout or now.model.dropout else Change.SAFE
