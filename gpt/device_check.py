"""Check a device's training arithmetic against the CPU's in float32, in the shapes of a model.

A driver can compute wrongly without any error, often only in some shapes or after a shape has changed. Every run checks
its matmuls (`gpt.machine.arithmetic_check`); here a model of at most two layers runs forward, backward and through its
optimizer on both devices. Errors are relative: |given - expected| / |expected|, by the Euclidean norm.
"""

import copy
import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt.configs.gpt_config import GPTConfig
from gpt.configs.optimizer_config import OptimizerConfig
from gpt.machine.hardware import find_device
from gpt.machine.peak_flops import read_record, write_record
from gpt.models.gpt import GPT
from gpt.optim.build import build_optimizer, set_learning_rate
from gpt.utils import launch
from gpt.utils.helper import first_line
from gpt.utils.progress import work_line

MAX_LAYERS = 2
"""Layers of the model that is checked; more have the same shapes."""
MIN_VOCAB_SIZE = 512
"""Vocabulary of a model whose tokenizer is not known yet."""
MAX_FORWARD_TOKENS = 128
"""Length of the sequences whose logits are compared, which are long rows."""
BATCH_SIZES = (2, 3, 2)
"""Sequences of consecutive batches: drivers have computed with the shapes of the batch before."""
TRAINED_STEPS = 20
TRAINED_SEQUENCES, MAX_TRAINED_TOKENS = 4, 128
"""Size of the batches that are trained on."""
MAX_LR = 5e-4
"""Learning rate. Adam turns rounding errors of small gradients into steps of this size."""
MAX_LOSS_DIFFERENCE = 5e-3
"""Bound of the difference of a step's loss, in nats per token."""
MAX_ERRORS = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}
"""Bound of the relative error of logits and of each parameter's gradient, by the dtype of matmuls."""
MAX_UPDATE_ERROR = 1e-3
"""Bound of the relative error of each parameter's change by the optimizer, from equal gradients."""
FLOAT16_SCALE = 2.0**10
"""Scale of the loss in float16; torch's own first scale overflows in some models, which skips an update."""
SEED = 1337
N_PATTERN_TOKENS = 61
"""Token ids that occur in the batches, so that a model learns them in a few steps."""
CHECK_VERSION = 1
"""Part of the cache's key; raise it when the check changes."""


@dataclass(frozen=True)
class CheckResult:
    """Result of one comparison with the CPU."""

    name: str
    error: float
    """Largest error; NaN if the device computed none, or not a number."""
    bound: float
    detail: str = ""
    """Place of the error, or the device's own message."""

    @property
    def is_right(self) -> bool:
        """The error is within its bound."""
        return self.error <= self.bound  # False for NaN

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.1e} at {self.detail}, bound {self.bound:g}"


@dataclass(frozen=True)
class Reference:
    """Results of the CPU in float32."""

    initial: GPT
    """Model with the weights that every comparison starts from; no comparison changes it."""
    optimizer: OptimizerConfig
    logits: torch.Tensor
    gradients: dict[int, dict[str, torch.Tensor]]
    """Size of a batch -> its loss (under the name "loss") and gradients."""
    updates: dict[str, torch.Tensor]
    """Change of each parameter by two steps of the optimizer."""
    losses: list[float]
    """Loss of each training step."""


def shrink_model(model: GPTConfig) -> GPTConfig:
    """Return a model of the same shapes that is small enough for a check: few layers, no dropout."""
    vocab_size = model.vocab_size or MIN_VOCAB_SIZE
    update = {"n_layer": min(model.n_layer, MAX_LAYERS), "vocab_size": vocab_size, "dropout": 0.0}
    return model.model_copy(update=update).resolve()


def compute_reference(model: GPTConfig, optimizer: OptimizerConfig) -> Reference:
    """Compute everything that `check_device` compares with, on the CPU in float32.

    Args:
        model: from `shrink_model`.
        optimizer: the run's optimizer.
    """
    cpu = torch.device("cpu")
    initial = GPT(model, seed=SEED)
    sizes = list(dict.fromkeys(BATCH_SIZES))
    gradients = dict(zip(sizes, _compute_gradients(initial, cpu, torch.float32, sizes), strict=True))
    return Reference(
        initial,
        optimizer,
        logits=_compute_logits(initial, cpu, torch.float32),
        gradients=gradients,
        updates=_compute_updates(initial, optimizer, cpu, gradients[BATCH_SIZES[0]]),
        losses=_train(initial, optimizer, cpu, torch.float32),
    )


