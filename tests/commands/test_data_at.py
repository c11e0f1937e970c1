import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpt.configs.train_config import TrainConfig
from gpt.data.corpus import build_sequences
from gpt.data.data_loader import DataLoader
from gpt.main import main
from gpt.pipeline import build_trainer
from gpt.run import Run, open_run

Configure = Callable[..., TrainConfig]


def data_at(run_dir: Path, step: int, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["data-at", str(run_dir), "--step", str(step), *flags]) == 0
    return capsys.readouterr().out


def loader_of(run: Run) -> DataLoader:
    plan = run.plan
    sequences = build_sequences(run.corpus, run.config.data, plan.batch.block_size, plan.seed)
    return DataLoader(sequences, plan.batch, rank=0, device=run.dist.device)


def test_step_shows_the_documents_it_trains_on(
    finished_run: Path, tiny: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = data_at(finished_run, 3, capsys).splitlines()
    assert lines[0] == "step 3: global batch 2, 8 sequences of 16 tokens"
    assert lines[1:17:2] == [f"sequence {n}" for n in range(8)]
    run = open_run(tiny(finished_run), dry_run=True)
    with loader_of(run) as loader:
        inputs = np.concatenate([micro.inputs.numpy() for micro in loader.get_batch(2).micro_batches])
    for line, row in zip(lines[2::2], inputs, strict=True):
        place, text = line.split(": ", 2)[1:]
        assert place.startswith("train-000000.safetensors document 0, tokens ")
        assert text == run.corpus.tokenizer.decode(row.tolist()).replace("\n", "\\n")


@pytest.mark.parametrize("packing", ["stream", "best-fit"])
def test_documents_are_listed_separately_without_control_characters(
    packing: str, tiny: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"document {n} \x1b[31m\u202e\n" + "word " * (n % 5) for n in range(60)]
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    other = tmp_path / "other.txt"
    other.write_text("other text " * 100)
    data = {"source": [str(source), str(other)], "packing": packing, "val_fraction": 0.0, "weights": [3, 1]}
    build_trainer(
        open_run(tiny(tmp_path / "run", data=data, max_steps=2, model={"block_size": 64}, tokens_per_step=512))
    ).train()
    lines = [line for step in range(1, 9) for line in data_at(tmp_path / "run", step, capsys).splitlines()]
    assert all(line.isprintable() for line in lines)
    documents = [line for line in lines if line.startswith("  ")]
    assert any(line.startswith("  other: ") for line in documents)
    begun = [line for line in documents if line.startswith("  texts: ") and ", tokens 0 to " in line]
    assert len(begun) > 60
    for line in begun:
        number = int(line.split(" document ")[1].split(",")[0])
        text, expected = line.split(": ", 2)[2].removesuffix("..."), f"<|endoftext|>document {number} "
        assert text.startswith(expected) or expected.startswith(text)


def test_json_equals_the_plain_output(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = data_at(finished_run, 2, capsys).splitlines()
    batch = json.loads(data_at(finished_run, 2, capsys, "--json"))
    assert list(batch) == ["step", "global_batch", "block_size", "sequences"]
    count = len(batch["sequences"])
    sizes = f"{count} sequences of {batch['block_size']} tokens"
    assert lines[0] == f"step 2: global batch {batch['global_batch']}, {sizes}"
    documents = [document for sequence in batch["sequences"] for document in sequence]
    shown = [line.removeprefix("  ") for line in lines if line.startswith("  ")]
    for document, line in zip(documents, shown, strict=True):
        last = document["first_token"] + document["tokens"] - 1
        place = f"{document['shard']} document {document['document']}, tokens {document['first_token']} to {last}"
        assert line == f"{document['source']}: {place}: " + document["text"].replace("\n", "\\n")


def test_step_beyond_the_run_is_marked(
    finished_run: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 8):
        data_at(finished_run, step, capsys)
    assert caplog.messages == []
    data_at(finished_run, 9, capsys)
    assert caplog.messages == [
        "--step 9 is beyond the run, which ends at step 8; a longer run would train on these documents"
    ]


def test_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], finished_run: Path) -> None:
    for arguments, message in (
        (
            [str(tmp_path), "--step", "1"],
            f"RUN_DIR {tmp_path}: not a run: it has no config.json; name the --run-dir",
        ),
        ([str(tmp_path / "none"), "--step", "1"], "none: no such folder; name the --run-dir of a run"),
        ([str(finished_run), "--step", "0"], "--step 0: must be at least 1 (nearest: 1)"),
        ([str(finished_run)], "usage: gpt data-at RUN_DIR --step STEP [--flags]"),
    ):
        assert main(["data-at", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
