"""Functions that tests run in the process with the CUDA device; each returns JSON."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from gpt.checkpoint.app_state import AppState
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.observer_config import SampleConfig
from gpt.configs.optimizer_config import OptimizerConfig
from gpt.configs.presets import PRESETS
from gpt.data.data_loader import MicroBatch, StepBatch
from gpt.inference.generate import Batch, Completion
from gpt.models.gpt import GPT
from gpt.ops import attention, cross_entropy
from gpt.ops.precision import round_output
from gpt.optim.build import build_optimizer
from gpt.parallel.activation_checkpointing import checkpoint_activations
from gpt.parallel.gradient_sync import AveragedGradients
from gpt.parallel.reproducible import TreeGradients
from gpt.training.metrics import Meter
from gpt.training.step_timer import StepTimer
from gpt.training.train_step import TrainStep
from gpt.utils.distributed import DistContext
from tests.cuda.recorder import Recorder
from tests.training.example_events import PLAN

DEVICE = torch.device("cuda", 0)
MEMORY = 80 * 10**9
TINY = GPTConfig(n_layer=1, n_head=2, n_embd=64, block_size=64, vocab_size=512)
LLAMA = {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "n_kv_head": 1, "qk_norm": True}

_sdpa = F.scaled_dot_product_attention


def _flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> torch.Tensor:
    """Stand in for the choice of a backend, which a torch without CUDA does not make."""
    if attn_mask is not None or q.dtype == torch.float32:
        return _sdpa(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **options)
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
    return out


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Make tensors fake and torch's Python code believe in the device."""
    event = mock.Mock(**{"return_value.query.return_value": False})
    with ExitStack() as stack:
        for name, value in (
            ("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            ("torch.cuda.is_bf16_supported", lambda *args, **kwargs: True),
            ("torch.cuda.Event", event),
            ("torch.cuda.get_device_properties", lambda device: mock.Mock(total_memory=MEMORY)),
            ("torch.cuda.get_device_capability", lambda device: (9, 0)),
            ("torch.nn.functional.scaled_dot_product_attention", _flash_attention),
            # The weights' values do not matter, and the generator that draws them is the CPU's.
            ("gpt.models.gpt.init_weights", lambda *args: None),
        ):
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=False))
        yield


class RepeatedBatch:
    """A loader that gives every step the same batch."""

    def __init__(self, batch: StepBatch):
        self.batch = batch

    def get_batch(self, step: int) -> StepBatch:
        return self.batch


def make_batch(config: GPTConfig, *, sequences: int, micro_batches: int, masked: bool) -> StepBatch:
    def tokens() -> torch.Tensor:
        return torch.zeros((sequences, config.block_size), dtype=torch.int64, device=DEVICE)

    parts = [MicroBatch(i, tokens(), tokens(), tokens() if masked else None) for i in range(micro_batches)]
    return StepBatch(tuple(parts), micro_batches * sequences * config.block_size)


def make_step(
    config: GPTConfig,
    batch: StepBatch,
    *,
    dtype: str = "bfloat16",
    optimizer: str = "adamw",
    mode: str = "none",
    reproducible: bool = False,
    rounds_residuals: bool = False,
) -> tuple[TrainStep, AppState]:
    with DEVICE:
        model = GPT(config, seed=0)
    if rounds_residuals:
        round_output(model.drop)
    checkpoint_activations(model.h, mode)
    precision = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    built = build_optimizer(
        model, OptimizerConfig(name=optimizer), 1e-3, hidden=model.hidden_matrices(), precision=precision
    )
    state = AppState(
        model,
        built,
        torch.amp.GradScaler("cuda", enabled=dtype == "float16"),
        torch.zeros((), dtype=torch.int64, device=DEVICE),
        identity={},
    )
    step = TrainStep(
        model,
        state,
        replace(PLAN, seed=1),
        loader=RepeatedBatch(batch),
        schedule=lambda step: 1.0,
        autocast=partial(torch.autocast, "cuda", getattr(torch, dtype), enabled=dtype != "float32"),
        gradients=(
            TreeGradients(model.parameters(), DistContext("cpu")) if reproducible else AveragedGradients(model, 1)
        ),
        grad_clip=1.0,
        timer=StepTimer(DEVICE),
    )
    return step, state


