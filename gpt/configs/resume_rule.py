"""Resume rules: whether a field of the configuration may change when a run is resumed."""

from enum import Enum

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gpt.configs.fields import walk_fields

RESUME_WITH_CHANGES = "--resume-with-changes"


class ResumeRule(Enum):
    """Rule for a field whose value differs from the checkpoint's; the enum's value is the text shown to users."""

    SAFE = "safe"
    """Accepted: the field decides where a run computes or what it records, and changes its numbers by rounding at
    most."""
    SAFE_IF_LR_UNCHANGED = "safe where the steps taken keep their learning rates"
    """Accepted if the steps already taken had the learning rates that the new value gives them; else as NEEDS_FLAG.
    Only the resolved plan can decide this: see `keeps_learning_rates` in gpt/resume/compatibility.py."""
    SAFE_WITHOUT_DROPOUT = "safe without dropout"
    """Accepted without dropout, where it changes rounding alone; with dropout as NEEDS_FLAG, because dropout masks are
    addressed by micro-batch."""
    SAFE_IF_SAME_CONTENT = "safe where the content is the same"
    """Accepted: the field names a file or a source, and the prepared corpus's digest decides whether it is the same.
    Two kinds of tokenizer, which no file names, differ in any case."""
    NEEDS_FLAG = f"needs {RESUME_WITH_CHANGES}"
    """Accepted with the flag: the run resumes as another experiment, so the user has to ask for it."""
    FORBIDDEN = "never changes within a run"
    """Rejected: under another value the saved state, or a step's place in the data, would mean something else."""


SAFE = ResumeRule.SAFE
SAFE_IF_LR_UNCHANGED = ResumeRule.SAFE_IF_LR_UNCHANGED
SAFE_WITHOUT_DROPOUT = ResumeRule.SAFE_WITHOUT_DROPOUT
SAFE_IF_SAME_CONTENT = ResumeRule.SAFE_IF_SAME_CONTENT
NEEDS_FLAG = ResumeRule.NEEDS_FLAG
FORBIDDEN = ResumeRule.FORBIDDEN
"""A field states its rule as metadata: `interval: Annotated[int, SAFE] = 200`; one that states none is FORBIDDEN."""


def get_resume_rule(field: FieldInfo) -> ResumeRule:
    """Return the resume rule of a field."""
    return next((item for item in field.metadata if isinstance(item, ResumeRule)), FORBIDDEN)


def get_resume_rules(model: type[BaseModel]) -> dict[str, ResumeRule]:
    """Return dotted field name -> resume rule for every field of `model`, sections included."""
    return {name: get_resume_rule(field) for name, field in walk_fields(model)}
