"""Presets: named configurations, each a function that returns a TrainConfig.

A preset names every section that the quickstart recipe in train_config.py sets, so that it does not follow the recipe.
A model family is a preset, too: docs/extending.md, "A model family".
"""

from collections.abc import Callable
from pathlib import Path

from gpt.configs.checkpoint_config import CheckpointConfig
from gpt.configs.data_config import SHAKESPEARE, DataConfig
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.lr_config import LRConfig
from gpt.configs.observer_config import EvalConfig, LogConfig, TextSampleConfig
from gpt.configs.optimizer_config import OptimizerConfig
from gpt.configs.train_config import TrainConfig


def debug() -> TrainConfig:
    """Return a run of seconds that uses every part: a two-layer byte model on the standard library."""
    return TrainConfig(
        run_dir=Path("runs/debug"),
        max_steps=20,
        micro_batch_size=4,
        tokens_per_step=512,
        model=GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64),
        data=DataConfig(tokenizer="byte"),
        lr=LRConfig(warmup_steps=5),
        optimizer=OptimizerConfig(),
        log=LogConfig(interval=1),
        eval=EvalConfig(interval=10, batches=8),
        checkpoint=CheckpointConfig(interval=10),
        sample=TextSampleConfig(max_new_tokens=64),
    )


def shakespeare_char() -> TrainConfig:
    """Return nanoGPT's documented CPU setting: its model, batch and steps, at twice its learning rate."""
    return TrainConfig(
        run_dir=Path("runs/shakespeare-char"),
        max_steps=2000,
        micro_batch_size=12,
        tokens_per_step=12 * 64,
        model=GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, bias=False, mlp="gelu_erf"),
        data=DataConfig(source=(SHAKESPEARE,), tokenizer="char"),
        lr=LRConfig(schedule="cosine", max_lr=2e-3, min_lr=2e-4, warmup_steps=100),
        optimizer=OptimizerConfig(beta2=0.99),
        log=LogConfig(interval=50),
        eval=EvalConfig(interval=500),
        checkpoint=CheckpointConfig(interval=500),
        sample=TextSampleConfig(prompts=("\n",), max_new_tokens=300),
    )


def speedrun_char() -> TrainConfig:
    """Return a run that reaches the loss of nanoGPT's CPU setting on tinyshakespeare, several times as fast.

    docs/EXPERIMENTS.md has the measurements.
    """
    return TrainConfig(
        run_dir=Path("runs/speedrun-char"),
        max_steps=220,
        micro_batch_size=8,
        tokens_per_step=8 * 128,
        grad_clip=0,
        model=GPTConfig(
            n_layer=2,
            n_head=4,
            n_embd=128,
            block_size=128,
            bias=False,
            position="rotary",
            norm="rmsnorm",
            mlp="relu2",
            qk_norm=True,
            logit_softcap=15,
        ),
        data=DataConfig(source=(SHAKESPEARE,), tokenizer="char"),
        lr=LRConfig(schedule="wsd", max_lr=2e-2, warmup_steps=0, decay_steps=132),
        optimizer=OptimizerConfig(name="muon", muon_lr=2e-2, muon_momentum=0.7, weight_decay=0),
        log=LogConfig(interval=20),
        eval=EvalConfig(interval=0),
        checkpoint=CheckpointConfig(interval=0),
        sample=TextSampleConfig(prompts=()),
    )


def _pretraining(name: str, model: GPTConfig, max_steps: int, max_lr: float) -> TrainConfig:
    """Return a run of `max_steps` batches of 0.5M tokens with AdamW and a cosine schedule."""
    return TrainConfig(
        run_dir=Path("runs") / name,
        max_steps=max_steps,
        micro_batch_size="auto-cuda",
        tokens_per_step=2**19,
        model=model,
        data=DataConfig(tokenizer="gpt2"),
        lr=LRConfig(schedule="cosine", max_lr=max_lr, min_lr=max_lr / 10, warmup_steps=715),
        optimizer=OptimizerConfig(),
        eval=EvalConfig(interval=250, batches=64),
        checkpoint=CheckpointConfig(interval=500),
        sample=TextSampleConfig(),
    )


