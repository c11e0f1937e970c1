import json
from pathlib import Path

import pytest

from gpt.commands.import_model import run
from gpt.commands.sample import run as sample
from gpt.commands.train import parse_train
from gpt.configs.presets import PRESETS
from gpt.errors import UserError
from gpt.main import main
from tests.interop.families import make_config, write_folder


def test_an_imported_model_can_be_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "model", "qwen3")
    assert run([str(folder), "--out", str(tmp_path / "run"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == f"{make_config('qwen3').n_parameters:,}"
    assert sample([str(tmp_path / "run"), "--prompt", "the", "--max-new-tokens", "4", "--device", "cpu"]) == 0


def test_the_printed_command_fine_tunes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "model")
    assert run([str(folder), "--out", str(tmp_path / "run")]) == 0
    words = capsys.readouterr().out.splitlines()[-1].split()
    assert words[:2] == ["gpt", "train"]
    config = parse_train(words[2:]).as_train_config()
    assert config.model.resolve() == make_config("llama").with_(bias=False)
    assert config.data.tokenizer == str(tmp_path / "run" / "tokenizer.json")


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "llama", "auto_map": {"AutoModel": "code.Model"}}')
    assert main(["import", str(folder), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gpt: error: {folder}/config.json: auto_map: the model needs Python code")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    with pytest.raises(UserError, match="exists already"):
        run([str(folder), "--out", str(folder)])


def test_train_takes_model_and_tokenizer_of_init_from(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    flags = ["debug", "--init-from", str(folder), "--model.block-size", "32", "--data.source", "a"]
    config = parse_train(flags).as_train_config()
    assert config.model == make_config("llama", block_size=32)
    assert config.data.tokenizer == str(folder / "tokenizer.json")
    assert (config.max_steps, config.lr) == (PRESETS["debug"]().max_steps, PRESETS["debug"]().lr)


def test_train_takes_model_and_tokenizer_of_a_run(finished_run: Path) -> None:
    config = parse_train(["quickstart", "--init-from", str(finished_run)]).as_train_config()
    assert (config.model.n_embd, config.model.position, config.data.tokenizer) == (16, "learned", "byte")


def test_train_refuses_an_unsupported_model_before_anything_else(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"--init-from .*config.json: model_type 'bert' is not supported"):
        parse_train(["debug", "--init-from", str(tmp_path)])


@pytest.mark.parametrize("verb", ["sample", "export", "serve"])
def test_a_model_that_is_not_imported_yet_is_named(
    tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "model")
    flags = {"export": ["--to", "hf", "--out", str(tmp_path / "out")], "serve": ["--port", "0"]}.get(verb, [])
    assert main([verb, str(folder), *flags]) == 2
    remedy = f"a model from elsewhere; import it first: gpt import {folder} --out RUN_DIR"
    assert capsys.readouterr().err == f"gpt: error: RUN_DIR {folder}: {remedy}\n"
