"""Root of the configuration; `TrainConfig()` is the `quickstart` preset.

To change what `python gpt/main.py` trains, edit the recipe below. A field that the recipe does not name keeps the
default in its own section's file.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from gpt.configs.base import MAX_COUNT, Config, FilePath
from gpt.configs.checkpoint_config import CheckpointConfig
from gpt.configs.data_config import HUB_PREFIX, DataConfig
from gpt.configs.fields import SWITCH
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.lr_config import LRConfig
from gpt.configs.observer_config import EvalConfig, LogConfig, ProfileConfig, SpikeConfig, TextSampleConfig
from gpt.configs.optimizer_config import OptimizerConfig
from gpt.configs.parallel_config import ParallelConfig
from gpt.configs.resume_rule import NEEDS_FLAG, SAFE, SAFE_IF_LR_UNCHANGED, SAFE_WITHOUT_DROPOUT
from gpt.configs.runtime_config import RuntimeConfig
from gpt.configs.user_folders import expand_home

MAX_MICRO_BATCH_SIZE = 2**20
"""Upper bound of --micro-batch-size, in sequences."""
CPU_MICRO_BATCH_SIZE = 4
"""Sequences of --micro-batch-size auto-cuda without CUDA: 4,096 tokens at GPT-2's context length."""
NO_CHECKPOINT = frozenset({"auto", "never"})
"""Values of `resume` that name no checkpoint."""
HORIZON = ("max_steps", "max_tokens", "epochs")
"""Fields that set the length of a run."""


