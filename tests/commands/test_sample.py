import json
from pathlib import Path

import pytest

from gpt.commands.sample import run
from gpt.configs.gpt_config import GPTConfig
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.inference.language_model import LanguageModel
from tests.data.tokenizer_families import add_tokens, build_byte_fallback, build_unigram
from tests.training.observers.test_text_sampler import FixedModel


def sample(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert run([*argv, "--device", "cpu"]) == 0
    return capsys.readouterr().out


def test_sample_begins_with_the_prompt_and_depends_on_the_seed(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = str(finished_run)
    first = sample(capsys, run_dir, "--prompt", "the model", "--seed", "1", "--max-new-tokens", "20")
    assert first.startswith("the model")
    assert len(first) > len("the model\n")
    assert first == sample(capsys, "--prompt", "the model", "--seed", "1", "--max-new-tokens", "20", run_dir)
    assert first != sample(capsys, run_dir, "--prompt", "the model", "--seed", "2", "--max-new-tokens", "20")


def test_temperature_zero_is_greedy_with_any_seed(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (str(finished_run), "--prompt", "a", "--temperature", "0", "--max-new-tokens", "12")
    assert sample(capsys, *flags, "--seed", "1") == sample(capsys, *flags, "--seed", "2")
    assert sample(capsys, *flags) == sample(capsys, *flags[:-4], "--top-k", "1", "--max-new-tokens", "12")


def test_json_equals_the_plain_output(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (str(finished_run), "--prompt", "the", "--seed", "3", "--max-new-tokens", "9")
    plain, values = sample(capsys, *flags), json.loads(sample(capsys, *flags, "--json"))
    assert plain == values["prompt"] + values["completion"] + "\n"
    assert {name: values[name] for name in ("prompt", "seed", "new_tokens")} == {
        "prompt": "the",
        "seed": 3,
        "new_tokens": 9,
    }
    assert set(values) == {"prompt", "completion", "new_tokens", "seed"}


def test_run_dir_may_be_a_checkpoint(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = str(finished_run / "checkpoints/step_00000008")
    assert sample(capsys, newest, "--prompt", "a") == sample(capsys, str(finished_run), "--prompt", "a")


@pytest.mark.parametrize(("prompt", "expected"), [("one two", "one two the \ufffda\n"), ("", "the \ufffda\n")])
def test_text_is_joined_to_its_prompt_and_bytes_that_are_not_utf8_are_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, prompt: str, expected: str
) -> None:
    tokenizer = Tokenizer(add_tokens(build_byte_fallback(), ["</s>"]).to_str())
    tokens = [*tokenizer.encode("the ").tolist(), 3 + 0x80, int(tokenizer.encode("a")[-1]), tokenizer.end_of_text or 0]

    def load(path: Path, device: str, dtype: str) -> LanguageModel:
        model = FixedModel(tokens, tokenizer.vocab_size)
        model.config = GPTConfig(block_size=64).resolve()
        return LanguageModel(model, tokenizer)  # type: ignore[arg-type]

    monkeypatch.setattr("gpt.inference.load.load_for_inference", load)
    assert sample(capsys, "run", "--prompt", prompt, "--temperature", "0") == expected
    completion = json.loads(sample(capsys, "run", "--prompt", prompt, "--temperature", "0", "--json"))["completion"]
    assert prompt + completion + "\n" == expected


def test_prompt_that_the_tokenizer_cannot_represent_is_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = Tokenizer(add_tokens(build_unigram(), ["</s>"]).to_str())
    model = FixedModel([tokenizer.end_of_text or 0], tokenizer.vocab_size)
    model.config = GPTConfig(block_size=64).resolve()
    language_model = LanguageModel(model, tokenizer)  # type: ignore[arg-type]
    monkeypatch.setattr("gpt.inference.load.load_for_inference", lambda path, device, dtype: language_model)
    assert sample(capsys, "run", "--prompt", "one 你", "--temperature", "0") == "one 你\n"
    assert "--prompt: the tokenizer has no token for 1 character, first '你' at character 4" in caplog.text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["/no/such/run"], "RUN_DIR /no/such/run: no such folder"),
        ([], r"usage: gpt sample RUN_DIR \[--flags\]"),
        (["a", "--top-p", "2"], "--top-p 2: must be at most 1"),
        (["--promt", "x"], "unknown flag --promt; did you mean --prompt"),
        (["a", "--promt", "x"], "unknown flag --promt; did you mean --prompt"),
    ],
)
def test_mistake_is_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(argv)
