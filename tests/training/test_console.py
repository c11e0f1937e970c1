from io import StringIO

from rich.console import Console

from gpt.training.sinks.console import plan_table
from tests.training.test_logger import PLAN


def test_the_plan_is_shown_with_what_was_resolved() -> None:
    out = StringIO()
    Console(file=out, width=120).print(plan_table(PLAN))
    text = out.getvalue()
    for part in ("a CPU (cpu), 1 process, float32", "1M training tokens, vocabulary 300", "20 steps", "cosine, up to"):
        assert part in text