def check_device(device: torch.device, dtype: str, reference: Reference) -> Iterator[CheckResult]:
    """Yield the results of all comparisons: in float32, and in `dtype` under autocast.

    Args:
        device: the device.
        dtype: the dtype of a run: float32, bfloat16 or float16.
        reference: from `compute_reference`.
    """
    initial, optimizer = reference.initial, reference.optimizer
    for name in dict.fromkeys(("float32", dtype)):
        yield from _check_passes(device, name, reference)
    yield _compare(
        f"update by {optimizer.name}",
        MAX_UPDATE_ERROR,
        reference.updates,
        lambda: _compute_updates(initial, optimizer, device, reference.gradients[BATCH_SIZES[0]]),
    )

    def measure_loss_differences() -> dict[str, float]:
        losses = _train(initial, optimizer, device, getattr(torch, dtype))
        pairs = enumerate(zip(losses, reference.losses, strict=True), start=1)
        return {f"step {step}": abs(given - expected) for step, (given, expected) in pairs}

    yield _find_worst(f"losses of {TRAINED_STEPS} steps in {dtype}", MAX_LOSS_DIFFERENCE, measure_loss_differences)


def _check_passes(device: torch.device, dtype: str, reference: Reference) -> Iterator[CheckResult]:
    """Yield the comparisons of the forward pass, and of the gradients of batches of several sizes, in one dtype."""
    initial, compute_dtype, bound = reference.initial, getattr(torch, dtype), MAX_ERRORS[dtype]
    yield _compare(
        f"forward pass in {dtype}",
        bound,
        {"logits": reference.logits},
        lambda: {"logits": _compute_logits(initial, device, compute_dtype)},
    )
    batches = _compute_gradients(initial, device, compute_dtype, BATCH_SIZES)
    names = ("gradients", "gradients of another batch size", "gradients of the first batch size again")
    for name, size in zip(names, BATCH_SIZES, strict=True):
        yield _compare(f"{name} in {dtype}", bound, reference.gradients[size], lambda: next(batches))


def choose_device(wanted: str, model: GPTConfig, cache_dir: Path) -> tuple[str, tuple[str, ...]]:
    """Return the device to train on, and remarks: `auto` takes MPS only where it computes what the CPU does.

    A check that passed is cached; one that did not is repeated at every start.

    Args:
        wanted: auto, cpu, cuda or mps.
        model: configuration of the run.
        cache_dir: folder of the cache.

    Raises:
        UserError: this machine does not have the device.
    """
    device = find_device(wanted)
    if wanted != "auto" or device != "mps":
        return device, ()
    wrong = find_wrong_result(torch.device(device), model, cache_dir)
    if wrong is None:
        return device, ()
    return "cpu", (
        f"--device auto is cpu, because mps computes wrongly here ({wrong}); gpt selftest --device mps shows more",
    )


def find_wrong_result(device: torch.device, model: GPTConfig, cache_dir: Path) -> CheckResult | None:
    """Return the first comparison that a device fails in float32; None if it passes, now or at an earlier start.

    Args:
        device: the device.
        model: configuration of a run.
        cache_dir: folder of the cache; nothing is cached if it cannot be written to.
    """
    model = shrink_model(model)
    path = find_record(device, model, cache_dir)
    if read_record(path).get("is_right") is True:
        return None
    with work_line(f"comparing {device.type} with the CPU", is_shown=launch.speaks_first()):
        reference = compute_reference(model, OptimizerConfig())
        wrong = next((result for result in check_device(device, "float32", reference) if not result.is_right), None)
    remember(path, is_right=wrong is None)
    return wrong


def find_record(device: torch.device, model: GPTConfig, cache_dir: Path) -> Path:
    """Return the cache's file for a device: of this machine, its driver, this torch and the model's shapes.

    Args:
        device: the device.
        model: from `shrink_model`.
        cache_dir: folder of the cache.
    """
    driver = platform.mac_ver()[0] or platform.version()
    key = [
        CHECK_VERSION,
        device.type,
        platform.node(),
        driver,
        torch.__version__,
        model.model_dump_json(),
    ]
    return cache_dir / f"device-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"


