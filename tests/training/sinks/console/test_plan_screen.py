from dataclasses import replace
from io import StringIO

import pytest
from rich.cells import cell_len

from gpt.configs.data_config import DataConfig
from gpt.configs.run_plan import CorpusFacts, RunPlan, SourcePlan, StreamFacts, resolve
from gpt.configs.train_config import TrainConfig
from gpt.machine.memory_estimate import MemoryEstimate
from gpt.training.sinks.console.plan_screen import Memory, Probe, format_plan, print_plan
from gpt.utils.terminal import RunConsole
from tests.training.example_events import PLAN
from tests.utils.screen import Screen
from tests.utils.test_terminal import WIDTHS

pytestmark = pytest.mark.usefixtures("capable_terminal")

NEEDED = MemoryEstimate(weights=4 * 10**6, gradients=4 * 10**6, optimizer=8 * 10**6, activations=10**8)
RUNTIME = {"threads": 2, "keep_freed_memory": True, "flush_denormals": False}


def render(plan: RunPlan, memory: Memory | None = None, probe: Probe | None = None) -> str:
    out = StringIO()
    print_plan(RunConsole(file=out), plan, memory, probe)
    return out.getvalue()


def test_plan_shows_resolved_values() -> None:
    text = render(PLAN)
    for part in ("a CPU (cpu), 1 process, float32", "1 M training tokens, vocabulary 300", "20 steps", "cosine, up to"):
        assert part in text
    assert "sources" not in text
    assert "memory" not in text


def test_plan_shows_runtime_settings() -> None:
    text = render(replace(PLAN, machine=replace(PLAN.machine, runtime=RUNTIME)))
    assert "runtime        2 threads, keep-freed-memory, no-flush-denormals" in text


def test_plan_of_a_known_gpu_names_the_peak_of_its_data_sheet() -> None:
    h100 = replace(PLAN.machine, device="cuda", device_name="NVIDIA H100 80GB HBM3")
    rows = format_plan(replace(PLAN, machine=h100, dtype="bfloat16"))
    assert rows["data sheet"] == "989 TFLOP/s per GPU; MFU is of the measured peak, and of this one"
    assert "data sheet" not in format_plan(PLAN)


def test_plan_shows_sources_of_a_mixture() -> None:
    sources = (SourcePlan("books", 0.7, 0.25), SourcePlan("code [/x]", 0.2, 1.5), SourcePlan("web :bug:", 0.1, 12.0))
    (row,) = (line for line in render(replace(PLAN, sources=sources)).splitlines() if line.startswith("sources"))
    assert (
        row.split("  ", 1)[1].strip()
        == "books 70.0%, 0.25 epochs; code [/x] 20.0%, 1.50 epochs; web :bug: 10.0%, 12.00 epochs"
    )


def test_one_is_singular() -> None:
    model = PLAN.model.model_copy(update={"n_layer": 1, "n_head": 1})
    lr = PLAN.lr.model_copy(update={"warmup_steps": 1})
    plan = replace(PLAN, model=model, lr=lr, max_steps=1, machine=replace(PLAN.machine, runtime={"threads": 1}))
    rows = format_plan(plan)
    assert rows["runtime"] == "1 thread"
    assert ": 1 layer, 1 head, " in rows["model"]
    assert rows["run"].startswith("1 step, ")
    assert rows["learning rate"].endswith(" after 1 step")


def test_plan_compares_memory_with_what_is_free() -> None:
    assert (
        "memory         about 116 MB per process besides the program, of 200 MB free: "
        "weights 4 MB, gradients 4 MB, optimizer 8 MB, activations 100 MB\n"
    ) in render(PLAN, Memory(NEEDED, 200 * 10**6))
    assert "memory         about 116 MB per process besides the program: " in render(PLAN, Memory(NEEDED, None))


@pytest.mark.parametrize(("free", "warns"), [(10**8, True), (130 * 10**6, False), (None, False)])
def test_plan_warns_where_memory_is_short(free: int | None, warns: bool) -> None:
    assert ("note           the run needs about 116 MB of memory" in render(PLAN, Memory(NEEDED, free))) == warns


def test_plan_shows_the_time_of_a_probe() -> None:
    probe = Probe(seconds_per_step=1.5, tokens_per_second=2731.0, steps=2400, peak_memory_bytes=2 * 10**9)
    assert (
        "time           about 1:00:00 for 2,400 steps, without evaluation and saving: "
        "1.5 s per step, 2.73 k tokens/s, 2 GB of memory at the peak\n"
    ) in render(PLAN, probe=probe)


@pytest.mark.parametrize(("epochs", "warns"), [(3.9, False), (6.2, True)])
def test_plan_warns_beyond_four_epochs(epochs: float, warns: bool) -> None:
    plan = resolve(TrainConfig(epochs=epochs, max_steps=0), PLAN.machine, PLAN.corpus)
    assert ("note           text is read 6.2 times: beyond 4 epochs" in render(plan)) == warns


def test_plan_names_the_source_that_is_repeated() -> None:
    data = DataConfig(source=("a", "b"), weights=(1.0, 1.0))
    config = TrainConfig(max_steps=2000, tokens_per_step=2048, data=data)
    corpus = CorpusFacts(300, (StreamFacts("large", 10**7), StreamFacts("small", 10**5)))
    notes = resolve(config, PLAN.machine, corpus).notes
    repeated = "small is read 20.5 times: beyond 4 epochs a text teaches less and less; "
    assert [note for note in notes if "epochs" in note] == [repeated + "add text, or train the preset small-text"]
    with_dropout = config.model_copy(update={"model": config.model.model_copy(update={"dropout": 0.2})})
    notes = resolve(with_dropout, PLAN.machine, corpus).notes
    assert [note for note in notes if "epochs" in note] == [repeated + "add text or lower --max-steps"]


@pytest.mark.parametrize("width", WIDTHS)
def test_plan_fits_every_terminal_and_is_complete(width: int) -> None:
    screen = Screen(width)
    plan = replace(PLAN, machine=replace(PLAN.machine, runtime=RUNTIME), notes=("a note of many words " * 8 + "end",))
    memory, probe = Memory(NEEDED, 10**8), Probe(1.5, 2731.0, 2400, 2 * 10**9)
    print_plan(RunConsole(file=screen, width=width), plan, memory, probe)
    lines = screen.lines[:-1]
    assert all(cell_len(line) <= width for line in lines)
    assert all(line == line.rstrip() and "…" not in line for line in lines)
    assert " ".join(" ".join(lines).split()) == " ".join(render(plan, memory, probe).split())
    assert {line[:15].strip() for line in lines} | {""} == {"", "note", *format_plan(plan, memory, probe)}
