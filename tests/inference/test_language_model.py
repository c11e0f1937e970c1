import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import gpt
from gpt.configs.train_config import TrainConfig
from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_builders import build_byte_tokenizer, build_char_tokenizer
from gpt.errors import UserError
from gpt.inference.language_model import LanguageModel, split_text
from gpt.models.gpt import GPT
from tests.inference.families import build_config
from tests.inference.test_kv_cache import build_model, last_logits


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(build_model(build_config("gpt2", vocab_size=257, block_size=64)), build_byte_tokenizer())


def test_gpt_load_loads_a_run_and_its_checkpoint(finished_run: Path) -> None:
    first = gpt.load(finished_run, device="cpu").generate("the", max_new_tokens=8)
    assert first == gpt.load(str(finished_run / "checkpoints/step_00000008"), "cpu").generate("the", max_new_tokens=8)
    assert first


def test_importing_gpt_does_not_import_torch() -> None:
    script = "import gpt, sys; assert gpt.load; assert 'torch' not in sys.modules and 'pydantic' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_pieces_of_a_stream_are_the_generated_text(model: LanguageModel) -> None:
    settings = {"max_new_tokens": 30, "temperature": 1.0, "seed": 3}
    pieces = list(model.stream("the", **settings))
    assert "".join(pieces) == model.generate("the", **settings) != ""
    assert "" not in pieces and len(pieces) > 1


def test_prompts_generated_together_give_the_texts_that_they_give_alone(model: LanguageModel) -> None:
    prompts = ["the", "", "a model of data"]
    texts = model.generate(prompts, max_new_tokens=20, temperature=1.0, seed=5)
    alone = [model.generate(prompt, max_new_tokens=20, temperature=1.0, seed=5 + i) for i, prompt in enumerate(prompts)]
    assert texts == alone
    assert len(set(texts)) == 3


def test_text_ends_before_the_first_stop_text(model: LanguageModel) -> None:
    settings = {"max_new_tokens": 40, "temperature": 1.0}
    text = model.generate("the", **settings)
    stop = text[7:9]
    expected = text[: text.index(stop)]
    assert model.generate("the", stop=("never generated", stop), **settings) == expected
    assert "".join(model.stream("the", stop=(stop,), **settings)) == expected


def test_stop_text_is_never_shown_in_part() -> None:
    # The model repeats "abc". Text that may begin a stop text is held back, and shown if it does not.
    tokenizer = build_char_tokenizer("abcd")
    repeating = LanguageModel(build_cycle(tokenizer, "abc"), tokenizer)
    assert list(repeating.stream("c", max_new_tokens=9, temperature=0, stop=("cab",))) == ["a", "b"]
    assert list(repeating.stream("c", max_new_tokens=5, temperature=0, stop=("cad",))) == ["a", "b", "cab"]
    assert list(repeating.stream("c", max_new_tokens=3, temperature=0, stop=("cad",))) == ["a", "b", "c"]


def build_cycle(tokenizer: Tokenizer, text: str) -> GPT:
    """Return a model that follows each character of a text by the next one."""
    model = GPT(build_config("gpt2, untied head", n_layer=1, vocab_size=tokenizer.vocab_size), seed=0).eval()
    assert model.lm_head is not None and model.wpe is not None
    for parameter in model.parameters():
        parameter.data.zero_()
    model.ln_f.weight.data.fill_(1.0)
    for this, following in zip(text, text[1:] + text[0], strict=True):
        (index,), (next_index,) = tokenizer.encode(this).tolist(), tokenizer.encode(following).tolist()
        model.wte.weight.data[index, index] = 1.0
        model.lm_head.weight.data[next_index, index] = 1.0
    return model


def test_text_that_ends_because_the_context_is_full_is_reported(
    model: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model.generate("the", max_new_tokens=100, seed=3)
    (record,) = caplog.records
    expected = "the text ends after 62 new tokens of at most 100: the context of the model (block_size=64) is full"
    assert record.getMessage() == expected


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("a" * 65, {}, r"prompt: 65 tokens exceed the context of the model \(block_size=64\)"),
        ("a", {"top_p": 2}, "top_p 2: must be at most 1"),
        ("a", {"tempratur": 1}, "unknown key tempratur; did you mean temperature"),
        ("a", {"stop": [""]}, "an empty text would end every sample"),
        ("a", {"stop_tokens": [257]}, "stop token 257 is not in the vocabulary"),
        ("\ud800", {}, "prompt: not valid Unicode text: a lone surrogate"),
    ],
)
def test_mistake_is_one_line(model: LanguageModel, prompt: str, settings: dict[str, object], message: str) -> None:
    for run in (model.generate, model.stream):
        with pytest.raises(UserError, match=message):
            run(prompt, **settings)


def test_score_is_the_mean_loss_after_the_end_of_text_token(model: LanguageModel) -> None:
    text = "the model of data"
    ids = torch.tensor([[256, *text.encode()]])
    with torch.no_grad():
        expected = F.cross_entropy(model.model(ids[:, :-1])[0], ids[0, 1:])
    assert model.score(text) == pytest.approx(expected.item(), abs=1e-5)
    scores = model.score_tokens(text)
    assert "".join(score.text for score in scores) == text
    assert [score.token for score in scores] == list(text.encode())


def test_long_text_is_scored_given_at_least_half_a_context(model: LanguageModel) -> None:
    ids = [256, *(b"the model of data " * 12)]
    nats = [score.nats for score in model.score_tokens("the model of data " * 12)]
    begin = 0
    for index, value in enumerate(nats):
        if index >= begin + 64:
            begin = index + 1 - 32
        logits = last_logits(model.model, ids[begin : index + 1])
        assert value == pytest.approx(float(-logits.log_softmax(0)[ids[index + 1]]), abs=1e-4)


def test_first_token_without_any_before_it_is_not_scored() -> None:
    tokenizer = build_char_tokenizer("abc")
    tokenizer.end_of_text = None
    model = LanguageModel(build_model(build_config("gpt2", vocab_size=tokenizer.vocab_size)), tokenizer)
    assert [score.nats is None for score in model.score_tokens("abca")] == [True, False, False, False]
    for text in ("", "a"):
        with pytest.raises(UserError, match="no token to score"):
            model.score(text)


def test_character_of_several_tokens_belongs_to_the_last_of_them() -> None:
    assert split_text(build_byte_tokenizer(), "a你b".encode()) == ["a", "", "", "你", "b"]
    assert split_text(build_byte_tokenizer(), b"a\xe4") == ["a", "\ufffd"]
    assert split_text(build_byte_tokenizer(), b"") == []


def test_prompt_of_a_run_that_exceeds_the_context_is_refused_before_training(
    tiny: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    from gpt.pipeline import build_trainer
    from gpt.run import open_run

    config = tiny(tmp_path / "run", sample={"prompts": ("the model of data",)})
    with open_run(config) as run, pytest.raises(UserError, match=r"--sample\.prompts 'the model of data': 17 tokens"):
        build_trainer(run)
    default = tiny(tmp_path / "short", sample={"prompts": ("def ",)}, model={"block_size": 3}, tokens_per_step=12)
    with open_run(default) as run:
        build_trainer(run)