def remember(path: Path, *, is_right: bool) -> None:
    """Record whether a device passed its check."""
    write_record(path, {"torch": torch.__version__, "is_right": is_right})


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Compute float32 matmuls without TF32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _copy_to(device: torch.device, initial: GPT) -> GPT:
    """Return a copy of a model on a device."""
    return copy.deepcopy(initial).to(device)


def _make_tokens(vocab_size: int, n_sequences: int, length: int, seed: int) -> torch.Tensor:
    """Return sequences that each repeat a pattern; (n_sequences, length + 1) int64."""
    generator = torch.Generator().manual_seed(seed)
    n_ids = min(N_PATTERN_TOKENS, vocab_size)
    start, stride = (torch.randint(1, n_ids, (n_sequences, 1), generator=generator) for _ in range(2))
    return (start + stride * torch.arange(length + 1)) % n_ids


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def _compute_logits(initial: GPT, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    config = initial.config
    length = min(config.block_size, MAX_FORWARD_TOKENS) - 1
    tokens = _make_tokens(config.vocab_size, BATCH_SIZES[0], length, SEED).to(device)
    with _autocast(device, dtype):
        logits: torch.Tensor = _copy_to(device, initial)(tokens)
    return logits.float().cpu()


def _compute_gradients(
    initial: GPT, device: torch.device, dtype: torch.dtype, batch_sizes: Iterable[int]
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the mean loss and all gradients of consecutive batches, from one model."""
    model, config = _copy_to(device, initial), initial.config
    for n_sequences in batch_sizes:
        tokens = _make_tokens(config.vocab_size, n_sequences, config.block_size, SEED + n_sequences).to(device)
        with _autocast(device, dtype):
            loss = model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
        loss.backward()
        gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
        yield {"loss": loss.detach().float().cpu(), **gradients}
        model.zero_grad(set_to_none=True)


def _compute_updates(
    initial: GPT, optimizer_config: OptimizerConfig, device: torch.device, gradients: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the change of each parameter by two steps of the optimizer with given gradients."""
    model = _copy_to(device, initial)
    optimizer = _build_optimizer(model, optimizer_config)
    before = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].to(device, copy=True)
        optimizer.step()
    return {name: p.detach().cpu() - before[name] for name, p in model.named_parameters()}


def _train(initial: GPT, optimizer_config: OptimizerConfig, device: torch.device, dtype: torch.dtype) -> list[float]:
    """Return the losses of TRAINED_STEPS steps, each on another batch."""
    model, config = _copy_to(device, initial), initial.config
    optimizer = _build_optimizer(model, optimizer_config)
    scaler = torch.amp.GradScaler(device.type, init_scale=FLOAT16_SCALE, enabled=dtype == torch.float16)
    losses = []
    for step in range(TRAINED_STEPS):
        length = min(config.block_size, MAX_TRAINED_TOKENS)
        tokens = _make_tokens(config.vocab_size, TRAINED_SEQUENCES, length, SEED + step).to(device)
        with _autocast(device, dtype):
            loss = model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def _build_optimizer(model: GPT, config: OptimizerConfig) -> torch.optim.Optimizer:
    config = config.model_copy(update={"muon_lr": MAX_LR})
    optimizer = build_optimizer(model, config, MAX_LR, hidden=model.hidden_matrices(), precision=torch.float32)
    set_learning_rate(optimizer, 1.0)
    return optimizer


def _compare(
    name: str, bound: float, expected: Mapping[str, torch.Tensor], compute: Callable[[], Mapping[str, torch.Tensor]]
) -> CheckResult:
    """Compute tensors without TF32, and compare them by name."""

    def measure_errors() -> dict[str, float]:
        with _exact_float32():
            given = compute()
        return {key: _relative_error(given[key], value) for key, value in expected.items()}

    return _find_worst(name, bound, measure_errors)


def _find_worst(name: str, bound: float, measure_errors: Callable[[], Mapping[str, float]]) -> CheckResult:
    """Return the largest error; NaN is larger than all, and so is an operator that the device lacks."""
    try:
        errors = measure_errors()
    except (RuntimeError, TypeError, StopIteration) as error:
        return CheckResult(name, math.nan, bound, first_line(error))
    place = max(errors, key=lambda key: math.inf if math.isnan(errors[key]) else errors[key])
    return CheckResult(name, errors[place], bound, place)


def _relative_error(given: torch.Tensor, expected: torch.Tensor) -> float:
    given, expected = given.double(), expected.double()
    return float((given - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny))
