"""Fixtures and helpers that several folders of tests share: a small text, a tiny configuration, a finished run."""

import random
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt.configs.data_config import DataConfig
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.lr_config import LRConfig
from gpt.configs.observer_config import EvalConfig, LogConfig, TextSampleConfig
from gpt.configs.optimizer_config import OptimizerConfig
from gpt.configs.train_config import TrainConfig
from gpt.data.prepare.documents import Document
from gpt.data.prepare.parts import cut_into_parts, read_part
from gpt.data.prepare.records import Records
from gpt.data.prepare.sources import find_source
from gpt.data.shards import ShardWriter, TokenStream
from gpt.data.tokenizer import Tokenizer
from gpt.pipeline import build_trainer
from gpt.run import open_run
from gpt.training.observer import Observer

WORDS = [
    "the", "a", "of", "model", "token", "data", "loss", "step", "train", "batch",
    "layer", "head", "width", "seed", "rate", "decay", "norm", "bias", "gelu", "run",
]  # fmt: skip


# The models of these tests are so small that a second thread makes them slower.
torch.set_num_threads(1)


@pytest.fixture
def capable_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set up the environment of a capable terminal, wherever the tests run."""
    for name in ("CI", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak-scale", type=float, default=1.0, help="fraction of the soak tests' work to do (pytest -m soak)"
    )


SLOW_PATHS = (
    *("cuda", "distributed", "e2e", "faults", "invariants", "parity", "soak"),
    *(
        "checkpoint/test_manifest.py",
        "commands/test_bench.py",
        "commands/test_export.py",
        "commands/test_prepare.py",
        "commands/test_selftest.py",
    ),
    *("commands/test_verify_resume.py", "data/prepare/test_preparation.py", "data/prepare/test_unfinished.py"),
    *("data/prepare/test_workers.py", "data/test_encoders.py", "data/test_packing.py", "machine/test_cpu_runtime.py"),
    *("machine/test_spinning.py", "models/test_plain_linears.py", "serving/test_page.py"),
    *("utils/test_folder_lock.py", "utils/test_heartbeat.py", "utils/test_training_thread.py"),
    "verification/test_kills.py",
    *("test_device_check.py", "test_hatch_build.py", "verification/test_processes.py"),
)
"""Folders and files of tests that start processes or repeat a check many times; `pytest -m fast` leaves them out."""

SLOW_TESTS = (
    "commands/test_serve.py::test_sigterm_lets_a_stream_finish_and_ends_with_status_0",
    "data/prepare/test_memory.py::test_estimate_is_near_the_memory_of_a_process",
    "data/prepare/test_sources.py::test_stdlib_excludes_tests_and_tables",
    "data/test_word_boundaries.py::test_both_patterns_agree_on_every_character_before_and_after_a_newline",
    "machine/test_arithmetic_check.py::test_run_trains_rightly_whatever_openmp_is_told",
    "machine/test_memory_estimate.py::test_activation_checkpointing_is_counted",
    "machine/test_memory_estimate.py::test_activations_are_about_those_that_are_measured",
    "machine/test_memory_estimate.py::test_rounded_residual_stream_takes_less",
    "ops/test_attention.py::test_block_mask_equals_the_boolean_mask",
    "ops/test_attention.py::test_document_layouts_do_not_recompile",
    "ops/test_attention.py::test_flex_attention_matches_sdpa",
    "optim/test_adamw.py::test_adamw_does_not_import_torchs_compiler",
    "parallel/test_activation_checkpointing.py::test_checkpointed_models_compile_without_graph_breaks",
    "parallel/test_parallelize.py::test_compiled_model_equals_the_eager_one",
    "parallel/test_parallelize.py::test_more_layers_compile_no_more_graphs",
    "parallel/test_parallelize.py::test_nothing_compiles_after_the_trial",
    "serving/test_api.py::test_200_streams_at_once_each_get_their_own_text",
    "training/test_trainer.py::test_broken_sink_of_a_user_changes_no_bit_and_delays_the_run_once",
    "training/test_trainer.py::test_compiled_run_equals_the_eager_run_and_compiles_before_its_first_step",
    "utils/test_rendezvous.py::test_address_without_a_listener_is_one_line_at_the_timeout",
    "utils/test_rendezvous.py::test_foreign_server_at_the_address_is_named_at_the_timeout",
)
"""Slow tests in files that are otherwise fast."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests outside SLOW_PATHS and SLOW_TESTS as fast."""
    folder = Path(__file__).parent
    paths = tuple(folder / path for path in SLOW_PATHS)
    assert all(path.exists() for path in paths), "SLOW_PATHS in tests/conftest.py names a path that does not exist"
    names = {(folder / path, name) for path, name in (test.split("::") for test in SLOW_TESTS)}
    missing = [f"{path}::{name}" for path, name in names if f"def {name}(" not in path.read_text(encoding="utf-8")]
    assert not missing, f"SLOW_TESTS in tests/conftest.py names tests that do not exist: {missing}"
    for item in items:
        is_slow = any(item.path.is_relative_to(path) for path in paths)
        if not is_slow and (item.path, getattr(item, "originalname", item.name)) not in names:
            item.add_marker("fast")


