"""One contender of `benchmarks/peers.py`, in a process of its own: trains a GPT-2 and prints what it took as JSON.

    python -m benchmarks.training_peers NAME SETTING SPEC

SPEC is the JSON of a `Spec`. Each contender is its project's own loop, as its documentation or its training script has
it: the same sizes, sequences a step, clipping at 1, AdamW with decay, no dropout, and GELU in its exact form, for
nanoGPT's model has no other. The settings of the peers:

    fp32             what each documents for a CPU, and what it does there by itself
    bf16             bfloat16 autocast and the fused AdamW
    bf16, compiled   the same with torch.compile

Ours is a whole run of its Trainer, at the defaults or with `--parallel.activation-checkpointing block`. Of `gpt`
nothing is imported where a peer is measured.
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
FP32, BF16, COMPILED = "fp32", "bf16", "bf16, compiled"
LIBRARIES = {OURS: (), NANOGPT: (), LITGPT: ("lightning", "litgpt"), TRANSFORMERS: ("transformers", "accelerate")}
"""What a contender needs besides torch."""
LR, BETAS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0
SEED = 1337


@dataclass(frozen=True)
class Spec:
    """What everybody trains."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    batch: int
    """Sequences of a step, in one forward pass."""
    steps: int
    tokens: str
    """File of uint16, as nanoGPT has them."""
    tokenizer: str
    """The tokenizer.json that belongs to them."""
    nanogpt: str
    """A checkout; empty where there is none."""


class Stopwatch:
    """Seconds, and CPU seconds of all threads, from the end of a step to the end of the next."""

    def __init__(self) -> None:
        self.first_loss = float("nan")
        self.parameters = 0
        self.start()

    def start(self) -> None:
        """Everything is built; the first step begins."""
        self._ends, self._cpu_ends = [time.perf_counter()], [time.process_time()]

    def step_done(self) -> None:
        """A step has ended."""
        self._ends.append(time.perf_counter())
        self._cpu_ends.append(time.process_time())

    def report(self) -> dict[str, Any]:
        """What was measured."""
        return {
            "parameters": self.parameters,
            "first_loss": self.first_loss,
            "step_seconds": np.diff(self._ends).tolist(),
            "step_cpu_seconds": np.diff(self._cpu_ends).tolist(),
            "peak_bytes": peak_bytes(),
            "threads": torch.get_num_threads(),
        }


def peak_bytes() -> int:
    """The most memory of this program that was resident at one time."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def parameters_of(model: torch.nn.Module) -> int:
    """Trained numbers; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def autocast(setting: str) -> contextlib.AbstractContextManager[object]:
    """Of the setting's type."""
    return torch.autocast("cpu", torch.bfloat16, enabled=setting != FP32)


def ours(spec: Spec, setting: str, watch: Stopwatch) -> None:
    """A run as `gpt train` composes it, with an observer that ends it before its last checkpoint."""
    from gpt.configs.checkpoint_config import CheckpointConfig
    from gpt.configs.data_config import DataConfig
    from gpt.configs.gpt_config import GPTConfig
    from gpt.configs.lr_config import LRConfig
    from gpt.configs.observer_config import EvalConfig, LogConfig, TextSampleConfig
    from gpt.configs.parallel_config import ParallelConfig
    from gpt.configs.train_config import TrainConfig
    from gpt.pipeline import build_trainer
    from gpt.run import open_run
    from gpt.training.events import Event, MetricsReady, StepEnd, TrainStart

    class EnoughError(Exception):
        """Everything is measured."""

    class Timer:
        def on_event(self, event: Event) -> tuple[()]:
            match event:
                case TrainStart():
                    watch.start()
                case MetricsReady(step=1, metrics=metrics):
                    watch.first_loss = metrics["train/loss"]
                case StepEnd(step=step):
                    watch.step_done()
                    if step == spec.steps:
                        raise EnoughError
            return ()

        def close(self, error: BaseException | None) -> None:
            pass

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = TrainConfig(
            run_dir=folder / "run",
            seed=SEED,
            max_steps=spec.steps,
            micro_batch_size=spec.batch,
            tokens_per_step=spec.batch * spec.block_size,
            device="cpu",
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
            parallel=ParallelConfig(activation_checkpointing="block" if setting == LEAN else "none"),
            log=LogConfig(interval=spec.steps),
            eval=EvalConfig(interval=0),
            checkpoint=CheckpointConfig(interval=0),
            sample=TextSampleConfig(prompts=()),
        )
        layout = open_run(config)
        watch.parameters = layout.plan.model.n_parameters
        trainer = build_trainer(layout)
        trainer.attach(Timer())
        with contextlib.suppress(EnoughError):
            trainer.train()


