from dataclasses import replace
from io import StringIO

from rich.console import Console

from gpt.configs.run_plan import RunPlan, SourcePlan
from gpt.training.sinks.console import build_plan_table
from tests.training.test_logger import PLAN


def render(plan: RunPlan) -> str:
    out = StringIO()
    Console(file=out, width=120).print(build_plan_table(plan))
    return out.getvalue()


def test_plan_table_shows_resolved_values() -> None:
    text = render(PLAN)
    for part in ("a CPU (cpu), 1 process, float32", "1M training tokens, vocabulary 300", "20 steps", "cosine, up to"):
        assert part in text
    assert "sources" not in text


def test_plan_table_shows_runtime_settings() -> None:
    runtime = {"threads": 2, "keep_freed_memory": True, "flush_denormals": False}
    text = render(replace(PLAN, machine=replace(PLAN.machine, runtime=runtime)))
    assert "runtime        2 threads, keep-freed-memory, no-flush-denormals" in text


def test_plan_table_shows_sources_of_a_mixture() -> None:
    sources = (SourcePlan("books", 0.7, 0.25), SourcePlan("code [/x]", 0.2, 1.5), SourcePlan("web", 0.1, 12.0))
    (row,) = (line for line in render(replace(PLAN, sources=sources)).splitlines() if line.startswith("sources"))
    assert (
        row.split("  ", 1)[1].strip()
        == "books 70.0%, 0.25 epochs; code [/x] 20.0%, 1.50 epochs; web 10.0%, 12.00 epochs"
    )
