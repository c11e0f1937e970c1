"""One contender of `benchmarks/peers.py`, in a separate process: train a GPT-2 and print the measurements as JSON.

    python -m benchmarks.training_peers NAME SETTING SPEC

SPEC is the JSON of a `Spec`. Each contender is its project's own loop, as in its documentation or training script, with
the same sizes, sequences per step, clipping at 1, AdamW with decay, no dropout, and GELU in its exact form, the only
one that nanoGPT has. The settings of the peers:

    fp32             what each project documents for a CPU
    bf16             bfloat16 autocast and the fused AdamW
    bf16, compiled   the same with torch.compile
    fp32, compiled   fp32 with torch.compile

Ours is a complete run of the Trainer, at the defaults, with `--parallel.activation-checkpointing block`, or in float32
with and without `--compile on`. When a peer
is measured, nothing of `gpt` is imported.
"""

import contextlib
import importlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

OURS, NANOGPT, LITGPT, TRANSFORMERS = "this project", "nanoGPT", "Lightning Fabric + litgpt", "transformers Trainer"
DEFAULTS, LEAN = "defaults", "block checkpointing"
FP32, BF16, COMPILED, FP32_COMPILED = "fp32", "bf16", "bf16, compiled", "fp32, compiled"
FLOAT32 = (FP32, FP32_COMPILED)
LIBRARIES = {OURS: (), NANOGPT: (), LITGPT: ("lightning", "litgpt"), TRANSFORMERS: ("transformers", "accelerate")}
"""Contender -> libraries it needs besides torch."""
LR, BETAS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0
SEED = 1337


@dataclass(frozen=True)
class Spec:
    """Task that every contender trains."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    batch: int
    """Sequences per step, in one forward pass."""
    steps: int
    tokens: str
    """File of uint16 token ids, in nanoGPT's format."""
    tokenizer: str
    """tokenizer.json that belongs to the tokens."""
    nanogpt: str
    """Checkout of nanoGPT; empty if there is none."""


class Stopwatch:
    """Seconds, and CPU seconds of all threads, from the end of each step to the end of the next."""

    def __init__(self) -> None:
        self.first_loss = float("nan")
        self.parameters = 0
        self.start()

    def start(self) -> None:
        """Start timing: everything is built, the first step begins."""
        self._ends, self._cpu_ends = [time.perf_counter()], [time.process_time()]

    def step_done(self) -> None:
        """Record the end of a step."""
        self._ends.append(time.perf_counter())
        self._cpu_ends.append(time.process_time())

    def report(self) -> dict[str, Any]:
        """Return the measurements."""
        return {
            "parameters": self.parameters,
            "first_loss": self.first_loss,
            "step_seconds": np.diff(self._ends).tolist(),
            "step_cpu_seconds": np.diff(self._cpu_ends).tolist(),
            "peak_bytes": measure_peak_bytes(),
            "threads": torch.get_num_threads(),
        }


