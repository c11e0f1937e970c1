"""Mixtures, packing and the document mask, from the configuration to the losses."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gpt.configs.train_config import TrainConfig
from gpt.data.data_loader import DataLoader, MicroBatch
from gpt.errors import UserError
from gpt.models.gpt import GPT
from gpt.pipeline import build_trainer
from gpt.run import open_run
from gpt.utils.helper import IGNORED
from tests.conftest import make_text

Configure = Callable[..., TrainConfig]
Record = Callable[..., tuple[list[float], dict[str, torch.Tensor]]]
PACKINGS = ("stream", "best-fit")
SIZES: dict[str, Any] = {"model": {"block_size": 32}, "tokens_per_step": 256}  # steps of 8 sequences


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write three folders of short files: most are shorter than a sequence, and some are longer."""
    generator = random.Random(0)
    folders = []
    for seed, name in enumerate(("books", "code", "web")):
        folder = tmp_path_factory.mktemp("sources") / name
        folder.mkdir()
        for index in range(40):
            (folder / f"{index}.txt").write_text(
                make_text(20, 100 * seed + index)[: generator.choice([3, 7, 10, 19, 20, 21, 70])]
            )
        folders.append(str(folder))
    return folders


def make_data_settings(sources: list[str], packing: str, **changes: Any) -> dict[str, Any]:
    return {
        "source": sources,
        "weights": [0.6, 0.3, 0.1],
        "packing": packing,
        "document_mask": True,
        "workers": 1,
    } | changes


def build_loader_and_model(config: TrainConfig) -> tuple[DataLoader, GPT]:
    trainer = build_trainer(open_run(config))
    model = trainer._state.model
    with torch.no_grad():  # with the initial weights, attention would be nearly uniform
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    return trainer._train_step._loader, model


def iterate_documents(batch: MicroBatch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the inputs and targets of each document of a batch."""
    assert batch.documents is not None
    for inputs, targets, numbers in zip(batch.inputs, batch.targets, batch.documents, strict=True):
        for number in numbers.unique():
            yield inputs[numbers == number], targets[numbers == number]


def sum_document_losses(model: GPT, batch: MicroBatch) -> float:
    """Sum the loss in nats over documents that go through the model alone, with torch's cross-entropy."""
    return sum(
        F.cross_entropy(model(inputs[None])[0].double(), targets, ignore_index=IGNORED, reduction="sum").item()
        for inputs, targets in iterate_documents(batch)
        if (targets != IGNORED).any()
    )


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("tokenizer", ["byte", "char"])
@torch.no_grad()
def test_masked_batch_has_the_loss_of_its_documents_alone(
    tiny: Configure, tmp_path: Path, sources: list[str], packing: str, tokenizer: str
) -> None:
    loader, model = build_loader_and_model(
        tiny(tmp_path, data=make_data_settings(sources, packing, tokenizer=tokenizer), **SIZES)
    )
    n_documents, differences = 0, []
    with loader:
        for step in range(4):
            for batch in loader.get_batch(step).micro_batches:
                n_documents += len(list(iterate_documents(batch)))
                loss = model(batch.inputs, batch.targets, batch.documents).item()
                assert loss == pytest.approx(sum_document_losses(model, batch), rel=1e-5)
                differences.append(abs(loss - model(batch.inputs, batch.targets).item()))
    assert n_documents > 4 * 8 * 1.5
    assert max(differences) > 0.5


@pytest.mark.parametrize("packing", PACKINGS)
@torch.no_grad()
def test_changed_tokens_in_a_document_change_no_bit_of_the_others(
    tiny: Configure, tmp_path: Path, sources: list[str], packing: str
) -> None:
    loader, model = build_loader_and_model(tiny(tmp_path, data=make_data_settings(sources, packing), **SIZES))
    changed = 0
    with loader:
        for batch in loader.get_batch(0).micro_batches + loader.get_batch(1).micro_batches:
            assert batch.documents is not None
            before = model(batch.inputs, documents=batch.documents)
            for number in batch.documents.unique():
                inside = batch.documents == number
                after = model(torch.where(inside, (batch.inputs + 1) % 257, batch.inputs), documents=batch.documents)
                assert torch.equal(before[~inside], after[~inside])
                assert (before[inside] != after[inside]).any(dim=-1).all()
                changed += 1
    assert changed > 10


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("mask", [True, False])
def test_resume_of_a_mixture_is_bit_exact(
    tiny: Configure, record: Record, tmp_path: Path, sources: list[str], packing: str, mask: bool
) -> None:
    """Train for eight steps, within which epochs of the sources end."""
    settings: dict[str, Any] = {
        "data": make_data_settings(sources, packing, document_mask=mask),
        "model": {"block_size": 32, "dropout": 0.2},
        "micro_batch_size": 8,
        "tokens_per_step": 512,
        "eval": {"interval": 0},
    }
    expected_losses, expected_weights = record(tiny(tmp_path / "uninterrupted", max_steps=8, **settings))
    first, _ = record(tiny(tmp_path / "resumed", max_steps=4, **settings))
    second, weights = record(tiny(tmp_path / "resumed", max_steps=8, **settings))
    assert first + second == expected_losses
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)


