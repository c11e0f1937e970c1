"""A plan and events of a run, which tests of observers and sinks share."""

from gpt.configs.gpt_config import GPTConfig
from gpt.configs.lr_config import LRConfig
from gpt.configs.run_plan import CorpusFacts, MachineFacts, StreamFacts, resolve
from gpt.configs.train_config import TrainConfig
from gpt.training.events import (
    CheckpointSaved,
    EvalEnd,
    Event,
    MetricsReady,
    RolledBack,
    SpikeSeen,
    StepEnd,
    TextSampled,
    TrainEnd,
    TrainStart,
)

PLAN = resolve(
    TrainConfig(max_steps=20, tokens_per_step=4096, model=GPTConfig(block_size=256), lr=LRConfig(schedule="cosine")),
    MachineFacts("cpu", "a CPU", has_bfloat16=False),
    CorpusFacts(300, (StreamFacts("text", 10**6),), val_tokens=10, val_bytes=30, xz_bits_per_byte=1.75),
)
METRICS = {"train/loss": 2.5, "grad_norm": 1.0, "tokens_per_second": 2048.0, "mfu": 0.456, "lr": 1e-3, "tokens": 40960}
EVENTS: list[Event] = [
    TrainStart(0, PLAN, "runs/a/checkpoints/step_00000005"),
    MetricsReady(10, METRICS, (2.6, 2.5)),
    StepEnd(10, 40960),
    EvalEnd(10, "val", {"val/loss": 2.0, "val/perplexity": 7.389, "val/bpb": 1.5}),
    TextSampled(10, "def", " main():\n\x1b[31mred"),
    CheckpointSaved(10, "runs/a/checkpoints/step_00000010"),
    TrainEnd(20, "finished"),
]
TROUBLE: list[Event] = [
    MetricsReady(10, METRICS, (2.5,)),
    TextSampled(10, "def", " main()"),
    MetricsReady(12, METRICS | {"train/loss": float("nan")}, (float("nan"),) * 2, (11, 12)),
    SpikeSeen(12, 25.0, 2.5, float("inf")),
    TextSampled(12, "def", " main()"),
    RolledBack(12, 10, "the loss of step 12 was 25.0"),
]