def make_text(n_words: int, seed: int = 0) -> str:
    generator = random.Random(seed)
    separators = [" ", " ", " ", ", ", ".\n"]
    return "".join(generator.choice(WORDS) + generator.choice(separators) for _ in range(n_words))


@contextmanager
def limit_file_size(max_bytes: int) -> Iterator[None]:
    """Limit the size of files that this process writes, which has the effect of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(make_text(6000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny(text_file: Path, cache_dir: Path) -> Callable[..., TrainConfig]:
    """Return a function that makes a configuration which trains in a second.

    Its keyword arguments replace fields; a dict replaces the fields of a section that it names.
    """

    def configure(run_dir: Path, **changes: Any) -> TrainConfig:
        base = TrainConfig(
            run_dir=run_dir,
            max_steps=8,
            micro_batch_size=2,
            tokens_per_step=128,
            device="cpu",
            dtype="float32",
            model=GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16),
            data=DataConfig(source=str(text_file), cache_dir=cache_dir, tokenizer="byte"),
            lr=LRConfig(max_lr=1e-2, min_lr=1e-3, warmup_steps=2, decay_steps=20),
            optimizer=OptimizerConfig(),
            log=LogConfig(interval=1),
            eval=EvalConfig(interval=4, batches=4),
            sample=TextSampleConfig(prompts=("the",), max_new_tokens=8),
        ).model_dump()
        for name, value in changes.items():
            base[name] = base[name] | value if isinstance(value, dict) else value
        return TrainConfig.model_validate(base)

    return configure


@pytest.fixture(scope="session")
def finished_run(tiny: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run of eight steps, which tests must not change."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    build_trainer(open_run(tiny(run_dir, checkpoint={"interval": 4}))).train()
    return run_dir


@pytest.fixture
def record() -> Iterator[Callable[[TrainConfig], tuple[list[float], dict[str, torch.Tensor]]]]:
    """Return a function that trains a configuration and returns the loss of each step and the final weights."""

    def train(config: TrainConfig, *observers: Observer) -> tuple[list[float], dict[str, torch.Tensor]]:
        recorder = LossRecorder()
        trainer = build_trainer(open_run(config))
        for observer in (*observers, recorder):
            trainer.attach(observer)
        trainer.train()
        weights = {name: tensor.clone() for name, tensor in trainer._state.model.state_dict().items()}
        return recorder.losses, weights

    yield train


class LossRecorder(Observer):
    """Observer that records every event and every loss."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.events: list[object] = []

    def on_event(self, event: Any) -> tuple[()]:
        self.events.append(event)
        self.losses += getattr(event, "losses", ())
        return ()

    def close(self, error: BaseException | None) -> None:
        self.events.append(error)


def write_stream(
    folder: Path, documents: Sequence[tuple[Sequence[int], int]], vocab_size: int = 2**16, per_shard: int = 1000
) -> TokenStream:
    """Write documents, each given as (ids, bytes of text), into shards of `per_shard` documents."""
    folder.mkdir(exist_ok=True)
    shards = []
    for index, start in enumerate(range(0, len(documents), per_shard)):
        with ShardWriter(folder / f"train-{index:06d}.safetensors", vocab_size) as writer:
            for ids, n_bytes in documents[start : start + per_shard]:
                writer.add(np.asarray(ids), n_bytes)
            info = writer.finish()
        assert info is not None
        shards.append((folder, info))
    return TokenStream(shards, vocab_size)


def read_documents(
    source: Path | str, records: Records | None = None, tokenizer: Tokenizer | None = None
) -> list[Document]:
    """Read all documents of a source in order."""
    records = records or Records("text", skip_bad=False)
    files = find_source(str(source), text_field=records.text_field).files
    parts = cut_into_parts(files, records, val_fraction=0.0, role="train", tokenizer=tokenizer)
    return [document for part in parts for document in read_part(part, records, tokenizer)]


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of each file below a folder, by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