@pytest.mark.parametrize("change", [{"weights": [1, 1, 1]}, {"packing": "stream"}, {"document_mask": False}])
def test_resume_with_other_sequences_is_refused(
    tiny: Configure, record: Record, tmp_path: Path, sources: list[str], change: dict[str, Any]
) -> None:
    data = make_data_settings(sources, "best-fit")
    record(tiny(tmp_path, max_steps=1, data=data))
    with pytest.raises(UserError, match=rf"another configuration: data.{next(iter(change))}"):
        open_run(tiny(tmp_path, max_steps=2, data=data | change))


@pytest.mark.parametrize("mask", [True, False])
def test_reported_loss_is_the_mean_over_all_targets_of_the_step(
    tiny: Configure, record: Record, tmp_path: Path, sources: list[str], mask: bool
) -> None:
    data = make_data_settings(sources, "best-fit", document_mask=mask)
    losses = []
    for size in (1, 2, 8):
        config = tiny(tmp_path / str(size), max_steps=3, micro_batch_size=size, data=data, lr={"max_lr": 1e-3}, **SIZES)
        losses.append(record(config)[0])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0] == pytest.approx(losses[2], abs=1e-6)
    trainer = build_trainer(open_run(tiny(tmp_path / "plain", data=data, **SIZES)))
    model = trainer._state.model.eval()
    nats, n_targets, n_padding = 0.0, 0, 0
    with trainer._train_step._loader as loader, torch.no_grad():
        for batch in loader.get_batch(0).micro_batches:
            targets = batch.targets.flatten()
            n_targets += int((targets != IGNORED).sum())
            n_padding += int((targets == IGNORED).sum())
            if mask:
                nats += sum_document_losses(model, batch)
            else:
                logits = model(batch.inputs).flatten(0, 1)
                nats += F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum").item()
    assert n_padding > 0
    assert losses[0][0] == pytest.approx(nats / n_targets, abs=1e-6)


def read_last_evaluation(run_dir: Path) -> dict[str, float]:
    """Return the metrics of a run's last evaluation."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "val/loss" in line][-1]


@pytest.mark.parametrize("weighted", [True, False])
def test_each_source_is_evaluated_under_its_name(
    tiny: Configure, record: Record, tmp_path: Path, sources: list[str], weighted: bool
) -> None:
    data = make_data_settings(sources, "best-fit") if weighted else {"source": sources}
    config = tiny(tmp_path, max_steps=1, data=data, eval={"batches": 0})
    record(config)
    metrics = read_last_evaluation(tmp_path)
    assert {name for name in metrics if name.startswith("val/loss/")} == {
        *("val/loss/books", "val/loss/code", "val/loss/web"),
    }
    sizes = {name: len(stream) - 1 for name, stream in open_run(config).corpus.val.items()}
    total = sum(metrics[f"val/loss/{name}"] * size for name, size in sizes.items()) / sum(sizes.values())
    assert metrics["val/loss"] == pytest.approx(total, abs=1e-9)


def test_validation_sources_are_evaluated_under_their_own_names(
    tiny: Configure, record: Record, tmp_path: Path, sources: list[str]
) -> None:
    several = {"source": sources[0], "val_source": sources[1:]}
    record(tiny(tmp_path / "several", max_steps=1, data=several))
    names = {name for name in read_last_evaluation(tmp_path / "several") if name.startswith("val/loss/")}
    assert names == {"val/loss/code", "val/loss/web"}
    record(tiny(tmp_path / "one", max_steps=1, data=several | {"val_source": sources[1]}))
    assert not any(name.startswith("val/loss/") for name in read_last_evaluation(tmp_path / "one"))


@pytest.mark.parametrize("weights", [[1, 2], [1, 2, 3, 4]])
def test_wrong_number_of_weights_is_refused_before_preparation(
    tiny: Configure, tmp_path: Path, sources: list[str], weights: list[float]
) -> None:
    config = tiny(tmp_path / "run", data={"source": sources, "weights": weights, "cache_dir": tmp_path / "cache"})
    with pytest.raises(UserError, match=rf"^--data.weights: {len(weights)} for 3 sources; give one for each$"):
        open_run(config)
    assert not (tmp_path / "cache").exists()


def test_sources_are_trained_on_in_proportion_to_their_weights(
    tiny: Configure, tmp_path: Path, sources: list[str]
) -> None:
    run = open_run(tiny(tmp_path, max_steps=100, data=make_data_settings(sources, "best-fit")))
    assert [(source.name, source.share) for source in run.plan.sources] == [
        *(("books", pytest.approx(0.6)), ("code", pytest.approx(0.3)), ("web", pytest.approx(0.1))),
    ]
    for source in run.plan.sources:
        n_sequences = run.corpus.packings[source.name].n_sequences
        assert source.epochs == pytest.approx(source.share * 800 / n_sequences)
    assert run.plan.windows_per_epoch == sum(packing.n_sequences for packing in run.corpus.packings.values())