def measure_peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def count_parameters(model: torch.nn.Module) -> int:
    """Return the number of trained parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def autocast(setting: str) -> contextlib.AbstractContextManager[object]:
    """Return the autocast context of a setting."""
    return torch.autocast("cpu", torch.bfloat16, enabled=setting not in FLOAT32)


def train_ours(spec: Spec, setting: str, watch: Stopwatch) -> None:
    """Train a run as `gpt train` composes it, and end it before its last checkpoint."""
    from gpt.configs.checkpoint_config import CheckpointConfig
    from gpt.configs.data_config import DataConfig
    from gpt.configs.gpt_config import GPTConfig
    from gpt.configs.lr_config import LRConfig
    from gpt.configs.observer_config import EvalConfig, LogConfig, TextSampleConfig
    from gpt.configs.optimizer_config import OptimizerConfig
    from gpt.configs.parallel_config import ParallelConfig
    from gpt.configs.train_config import TrainConfig
    from gpt.pipeline import build_trainer
    from gpt.run import open_run
    from gpt.training.events import Event, MetricsReady, StepEnd, TrainStart
    from gpt.training.observer import Observer

    class MeasuredError(Exception):
        """Raised after the last measured step, to end the run."""

    class Timer(Observer):
        def on_event(self, event: Event) -> tuple[()]:
            match event:
                case TrainStart():
                    watch.start()
                case MetricsReady(step=1, metrics=metrics):
                    watch.first_loss = metrics["train/loss"]
                case StepEnd(step=step):
                    watch.step_done()
                    if step == spec.steps:
                        raise MeasuredError
            return ()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = TrainConfig(
            run_dir=folder / "run",
            seed=SEED,
            max_steps=spec.steps,
            micro_batch_size=spec.batch,
            tokens_per_step=spec.batch * spec.block_size,
            device="cpu",
            dtype="float32" if setting in FLOAT32 else "auto",
            compile="on" if setting == FP32_COMPILED else "auto",
            grad_clip=CLIP,
            model=GPTConfig(
                n_layer=spec.n_layer,
                n_head=spec.n_head,
                n_embd=spec.n_embd,
                block_size=spec.block_size,
                vocab_size=spec.vocab_size,
                mlp="gelu_erf",
            ),
            data=DataConfig(
                source=(spec.tokens,), tokenizer=spec.tokenizer, val_fraction=0, cache_dir=folder / "cache", workers=1
            ),
            lr=LRConfig(schedule="constant", max_lr=LR, warmup_steps=0),
            optimizer=OptimizerConfig(),
            parallel=ParallelConfig(activation_checkpointing="block" if setting == LEAN else "none"),
            log=LogConfig(interval=spec.steps),
            eval=EvalConfig(interval=0),
            checkpoint=CheckpointConfig(interval=0),
            sample=TextSampleConfig(prompts=()),
        )
        with open_run(config) as run, contextlib.suppress(MeasuredError):
            watch.parameters = run.plan.model.n_parameters
            trainer = build_trainer(run)
            trainer.attach(Timer())
            trainer.train()


def train_nanogpt(spec: Spec, setting: str, watch: Stopwatch) -> None:
    """Train with the loop, model and optimizer of train.py; on a CPU it has neither autocast nor fused AdamW."""
    sys.path.insert(0, spec.nanogpt)
    nano = importlib.import_module("model")

    def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
        data = np.memmap(spec.tokens, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - spec.block_size, (spec.batch,)).tolist()
        windows = [torch.from_numpy(data[i : i + spec.block_size + 1].astype(np.int64)) for i in starts]
        return torch.stack([window[:-1] for window in windows]), torch.stack([window[1:] for window in windows])

    sizes = {name: getattr(spec, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    model = nano.GPT(nano.GPTConfig(**sizes, dropout=0.0, bias=True))
    watch.parameters = count_parameters(model)
    # It uses the fused kernel only if the device type is cuda.
    optimizer = model.configure_optimizers(WEIGHT_DECAY, LR, BETAS, "cpu" if setting in FLOAT32 else "cuda")
    if setting in (COMPILED, FP32_COMPILED):
        model = torch.compile(model)
    inputs, targets = get_batch()
    watch.start()
    for step in range(spec.steps):
        with autocast(setting):
            logits, loss = model(inputs, targets)  # noqa: RUF059 - train.py holds the logits as well
        inputs, targets = get_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        watch.step_done()
        if step == 0:
            watch.first_loss = value


def train_litgpt(spec: Spec, setting: str, watch: Stopwatch) -> None:
    """Train with the loop of `litgpt pretrain` and its model, as close to GPT-2 as it allows.

    It has RoPE instead of learned positions. Its separate head is tied to the embedding here.
    """
    from lightning.fabric import Fabric
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true" if setting in FLOAT32 else "bf16-mixed")
    fabric.launch()
    fabric.seed_everything(SEED)
    config = Config(
        n_layer=spec.n_layer,
        n_head=spec.n_head,
        n_embd=spec.n_embd,
        block_size=spec.block_size,
        vocab_size=spec.vocab_size,
        padded_vocab_size=spec.vocab_size,
        parallel_residual=False,
        bias=True,
        attn_bias=True,
        gelu_approximate="none",
        intermediate_size=4 * spec.n_embd,
    )
    model = GPT(config)
    model.lm_head.weight = model.transformer.wte.weight
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.02)
    watch.parameters = count_parameters(model)
    if setting in (COMPILED, FP32_COMPILED):
        model = torch.compile(model)
    model = fabric.setup(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=setting not in FLOAT32
    )
    optimizer = fabric.setup_optimizers(optimizer)
    loader = fabric.setup_dataloaders(
        torch.utils.data.DataLoader(Windows(spec, spec.block_size + 1), batch_size=spec.batch, shuffle=True)
    )
    batches = iter(loader)
    watch.start()
    for step in range(spec.steps):
        data = next(batches)
        inputs, targets = data[:, :-1].contiguous(), data[:, 1:].contiguous()
        logits = model(inputs)
        loss = chunked_cross_entropy(logits, targets)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        watch.step_done()
        if step == 0:
            watch.first_loss = value


def train_transformers(spec: Spec, setting: str, watch: Stopwatch) -> None:
    """Train with `Trainer` and GPT-2's configuration; it shifts the labels itself and uses the fused AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    class Timer(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            watch.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            watch.step_done()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if state.global_step == 1:
                watch.first_loss = logs["loss"]

    torch.manual_seed(SEED)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=spec.n_layer,
            n_head=spec.n_head,
            n_embd=spec.n_embd,
            n_positions=spec.block_size,
            vocab_size=spec.vocab_size,
            activation_function="gelu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
    )
    watch.parameters = count_parameters(model)
    with tempfile.TemporaryDirectory() as name:
        arguments = TrainingArguments(
            name,
            use_cpu=True,
            per_device_train_batch_size=spec.batch,
            max_steps=spec.steps,
            learning_rate=LR,
            weight_decay=WEIGHT_DECAY,
            adam_beta2=BETAS[1],
            max_grad_norm=CLIP,
            seed=SEED,
            bf16=setting not in FLOAT32,
            torch_compile=setting in (COMPILED, FP32_COMPILED),
            dataloader_pin_memory=False,
            logging_first_step=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        windows = Windows(spec, spec.block_size)
        trainer = Trainer(model, arguments, train_dataset=Labelled(windows), callbacks=[Timer()])
        trainer.train()


class Windows(torch.utils.data.Dataset[torch.Tensor]):
    """Rows of consecutive tokens of the token file."""

    def __init__(self, spec: Spec, length: int):
        self._tokens = np.memmap(spec.tokens, dtype=np.uint16, mode="r")
        self._length = length

    def __len__(self) -> int:
        return len(self._tokens) // self._length

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * self._length
        return torch.from_numpy(self._tokens[start : start + self._length].astype(np.int64))


class Labelled(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows in the format of transformers' models."""

    def __init__(self, windows: Windows):
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._windows[index], "labels": self._windows[index]}


CONTENDERS: dict[str, Callable[[Spec, str, Stopwatch], None]] = {
    OURS: train_ours,
    NANOGPT: train_nanogpt,
    LITGPT: train_litgpt,
    TRANSFORMERS: train_transformers,
}


def main() -> None:
    """Train, and print the measurements as the last line."""
    name, setting, spec = sys.argv[1:]
    watch = Stopwatch()
    torch.manual_seed(SEED)
    CONTENDERS[name](Spec(**json.loads(spec)), setting, watch)
    versions = {library: metadata.version(library) for library in ("torch", *LIBRARIES[name])}
    print("\n" + json.dumps(watch.report() | {"versions": versions}))


if __name__ == "__main__":
    main()
