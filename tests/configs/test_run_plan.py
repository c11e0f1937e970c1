from typing import Any

import pytest

from gpt.configs.batch_plan import plan_batch
from gpt.configs.run_plan import FLOAT16_NOTE, CorpusFacts, MachineFacts, RunPlan, StreamFacts, count_windows, resolve
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError

CPU = MachineFacts("cpu", "a CPU", has_bfloat16=False)
CORPUS = CorpusFacts(100, (StreamFacts("text", 10_000),), val_tokens=500, val_bytes=900)


def plan(machine: MachineFacts = CPU, corpus: CorpusFacts = CORPUS, **changes: Any) -> RunPlan:
    config = {"micro_batch_size": 2, "tokens_per_step": 64, "model": {"block_size": 16}, "max_steps": 10} | changes
    return resolve(TrainConfig.model_validate(config), machine, corpus)


def test_accumulation_keeps_tokens_per_step_at_every_world_size() -> None:
    for world_size, accumulation in ((1, 2), (2, 1)):
        batch = plan(MachineFacts("cpu", "", False, world_size)).batch
        assert (batch.grad_accum_steps, batch.sequences_per_step, batch.tokens_per_step) == (accumulation, 4, 64)


def test_tokens_per_step_zero_is_one_micro_batch_per_process() -> None:
    assert plan(MachineFacts("cpu", "", False, 3), tokens_per_step=0).batch.tokens_per_step == 3 * 2 * 16


@pytest.mark.parametrize(
    ("tokens", "world_size", "message"),
    [
        (1000, 24, r"--tokens-per-step 1000 is not divisible by .*=2\*16\*24=768 \(nearest: 768 or 1536\)$"),
        (64, 4, r"=2\*16\*4=128 \(nearest: 128, or --micro-batch-size 1\)$"),
    ],
)
def test_indivisible_sizes_name_the_nearest(tokens: int, world_size: int, message: str) -> None:
    config = TrainConfig.model_validate({"micro_batch_size": 2, "tokens_per_step": tokens, "model": {"block_size": 16}})
    with pytest.raises(UserError, match=message):
        plan_batch(config, world_size)


@pytest.mark.parametrize(("limit", "world_size", "size"), [(1, 1, 1), (5, 1, 4), (11, 1, 6), (99, 1, 12), (5, 2, 3)])
def test_auto_micro_batch_is_the_largest_divisor_within_its_limit(limit: int, world_size: int, size: int) -> None:
    machine = MachineFacts("cuda", "", False, world_size, max_micro_batch=limit)
    resolved = plan(machine, micro_batch_size="auto", tokens_per_step=12 * 16)
    assert (resolved.batch.micro_batch_size, resolved.batch.tokens_per_step) == (size, 12 * 16)
    assert f"--micro-batch-size auto is {size}, which divides the step: at most {limit} sequences" in resolved.notes[0]


REPRODUCIBLE = {"parallel": {"reproducible": True}}


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        (
            {"tokens_per_step": 192},
            1,
            r"--tokens-per-step 192 makes 6 micro-batches of --micro-batch-size 2, .* \(nearest: 128 or 256\)$",
        ),
        ({"tokens_per_step": 192}, 3, r"3 processes are not a power of two \(nearest: 2 or 4\)$"),
        ({"tokens_per_step": 0}, 2, r"--tokens-per-step 0 grows with the number of processes; set a number$"),
        ({"micro_batch_size": "auto"}, 1, r"--micro-batch-size auto depends on the machine, .*; set a number$"),
    ],
)
def test_reproducible_mode_needs_powers_of_two(changes: dict[str, Any], world_size: int, message: str) -> None:
    with pytest.raises(UserError, match=f"^--parallel.reproducible.*{message}"):
        plan(MachineFacts("cpu", "", False, world_size), **REPRODUCIBLE | changes)
    plan(MachineFacts("cpu", "", False, 1 if world_size == 2 else world_size), **changes)


def test_identity_of_reproducible_run_has_the_settings_that_decide_bits() -> None:
    assert "--runtime.threads" not in plan().identity
    machine = MachineFacts("cpu", "", False, 4, runtime={"threads": 3, "fused_attention": True})
    identity = plan(machine, **REPRODUCIBLE, tokens_per_step=512, dtype="bfloat16").identity
    assert (identity["--micro-batch-size"], identity["--runtime.threads"]) == (2, 3)
    assert identity["--runtime.fused-attention"] is True
    exact = plan(machine, **REPRODUCIBLE, tokens_per_step=512, dtype="float32").identity
    assert "--runtime.fused-attention" not in exact


