"""The training step on a CUDA device, without a GPU: no host sync, no copy, no op on tensors of two devices."""

import itertools

import pytest

from tests.cuda.device import FakeCudaProcess

MAX_LAUNCHES = 1_100
"""Kernels of one micro-batch of 4 x 1024 tokens of GPT-2 124M; lower it when there are fewer."""


def test_recorder_sees_syncs_copies_and_mixed_devices(fake_cuda: FakeCudaProcess) -> None:
    record = fake_cuda.run("transfers")
    assert [len(record[key]) for key in ("syncs", "copies", "mixed")] == [1, 2, 1], record


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_step_does_no_host_sync_and_no_copy(fake_cuda: FakeCudaProcess, dtype: str, optimizer: str) -> None:
    for mode, dropout, masked in itertools.product(("none", "block", "selective"), (0.0, 0.1), (False, True)):
        variant = {"mode": mode, "dropout": dropout, "masked": masked}
        record = fake_cuda.run("train_step", dtype=dtype, optimizer=optimizer, **variant)
        assert (record["syncs"], record["copies"], record["mixed"]) == ([], [], []), variant
        assert record["launches"] > 100


@pytest.mark.parametrize("mode", ["none", "block", "selective"])
def test_step_with_triton_and_shared_heads_does_no_host_sync_and_no_copy(fake_cuda: FakeCudaProcess, mode: str) -> None:
    for dtype, masked in itertools.product(("bfloat16", "float16", "float32"), (False, True)):
        variant = {"mode": mode, "dtype": dtype, "masked": masked, "dropout": 0.0}
        record = fake_cuda.run("train_step", optimizer="muon", llama=True, has_triton=True, **variant)
        assert (record["syncs"], record["copies"], record["mixed"]) == ([], [], []), variant
        launches = record["launches_by_op"]
        assert launches["cross_entropy_chunk"] == 3, variant
        if masked and dtype != "float32":  # selective saves its output, block recomputes it
            assert launches["flex_attention"] == (6 if mode == "block" else 3), variant


@pytest.mark.parametrize("llama", [False, True])
def test_step_with_rounded_residual_stream_does_no_host_sync_and_no_copy(
    fake_cuda: FakeCudaProcess, llama: bool
) -> None:
    variant = {"dtype": "bfloat16", "optimizer": "adamw", "mode": "none", "dropout": 0.0, "masked": False}
    record = fake_cuda.run("train_step", llama=llama, rounds_residuals=True, **variant)
    assert (record["syncs"], record["copies"], record["mixed"]) == ([], [], [])


@pytest.mark.parametrize(("dtype", "optimizer"), [("bfloat16", "adamw"), ("float16", "muon")])
def test_reproducible_step_does_no_host_sync_and_uses_no_flex_attention(
    fake_cuda: FakeCudaProcess, dtype: str, optimizer: str
) -> None:
    record = fake_cuda.run("reproducible_step", dtype=dtype, optimizer=optimizer)
    assert (record["syncs"], record["copies"], record["mixed"]) == ([], [], [])
    assert not [name for name in record["launches_by_op"] if "flex" in name]


@pytest.mark.parametrize("has_triton", [False, True])
def test_loss_kernel_is_tried_where_triton_is_installed(has_triton: bool, fake_cuda: FakeCudaProcess) -> None:
    expected = {"works": has_triton, "kernels": int(has_triton)}
    assert fake_cuda.run("try_loss_kernel", has_triton=has_triton) == expected


def test_report_has_one_host_sync(fake_cuda: FakeCudaProcess) -> None:
    record = fake_cuda.run("report")
    assert len(record["syncs"]) == 1, record


def test_launches_of_gpt2(fake_cuda: FakeCudaProcess) -> None:
    record = fake_cuda.run("launches_of_gpt2")
    assert record["launches"] <= MAX_LAUNCHES, record["launches_by_op"]