def nanogpt(spec: Spec, setting: str, watch: Stopwatch) -> None:
    """The loop of train.py, with its model and its optimizer; on a CPU it knows neither autocast nor fused AdamW."""
    sys.path.insert(0, spec.nanogpt)
    nano = importlib.import_module("model")

    def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
        data = np.memmap(spec.tokens, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - spec.block_size, (spec.batch,)).tolist()
        windows = [torch.from_numpy(data[i : i + spec.block_size + 1].astype(np.int64)) for i in starts]
        return torch.stack([window[:-1] for window in windows]), torch.stack([window[1:] for window in windows])

    sizes = {name: getattr(spec, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    model = nano.GPT(nano.GPTConfig(**sizes, dropout=0.0, bias=True))
    watch.parameters = parameters_of(model)
    # It asks for the fused kernel where it is told of a GPU.
    optimizer = model.configure_optimizers(WEIGHT_DECAY, LR, BETAS, "cpu" if setting == FP32 else "cuda")
    if setting == COMPILED:
        model = torch.compile(model)
    inputs, targets = get_batch()
    watch.start()
    for step in range(spec.steps):
        with autocast(setting):
            logits, loss = model(inputs, targets)  # noqa: RUF059 - train.py holds the logits, too
        inputs, targets = get_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        watch.step_done()
        if step == 0:
            watch.first_loss = value


def litgpt(spec: Spec, setting: str, watch: Stopwatch) -> None:
    """The loop of `litgpt pretrain`, its model shaped as GPT-2 as far as it goes.

    It has rotary positions instead of learned ones and a head of its own, which is tied here to the embedding.
    """
    from lightning.fabric import Fabric
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true" if setting == FP32 else "bf16-mixed")
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
    watch.parameters = parameters_of(model)
    if setting == COMPILED:
        model = torch.compile(model)
    model = fabric.setup(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=setting != FP32
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


def transformers(spec: Spec, setting: str, watch: Stopwatch) -> None:
    """`Trainer` with GPT-2's configuration; it shifts the labels itself, and its AdamW is the fused one by default."""
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
    watch.parameters = parameters_of(model)
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
            bf16=setting != FP32,
            torch_compile=setting == COMPILED,
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
    """The file of tokens, cut into rows."""

    def __init__(self, spec: Spec, length: int):
        self._tokens = np.memmap(spec.tokens, dtype=np.uint16, mode="r")
        self._length = length

    def __len__(self) -> int:
        return len(self._tokens) // self._length

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * self._length
        return torch.from_numpy(self._tokens[start : start + self._length].astype(np.int64))


class Labelled(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows as transformers' models want them."""

    def __init__(self, windows: Windows):
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._windows[index], "labels": self._windows[index]}


CONTENDERS: dict[str, Callable[[Spec, str, Stopwatch], None]] = {
    OURS: ours,
    NANOGPT: nanogpt,
    LITGPT: litgpt,
    TRANSFORMERS: transformers,
}


def main() -> None:
    """Train, and print one line of JSON as the last."""
    name, setting, spec = sys.argv[1:]
    watch = Stopwatch()
    torch.manual_seed(SEED)
    CONTENDERS[name](Spec(**json.loads(spec)), setting, watch)
    versions = {library: metadata.version(library) for library in ("torch", *LIBRARIES[name])}
    print("\n" + json.dumps(watch.report() | {"versions": versions}))


if __name__ == "__main__":
    main()
