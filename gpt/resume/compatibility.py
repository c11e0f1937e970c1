"""Decide whether a configuration may resume a saved state: by its fields, its identity and its learning rates."""

import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpt.configs.data_config import TOKENIZER_KINDS
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.lr_config import LRConfig
from gpt.configs.resume_rule import RESUME_WITH_CHANGES, ResumeRule, get_resume_rules
from gpt.configs.run_plan import (
    CONTENT_KEY,
    CORPUS_KEY,
    DTYPE_KEY,
    FLOAT16_NOTE,
    RunPlan,
    resolve,
    resolve_compile,
)
from gpt.configs.train_config import HORIZON, TrainConfig
from gpt.errors import UserError
from gpt.utils.custom_scheduler import build_schedule

WEIGHT_INDEPENDENT = frozenset({"vocab_size", "dropout", "init", "init_std"})
"""Fields of a model that loaded weights do not depend on; the vocabulary is compared through the tokenizer."""
MAX_NAMED_DIFFERENCES = 3
"""Fields that a message names if no flag allows all of the changes."""
PER_LAUNCH = frozenset({"run_dir", "resume", "resume_with_changes", "init_from"})
"""Fields that say where and how one launch starts; a change of them is not reported."""


@dataclass(frozen=True)
class Difference:
    """A field whose value is not the saved one."""

    name: str
    """Dotted name."""
    saved: Any
    current: Any
    rule: ResumeRule
    """SAFE, NEEDS_FLAG, FORBIDDEN or SAFE_IF_LR_UNCHANGED."""

    def __str__(self) -> str:
        return f"{self.name} {self.saved} -> {self.current} ({self.rule.value})"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted name -> value for every leaf of a nested dict.

    >>> flatten({"seed": 1, "lr": {"max_lr": 0.1}})
    {'seed': 1, 'lr.max_lr': 0.1}
    """
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def find_differences(saved: TrainConfig, current: TrainConfig) -> tuple[Difference, ...]:
    """Compare two configurations field by field.

    A derived size equals the same size given as a number, and a path equals every other spelling of it. A size that is
    derived in both is left out: the field that it is derived from says the same.
    """
    before, now = (
        flatten(_resolve_model(config).map_paths(os.path.realpath).model_dump(mode="json"))
        for config in (saved, current)
    )
    given_before, given_now = (flatten(config.model_dump(mode="json")) for config in (saved, current))
    rules = get_resume_rules(TrainConfig)
    has_dropout = bool(saved.model.dropout or current.model.dropout)
    return tuple(
        Difference(name, value, now[name], _decide_rule(name, rules[name], (value, now[name]), has_dropout))
        for name, value in before.items()
        if value != now[name] and given_before[name] != given_now[name]
    )


def require_resumable(config: TrainConfig, saved: TrainConfig, place: str, device: str) -> tuple[Difference, ...]:
    """Check that `config` may resume what `saved` describes, and return the differences to report.

    The device and compilation are compared as they are on this machine, so auto equals what it stands for.

    Args:
        config: configuration of this launch.
        saved: configuration of the saved state.
        place: flag and path of the run, for the message.
        device: cpu, cuda or mps, which auto stands for.

    Raises:
        UserError: names every field in the way, and the flag that allows those it can allow.
    """
    differences = find_differences(_resolve_device(saved, device), _resolve_device(config, device))
    require_allowed(differences, place, with_changes=config.resume_with_changes)
    return tuple(item for item in differences if item.name not in PER_LAUNCH)


def require_allowed(differences: Sequence[Difference], place: str, *, with_changes: bool) -> None:
    """Check that a run may resume with these differences.

    Args:
        differences: the result of `find_differences`.
        place: flag and path of the run, for the message.
        with_changes: whether the user passed --resume-with-changes.

    Raises:
        UserError: names the fields in the way, and the flag that allows those it can allow.
    """

    def describe(rule: ResumeRule) -> list[str]:
        return [
            f"{item.name} is {item.saved} in the run and {item.current} in this command"
            for item in differences
            if item.rule is rule
        ]

    forbidden = describe(ResumeRule.FORBIDDEN)
    needs_flag = [] if with_changes else describe(ResumeRule.NEEDS_FLAG)
    if not forbidden and not needs_flag:
        return
    if len(forbidden) > MAX_NAMED_DIFFERENCES:  # a run of another preset, or of a former default
        named, n_more = forbidden[:MAX_NAMED_DIFFERENCES], len(forbidden) + len(needs_flag) - MAX_NAMED_DIFFERENCES
        raise UserError(
            f"{place} holds a run of another configuration: {', '.join(named)}, and {n_more} more differ; "
            "--config with the run's config.json resumes it, another --run-dir starts a new run"
        )
    reasons = forbidden + ([f"{', '.join(needs_flag)} ({RESUME_WITH_CHANGES} allows this)"] if needs_flag else [])
    remedy = "another --run-dir" if forbidden else f"add {RESUME_WITH_CHANGES}"
    raise UserError(
        f"{place} holds a run of another configuration: {', '.join(reasons)}; use the same values or {remedy}"
    )


def require_same_architecture(saved: GPTConfig, current: GPTConfig, checkpoint: Path) -> None:
    """Compare the model of `--init-from` with the configured one, in every field that its weights depend on.

    The context may be shorter.

    Raises:
        UserError: names the first field that differs.
    """
    saved, current = saved.resolve(), current.resolve()
    for name in GPTConfig.model_fields:
        before, now = getattr(saved, name), getattr(current, name)
        is_shorter = name == "block_size" and now < before
        if before != now and name not in WEIGHT_INDEPENDENT and not is_shorter:
            flag = f"--model.{name.replace('_', '-')}"
            raise UserError(
                f"--init-from {checkpoint} has another architecture: {flag} is {before} there and {now} in this "
                f"command; use {flag} {before}"
            )


def require_same_identity(
    saved: Mapping[str, str | int],
    current: Mapping[str, str | int],
    names: Set[str],
    checkpoint: Path,
    differences: Sequence[Difference] = (),
) -> None:
    """Compare what a checkpoint's run derived from its corpus and machine with what this run derived.

    Args:
        saved: the identity in the checkpoint; names that an older checkpoint lacks are not compared.
        current: `RunPlan.identity`.
        names: which of its names to compare.
        checkpoint: for the message.
        differences: fields that have changed, for the message.

    Raises:
        UserError: names the first that differs.
    """
    for name in current:
        if name in names and saved.get(name, current[name]) != current[name]:
            remedy = f"or add {RESUME_WITH_CHANGES}" if name == DTYPE_KEY else "or use another --run-dir"
            changed = [item for item in differences if item.rule is ResumeRule.SAFE_IF_SAME_CONTENT]
            causes = "".join(f"; {item.name} was {item.saved} and is {item.current}" for item in changed)
            raise UserError(
                f"{checkpoint} cannot be resumed: {name} is {saved[name]} in the checkpoint and {current[name]} in "
                f"this run{causes}; restore what was changed, {remedy}"
            )


def adopt_corpus(plan: RunPlan, saved: Mapping[str, str | int]) -> RunPlan:
    """Return `plan` with the digest that the checkpoint has of its corpus, if only names of sources have changed.

    Args:
        plan: the plan of this run.
        saved: the identity in the checkpoint.
    """
    content = plan.corpus.content_sha256
    if not content or saved.get(CONTENT_KEY) != content:
        return plan
    return replace(plan, corpus=replace(plan.corpus, sha256=str(saved[CORPUS_KEY])))


def adopt_dtype(config: TrainConfig, plan: RunPlan, saved: Mapping[str, str | int]) -> RunPlan:
    """Return `plan` in float32 if it resumes a run that --dtype auto trained in float32 on a GPU without bfloat16.

    Args:
        config: configuration of this launch.
        plan: the plan of this run.
        saved: the identity in the checkpoint.
    """
    was_float32 = plan.dtype == "float16" and saved.get(DTYPE_KEY) == "float32"
    if config.dtype != "auto" or not was_float32:
        return plan
    notes = [note for note in plan.notes if note != FLOAT16_NOTE]
    return replace(plan, dtype="float32", notes=(*notes, "--dtype auto is float32, as in the checkpoint"))


def keeps_learning_rates(config: TrainConfig, plan: RunPlan, saved: TrainConfig, step: int, checkpoint: Path) -> bool:
    """Return whether the schedule gives the first `step` steps the learning rates that they were trained with.

    Raises:
        UserError: it does not, and --resume-with-changes was not passed.
    """
    horizon = {name: getattr(saved, name) for name in HORIZON}
    former = resolve(config.model_copy(update={**horizon, "lr": saved.lr}), plan.machine, plan.corpus)
    former_schedule = build_schedule(former.lr, former.max_steps)

    def keeps(lr: LRConfig) -> bool:
        schedule = build_schedule(lr, plan.max_steps)
        return all(former_schedule(past) == schedule(past) for past in range(step))

    if keeps(plan.lr):
        return True
    if config.resume_with_changes:
        return False
    same_decay = plan.lr.model_copy(update={"decay_steps": former.lr.decay_steps})
    remedy = f"--lr.decay-steps {same_decay.decay_steps} keeps the former decay, or " if keeps(same_decay) else ""
    raise UserError(
        f"{checkpoint} cannot be resumed: its {step} steps had the learning rates of a run of {former.max_steps} "
        f"steps, and a run of {plan.max_steps} steps has others; {remedy}{RESUME_WITH_CHANGES} accepts them"
    )


def _resolve_device(config: TrainConfig, device: str) -> TrainConfig:
    device = device if config.device == "auto" else config.device
    return config.model_copy(update={"device": device, "compile": "on" if resolve_compile(config, device) else "off"})


def _resolve_model(config: TrainConfig) -> TrainConfig:
    return config.model_copy(update={"model": config.model.resolve()})


def _decide_rule(name: str, rule: ResumeRule, values: tuple[Any, Any], has_dropout: bool) -> ResumeRule:
    """Decide SAFE_WITHOUT_DROPOUT, and SAFE_IF_SAME_CONTENT for kinds of tokenizers; return other rules as they are."""
    if rule is ResumeRule.SAFE_WITHOUT_DROPOUT:
        return ResumeRule.NEEDS_FLAG if has_dropout else ResumeRule.SAFE
    if name == "data.tokenizer" and set(values) <= set(TOKENIZER_KINDS):
        return ResumeRule.FORBIDDEN
    return rule