def small_text() -> TrainConfig:
    """Return the default model for a text so short that it is read ten times: dropout and strong weight decay.

    docs/EXPERIMENTS.md has the measurements.
    """
    return TrainConfig(
        run_dir=Path("runs/small-text"),
        max_steps=0,
        epochs=10,
        micro_batch_size=16,
        tokens_per_step=16 * 128,
        model=GPTConfig(
            n_layer=2, bias=False, position="rotary", norm="rmsnorm", mlp="swiglu", qk_norm=True, dropout=0.2
        ),
        data=DataConfig(source=(SHAKESPEARE,), vocab_size=1024),
        lr=LRConfig(max_lr=2e-2, warmup_steps=0),
        optimizer=OptimizerConfig(name="muon", muon_momentum=0.85, weight_decay=1.6),
        eval=EvalConfig(interval=100),
        checkpoint=CheckpointConfig(),
        sample=TextSampleConfig(prompts=("\n",)),
    )


def _gpt2(name: str, n_layer: int, n_head: int, n_embd: int, max_lr: float) -> TrainConfig:
    """Return a model of the GPT-2 report (table 2) with GPT-3's learning rate and batch of 0.5M tokens (table 2.1)."""
    model = GPTConfig(
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        block_size=1024,
        vocab_size=50_304,  # 50,257 rounded up to a multiple of 128, for faster matmuls
    )
    return _pretraining(name, model, max_steps=19_073, max_lr=max_lr)  # 10 billion tokens


def gpt2_124m() -> TrainConfig:
    """Return GPT-2 small."""
    return _gpt2("gpt2-124m", n_layer=12, n_head=12, n_embd=768, max_lr=6e-4)


def gpt2_355m() -> TrainConfig:
    """Return GPT-2 medium."""
    return _gpt2("gpt2-355m", n_layer=24, n_head=16, n_embd=1024, max_lr=3e-4)


def gpt2_774m() -> TrainConfig:
    """Return GPT-2 large."""
    return _gpt2("gpt2-774m", n_layer=36, n_head=20, n_embd=1280, max_lr=2.5e-4)


def gpt2_1558m() -> TrainConfig:
    """Return GPT-2 XL."""
    return _gpt2("gpt2-1558m", n_layer=48, n_head=25, n_embd=1600, max_lr=2e-4)


def _llama(n_layer: int, n_head: int, n_embd: int) -> GPTConfig:
    """Return a model of Llama 2's architecture (Touvron et al. 2023) with a tied head, for GPT-2's vocabulary."""
    return GPTConfig(
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        # two thirds of 4 * n_embd, up to a multiple of 256: `multiple_of` of Llama's released code
        intermediate_size=-(-8 * n_embd // 768) * 256,
        block_size=1024,
        vocab_size=50_304,
        bias=False,
        position="rotary",
        norm="rmsnorm",
        norm_eps=1e-5,
        mlp="swiglu",
        init="llama",
    )


def llama_30m() -> TrainConfig:
    """Return a Llama of 29.9 M parameters, on 0.6 billion tokens: 20 for each parameter."""
    return _pretraining("llama-30m", _llama(n_layer=6, n_head=6, n_embd=384), max_steps=1_144, max_lr=1e-3)


def llama_124m() -> TrainConfig:
    """Return a Llama of 123.6 M parameters, with GPT-2 small's depth and width, on 10 billion tokens."""
    return _pretraining("llama-124m", _llama(n_layer=12, n_head=12, n_embd=768), max_steps=19_073, max_lr=6e-4)


def qwen3_0_6b() -> TrainConfig:
    """Return Qwen3-0.6B: the released config.json (Yang et al. 2025), at the 4,096 tokens of its first stage."""
    model = GPTConfig(
        n_layer=28,
        n_head=16,
        n_kv_head=8,
        n_embd=1024,
        head_dim=128,
        intermediate_size=3072,
        block_size=4096,
        vocab_size=151_936,
        bias=False,
        position="rotary",
        rope_theta=1e6,
        norm="rmsnorm",
        norm_eps=1e-6,
        mlp="swiglu",
        qk_norm=True,
        init="llama",
    )
    return _pretraining("qwen3-0.6b", model, max_steps=19_073, max_lr=6e-4)


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "debug": debug,
    "quickstart": TrainConfig,
    "shakespeare-char": shakespeare_char,
    "speedrun-char": speedrun_char,
    "small-text": small_text,
    "gpt2-124m": gpt2_124m,
    "gpt2-355m": gpt2_355m,
    "gpt2-774m": gpt2_774m,
    "gpt2-1558m": gpt2_1558m,
    "llama-30m": llama_30m,
    "llama-124m": llama_124m,
    "qwen3-0.6b": qwen3_0_6b,
}
