"""What may change when a run is continued, field by field."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpt.configs.resume_rule import FLAG, ResumeRule, resume_rules
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError


@dataclass(frozen=True)
class Difference:
    """A field that has another value than when the checkpoint was saved."""

    name: str
    """Dotted."""
    then: Any
    now: Any
    rule: ResumeRule
    """SAFE, NEEDS_FLAG, FORBIDDEN or SAFE_IF_LR_UNCHANGED."""

    def __str__(self) -> str:
        return f"{self.name} {self.then} -> {self.now} ({self.rule.value})"


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of a configuration that was dumped."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def differences(then: TrainConfig, now: TrainConfig) -> list[Difference]:
    """What changed between two configurations; SAFE_WITHOUT_DROPOUT is decided."""
    former, present = (leaves(config.model_dump(mode="json")) for config in (then, now))
    rules = resume_rules(TrainConfig)
    return [
        Difference(name, value, present[name], _decided(rules[name], then, now))
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
        [f"{field.name} is {field.then} there and {field.now} here" for field in changed if field.rule is rule]
        for rule in (ResumeRule.FORBIDDEN, ResumeRule.NEEDS_FLAG)
    )
    if with_changes:
        flagged = []
    if not never and not flagged:
        return
    listed = never + ([f"{', '.join(flagged)} ({FLAG} allows that)"] if flagged else [])
    remedy = "take the same values or another --run-dir" if never else f"take the same values or add {FLAG}"
    raise UserError(f"{place} holds a run of another configuration: {', '.join(listed)}; {remedy}")


def _decided(rule: ResumeRule, then: TrainConfig, now: TrainConfig) -> ResumeRule:
    if rule is not ResumeRule.SAFE_WITHOUT_DROPOUT:
        return rule
    return ResumeRule.NEEDS_FLAG if then.model.dropout or now.model.dropout else ResumeRule.SAFE