def train_step(
    *,
    dtype: str,
    optimizer: str,
    mode: str,
    dropout: float,
    masked: bool,
    llama: bool = False,
    has_triton: bool = False,
    rounds_residuals: bool = False,
) -> dict[str, Any]:
    """Record the second step of a small model, accumulated over three micro-batches."""
    config = TINY.model_copy(update={"dropout": dropout} | (LLAMA if llama else {}))
    with (
        fake_cuda(),
        mock.patch.object(attention, "HAS_TRITON", has_triton),
        mock.patch.object(cross_entropy, "HAS_TRITON", has_triton),
        # Nothing can be compiled for the device.
        mock.patch.object(attention, "_flex_works", lambda *args: True),
        mock.patch.object(attention, "_compile", lambda function: function),
        mock.patch("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True),
    ):
        batch = make_batch(config, sequences=2, micro_batches=3, masked=masked)
        step, _ = make_step(
            config, batch, dtype=dtype, optimizer=optimizer, mode=mode, rounds_residuals=rounds_residuals
        )
        step(0)  # allocates the optimizer's state
        with Recorder() as recorder:
            stats = step(1)
        assert stats.loss_sum.device == stats.grad_norm.device == DEVICE
    return recorder.to_json()


def try_loss_kernel(*, has_triton: bool) -> dict[str, Any]:
    """Return whether the loss's kernel works, and what its trial launches."""
    with fake_cuda(), mock.patch.object(cross_entropy, "HAS_TRITON", has_triton), Recorder() as recorder:
        works = cross_entropy.loss_kernel_works(DEVICE, torch.bfloat16, 0.0)
    return {"works": works, "kernels": recorder.launches["cross_entropy_chunk"]}


def reproducible_step(*, dtype: str, optimizer: str) -> dict[str, Any]:
    """Record the second step of a reproducible run with document masks, where Triton is installed."""
    torch.use_deterministic_algorithms(True)
    try:
        with fake_cuda(), mock.patch.object(attention, "HAS_TRITON", True):
            batch = make_batch(TINY, sequences=2, micro_batches=4, masked=True)
            step, _ = make_step(TINY, batch, dtype=dtype, optimizer=optimizer, reproducible=True)
            step(0)
            with Recorder() as recorder:
                step(1)
    finally:
        torch.use_deterministic_algorithms(False)
    return recorder.to_json()


@contextmanager
def readable(recorder: Recorder) -> Iterator[None]:
    """Let `tolist`, which a fake tensor refuses, return zeros; record it as a sync."""

    def read_zeros(tensor: torch.Tensor) -> list[int]:
        recorder.syncs.append("tolist")
        return [0] * tensor.numel()

    with mock.patch.object(FakeTensor, "tolist", read_zeros):
        yield


def generate_token(*, settings: dict[str, Any], end: int) -> dict[str, Any]:
    """Record the sampling of one more token of four texts, of which the last has an own length.

    Args:
        settings: fields of SampleConfig.
        end: length of the last prompt.
    """
    prompts = [[1, 2], [3, 4], [5, 6], list(range(end))]
    generator = mock.Mock(**{"return_value.manual_seed.return_value": None})
    with fake_cuda(), mock.patch("torch.Generator", generator):
        with DEVICE:
            model = GPT(TINY, seed=0).eval()
        batch = Batch(model, TINY.resolve(), vocab_size=512, end_of_text=None, max_rows=4)
        with Recorder() as recorder, readable(recorder):
            batch.add([Completion(prompt, SampleConfig(**settings), seed=0) for prompt in prompts])
        with Recorder() as recorder, readable(recorder):
            batch.step()
    return recorder.to_json()


def report() -> dict[str, Any]:
    """Record a report of two steps."""
    with fake_cuda():
        step, state = make_step(TINY, make_batch(TINY, sequences=2, micro_batches=1, masked=False))
        meter = Meter(128, state.skipped_updates, DistContext("cpu"), flops_per_token=1.0, peak_flops=1.0)
        meter.add(step(0))
        meter.add(step(1))
        with Recorder() as recorder, readable(recorder):
            meter.report()
    return recorder.to_json()


def transfers() -> dict[str, Any]:
    """Record a copy to the device, a copy from it, an op on tensors of both, and what is none of these."""
    with fake_cuda(), Recorder() as recorder:
        host, device = torch.zeros(2), torch.zeros(2, device=DEVICE)
        host.to(DEVICE)
        device.cpu()
        torch.ops.aten.index(device, [torch.zeros(1, dtype=torch.int64)])
        device * torch.ones(())
        with suppress(DataDependentOutputException):
            device[0].item()
    return recorder.to_json()


def launches_of_gpt2() -> dict[str, Any]:
    """Record a step of GPT-2 124M, of one micro-batch of 4 x 1024 tokens, without the optimizer's warm-up."""
    config = PRESETS["gpt2-124m"]().model.model_copy(update={"vocab_size": 50304})
    with fake_cuda():
        step, _ = make_step(config, make_batch(config, sequences=4, micro_batches=1, masked=False))
        step(0)
        with Recorder() as recorder:
            step(1)
    return recorder.to_json()
