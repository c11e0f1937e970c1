"""The root of the configuration: `TrainConfig()` is the `quickstart` preset and the default of everything."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gpt.configs.base import MAX_COUNT, Config, FilePath
from gpt.configs.checkpoint_config import CheckpointConfig
from gpt.configs.data_config import DataConfig
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.lr_config import LRConfig
from gpt.configs.observer_config import EvalConfig, LogConfig, ProfileConfig, SpikeConfig, TextSampleConfig
from gpt.configs.optimizer_config import OptimizerConfig
from gpt.configs.parallel_config import ParallelConfig
from gpt.configs.runtime_config import RuntimeConfig

MAX_MICRO_BATCH_SIZE = 2**20
"""Of a micro-batch."""
HORIZON = ("max_steps", "max_tokens", "epochs")
"""Fields that say how long a run is."""


class TrainConfig(Config):
    """A training run."""

    run_dir: FilePath = Path("runs/quickstart")
    """Folder of the run: configuration, metrics, samples and checkpoints."""
    seed: int = Field(1337, ge=0, le=2**63 - 1)
    """Decides the initial weights, the data order and every other draw."""
    max_steps: int = Field(400, ge=0, le=MAX_COUNT)
    """Steps to train; 0: no bound. The earliest of max_steps, max_tokens and epochs ends the run."""
    max_tokens: int = Field(0, ge=0, le=MAX_COUNT)
    """Tokens to train on; 0: no bound."""
    epochs: float = Field(0, ge=0, le=1_000_000)
    """Passes over the training set; 0: no bound."""
    micro_batch_size: Annotated[int, Field(ge=1, le=MAX_MICRO_BATCH_SIZE)] | Literal["auto"] = 16
    """Sequences per process in one forward pass; auto: as many as fit in memory, on a CPU as many as are of use."""
    tokens_per_step: int = Field(2048, ge=0, le=MAX_COUNT)
    """Tokens over all processes in one update; 0: one micro-batch per process."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; auto: cuda, else mps, else cpu."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute type under autocast; auto: bfloat16 where the hardware has it, else float32."""
    compile: bool = False
    """Compile the model with torch.compile; a machine that cannot falls back, and says so."""
    compile_mode: Literal["default", "max-autotune"] = "default"
    """max-autotune times several kernels for each product of matrices, and takes long to compile."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest norm of the gradient; 0: no clipping."""
    resume: str = Field("auto", min_length=1)
    """auto: continue the run in run_dir if there is one; never; or a checkpoint to continue from."""
    resume_with_changes: bool = False
    """Continue although the learning rate, the horizon or another setting of the optimization has changed."""
    init_from: FilePath | None = None
    """Run or checkpoint whose weights to start from, with a fresh optimizer."""
    model: GPTConfig = GPTConfig()
    data: DataConfig = DataConfig()
    lr: LRConfig = LRConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sample: TextSampleConfig = TextSampleConfig()
    spike: SpikeConfig = SpikeConfig()
    profile: ProfileConfig = ProfileConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not (self.max_steps or self.max_tokens or self.epochs):
            raise ValueError("max_steps, max_tokens and epochs are all 0: set one of them, or the run never ends")
        if self.init_from is not None and self.resume not in ("auto", "never"):
            raise ValueError(f"init_from={self.init_from} and resume={self.resume} both name a start: leave one out")
        if self.micro_batch_size == "auto" and not self.tokens_per_step:
            raise ValueError("micro_batch_size=auto cuts up tokens_per_step, and that is 0: give one of them a number")
        return self

    def saved_json(self) -> str:
        """For config.json: without what is said of one start alone."""
        return self.model_dump_json(indent=2, exclude={"resume_with_changes"})