def _parse_switch(value: object) -> object:
    # A config.json from before `auto` existed has true or false.
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class TrainConfig(Config):
    """A training run."""

    run_dir: Annotated[FilePath, SAFE] = Path("runs/quickstart")
    """Folder of the run: configuration, metrics, samples and checkpoints."""
    # FORBIDDEN, like tokens_per_step: step s reads the sequences from s * sequences_per_step on, in an order that the
    # seed decides, so another value would repeat some sequences and leave out others.
    seed: int = Field(1337, ge=0, le=2**63 - 1)
    """Seed of the initial weights, the data order, dropout and samples."""
    max_steps: Annotated[int, SAFE_IF_LR_UNCHANGED] = Field(260, ge=0, le=MAX_COUNT)
    """Steps to train; 0: no limit. The run ends at the earliest of max_steps, max_tokens and epochs."""
    max_tokens: Annotated[int, SAFE_IF_LR_UNCHANGED] = Field(0, ge=0, le=MAX_COUNT)
    """Tokens to train on; 0: no limit."""
    epochs: Annotated[float, SAFE_IF_LR_UNCHANGED] = Field(0, ge=0, le=1_000_000)
    """Passes over the training set; 0: no limit."""
    micro_batch_size: Annotated[
        Annotated[int, Field(ge=1, le=MAX_MICRO_BATCH_SIZE)] | Literal["auto", "auto-cuda"], SAFE_WITHOUT_DROPOUT
    ] = 16
    """Sequences per process in one forward pass; auto: the most that fit in memory and, on a CPU, gain speed;
    auto-cuda: auto on CUDA, 4 elsewhere."""
    tokens_per_step: int = Field(4096, ge=0, le=MAX_COUNT)
    """Tokens per update over all processes and micro-batches; 0: one micro-batch per process."""
    # SAFE_WITHOUT_DROPOUT, like compile: each device and the compiler draw dropout masks of their own.
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], SAFE_WITHOUT_DROPOUT] = "auto"
    """Device to train on; auto: cuda, else mps where it computes as the CPU does (gpt selftest), else cpu."""
    # NEEDS_FLAG, not FORBIDDEN: autocast's type changes, the saved tensors' types do not.
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], NEEDS_FLAG] = "auto"
    """Compute type under autocast; auto: bfloat16 if the hardware has it, else float16 on CUDA and float32
    elsewhere."""
    residual_dtype: Annotated[Literal["float32", "compute"], NEEDS_FLAG] = "float32"
    """Type of the residual stream; compute: that of --dtype, which takes less memory and rounds every sum."""
    compile: Annotated[Literal["auto", "on", "off"], BeforeValidator(_parse_switch), SWITCH, SAFE_WITHOUT_DROPOUT] = (
        "auto"
    )
    """Compile each block and the loss with torch.compile; falls back to eager with a warning where that is not
    possible. auto: on for cuda; --compile alone: on; --no-compile: off."""
    compile_mode: Annotated[Literal["default", "max-autotune"], SAFE] = "default"
    """max-autotune times several kernels for each matmul; it takes long to compile."""
    grad_clip: Annotated[float, NEEDS_FLAG] = Field(1.0, ge=0)
    """Maximum norm of the gradient; 0: no clipping."""
    resume: Annotated[str, AfterValidator(expand_home), SAFE] = Field("auto", min_length=1)
    """auto: resume the run in run_dir, if any; never: start afresh, in a new run_dir; or a checkpoint to resume."""
    resume_with_changes: Annotated[bool, SAFE] = False
    """Resume although the learning rate, the horizon or another optimization setting has changed."""
    # FORBIDDEN: a run that has begun cannot begin from other weights.
    init_from: FilePath | None = None
    """Weights to start from, with a fresh optimizer: a run, a checkpoint, a model in Hugging Face's format, or hf:NAME.
    Model and tokenizer are then those of the weights, unless a flag sets them."""
    # The quickstart recipe. The sections themselves default to GPT-2 and AdamW, so GPTConfig(n_layer=12) stays a GPT-2
    # and a config.json from before a field existed loads as what it was.
    # The architecture is Qwen 3's, which public runtimes load. docs/EXPERIMENTS.md has the measurements.
    model: GPTConfig = GPTConfig(n_layer=2, bias=False, position="rotary", norm="rmsnorm", mlp="swiglu", qk_norm=True)
    data: DataConfig = DataConfig(vocab_size=4096)
    lr: LRConfig = LRConfig(max_lr=2e-2, warmup_steps=0)
    optimizer: OptimizerConfig = OptimizerConfig(name="muon", muon_momentum=0.85)
    parallel: ParallelConfig = ParallelConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig(interval=260)
    checkpoint: CheckpointConfig = CheckpointConfig()
    sample: TextSampleConfig = TextSampleConfig(prompts=("def ", "class ", "import "), max_new_tokens=100)
    spike: SpikeConfig = SpikeConfig()
    profile: ProfileConfig = ProfileConfig()

    @model_validator(mode="after")
    def _require_consistent(self) -> Self:
        if not (self.max_steps or self.max_tokens or self.epochs):
            raise ValueError("max_steps, max_tokens and epochs are all 0, so the run would never end; set one of them")
        if self.init_from is not None and self.resume not in NO_CHECKPOINT:
            raise ValueError(
                f"init_from={self.init_from} and resume={self.resume} both set where the run starts; remove one"
            )
        if isinstance(self.micro_batch_size, str) and not self.tokens_per_step:
            size = self.micro_batch_size
            raise ValueError(
                f"micro_batch_size={size} divides tokens_per_step, which is 0; set a number for one of them"
            )
        return self

    def on_device(self, device: str) -> Self:
        """Return this configuration with what it leaves to the kind of the device.

        Args:
            device: cpu, cuda or mps.
        """
        if self.micro_batch_size != "auto-cuda":
            return self
        size = "auto" if device == "cuda" else CPU_MICRO_BATCH_SIZE
        return self.model_copy(update={"micro_batch_size": size})

    def saved_json(self) -> str:
        """Return the JSON text for config.json: without the fields that concern a single launch, its paths absolute."""
        return self.map_paths(os.path.abspath).model_dump_json(indent=2, exclude={"resume_with_changes"})

    def map_paths(self, change: Callable[[str], str]) -> Self:
        """Return this configuration with `change` applied to every path in it."""

        def map_optional(path: Path | None) -> Path | None:
            return path if path is None or str(path).startswith(HUB_PREFIX) else Path(change(str(path)))

        return self.model_copy(
            update={
                "run_dir": map_optional(self.run_dir),
                "resume": self.resume if self.resume in NO_CHECKPOINT else change(self.resume),
                "init_from": map_optional(self.init_from),
                "data": self.data.map_paths(change),
                "spike": self.spike.model_copy(update={"journal": map_optional(self.spike.journal)}),
            }
        )