def test_auto_micro_batch_with_indivisible_step_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"100 is not divisible by .*=1\*16\*1=16 \(nearest: 96 or 112\)$"):
        plan(micro_batch_size="auto", tokens_per_step=100)


def test_earliest_limit_ends_the_run() -> None:
    per_epoch = count_windows(10_000, 16)
    assert plan(max_steps=0, max_tokens=65).max_steps == 2
    assert plan(max_steps=0, epochs=1).max_steps == -(-per_epoch // 4)
    assert plan(max_steps=7, max_tokens=64 * 5, epochs=100).max_steps == 5


def test_epochs_are_derived() -> None:
    assert plan(max_steps=0, epochs=2).epochs == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize(
    ("schedule", "decay_steps"), [("cosine", 7), ("linear", 7), ("wsd", 2), ("constant", 0), ("inverse-sqrt", 0)]
)
def test_decay_steps_are_resolved(schedule: str, decay_steps: int) -> None:
    assert plan(lr={"schedule": schedule, "warmup_steps": 3}).lr.decay_steps == decay_steps


def test_warmup_longer_than_the_run_is_noted_and_not_changed() -> None:
    resolved = plan(lr={"warmup_steps": 50})
    assert resolved.lr.warmup_steps == 50
    assert resolved.notes == ("warmup of 50 steps lasts for all 10 steps of the run",)
    (note,) = plan(lr={"warmup_steps": 1}, max_steps=1).notes
    assert note == "warmup of 1 step lasts for the only step of the run"


def test_plan_warns_of_muons_learning_rate_for_adamw_alone() -> None:
    assert plan().lr.max_lr == 0.02
    assert plan().notes == ()
    (note,) = plan(optimizer={"name": "adamw"}).notes
    assert note.startswith("--lr.max-lr 0.02 suits the few weights that muon leaves to adamw")
    assert plan(optimizer={"name": "adamw"}, lr={"max_lr": 2e-3, "warmup_steps": 0}).notes == ()


@pytest.mark.parametrize(
    ("device", "promise"),
    [
        (
            "cuda",
            "is bit-exact on GPUs of one kind, with one driver and build of torch; gpt verify-resume checks it on",
        ),
        ("mps", "is not bit-exact on MPS"),
    ],
)
def test_reproducible_mode_states_its_promise_on_a_gpu(device: str, promise: str) -> None:
    on_gpu = plan(MachineFacts(device, "", True), **REPRODUCIBLE).notes
    (note,) = set(on_gpu) - set(plan(**REPRODUCIBLE).notes)
    assert note.startswith(f"--parallel.reproducible {promise}")


def test_auto_dtype_on_a_gpu_without_bfloat16_is_float16_and_noted() -> None:
    t4 = plan(MachineFacts("cuda", "Tesla T4", has_bfloat16=False), dtype="auto")
    assert (t4.dtype, t4.notes) == ("float16", (FLOAT16_NOTE,))
    assert plan(MachineFacts("cuda", "NVIDIA L4", has_bfloat16=True), dtype="auto").dtype == "bfloat16"
    assert plan(MachineFacts("mps", "", has_bfloat16=False), dtype="auto").dtype == "float32"


def test_residual_dtype_that_changes_nothing_is_noted() -> None:
    note = "--residual-dtype compute changes nothing: --dtype is float32"
    for dtype, notes in (("float32", (note,)), ("bfloat16", ())):
        rounded = plan(CPU, dtype=dtype, residual_dtype="compute")
        assert (rounded.rounds_residuals, rounded.notes) == (True, notes)
    assert not plan(CPU, dtype="bfloat16").rounds_residuals


def test_float32_in_tf32_is_noted() -> None:
    ampere = MachineFacts("cuda", "", True, runtime={"tf32": True})
    (note,) = plan(ampere, dtype="float32").notes
    assert note == "--dtype float32 multiplies in TF32 on this GPU: 10 bits of mantissa instead of 23"
    assert plan(ampere, dtype="bfloat16").notes == ()
    assert plan(MachineFacts("cuda", "", True, runtime={"tf32": False}), dtype="float32").notes == ()


def test_one_process_on_a_machine_of_several_gpus_is_noted() -> None:
    (note,) = plan(MachineFacts("cuda", "", True, gpu_count=8)).notes
    assert note.startswith("1 of 8 GPUs is used; torchrun --nproc-per-node 8 ")
    assert plan(MachineFacts("cuda", "", True, gpu_count=1)).notes == ()
    assert plan(MachineFacts("cuda", "", True, world_size=2, gpu_count=2)).notes == ()


@pytest.mark.parametrize(
    ("dtype", "has_bfloat16", "expected"),
    [("auto", True, "bfloat16"), ("auto", False, "float32"), ("float16", True, "float16")],
)
def test_auto_dtype_is_resolved_by_the_hardware(dtype: str, has_bfloat16: bool, expected: str) -> None:
    assert plan(MachineFacts("cpu", "", has_bfloat16), dtype=dtype).dtype == expected


def test_vocab_size_is_the_tokenizers_or_padded_but_never_smaller() -> None:
    assert plan().model.vocab_size == 100
    assert plan(model={"block_size": 16, "vocab_size": 128}).model.vocab_size == 128
    with pytest.raises(
        UserError, match=r"--model.vocab-size 99 is smaller than the tokenizer's 100 \(nearest: 100, or 0"
    ):
        plan(model={"block_size": 16, "vocab_size": 99})


def test_text_shorter_than_a_block_names_the_nearest_block_size() -> None:
    with pytest.raises(UserError, match=r"16 tokens, too few for --model.block-size 16 \(nearest: 15\)"):
        plan(corpus=CorpusFacts(100, (StreamFacts("text", 16),)))


def test_last_step_is_logged_evaluated_and_saved_at_any_interval() -> None:
    resolved = plan(log={"interval": 4}, eval={"interval": 0}, checkpoint={"interval": 3})
    assert [s for s in range(1, 11) if resolved.evaluates_at(s)] == [10]
    assert [s for s in range(1, 11) if resolved.saves_at(s)] == [3, 6, 9, 10]
    assert [s for s in range(1, 11) if resolved.logs_at(s)] == [1, 3, 4, 6, 8, 9, 10]


SOURCES = (StreamFacts("a", 10_000), StreamFacts("b", 1_000), StreamFacts("c", 400))


def test_every_source_has_a_share_and_epochs() -> None:
    resolved = plan(corpus=CorpusFacts(100, SOURCES), data={"source": ["a", "b", "c"], "weights": [7, 2, 1]})
    assert [source.name for source in resolved.sources] == ["a", "b", "c"]
    assert [source.share for source in resolved.sources] == pytest.approx([0.7, 0.2, 0.1])
    # 10 steps of 4 sequences; a has 624, b 61, c 24
    assert [source.epochs for source in resolved.sources] == pytest.approx([28 / 624, 8 / 61, 4 / 24])
    assert resolved.windows_per_epoch == 624 + 61 + 24


def test_without_weights_there_is_one_source_with_the_epochs_of_the_run() -> None:
    (source,) = plan().sources
    assert (source.name, source.share, source.epochs) == ("text", 1, plan().epochs)


def test_epoch_of_packed_documents_counts_packed_sequences() -> None:
    corpus = CorpusFacts(100, (StreamFacts("text", 10_000, packed_sequences=700),))
    resolved = plan(corpus=corpus, max_steps=0, epochs=2, data={"packing": "best-fit"})
    assert (resolved.windows_per_epoch, resolved.max_steps) == (700, 350)
    assert resolved.epochs == resolved.sources[0].epochs == 2


@pytest.mark.parametrize("weights", [(1,), (1, 2), (1, 2, 3, 4)])
def test_wrong_number_of_weights_names_the_sources(weights: tuple[float, ...]) -> None:
    message = rf"^--data.weights: {len(weights)} for 3 sources \(a, b, c\); give one for each$"
    with pytest.raises(UserError, match=message):
        plan(corpus=CorpusFacts(100, SOURCES), data={"weights": weights})


def test_source_shorter_than_a_block_is_named() -> None:
    with pytest.raises(UserError, match=r"the training text of c has 12 tokens, too few for .* 16 \(nearest: 11\)"):
        plan(corpus=CorpusFacts(100, (*SOURCES[:2], StreamFacts("c", 12))), data={"weights": [1, 1, 1]})
