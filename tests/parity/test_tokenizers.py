"""The awkward texts get the same ids here, in transformers and in llama.cpp, with every kind of tokenizer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_builders import build_byte_tokenizer, build_char_tokenizer, build_gpt2_tokenizer
from gpt.interop import gguf, llama_cpp_runtime
from gpt.interop.awkward_texts import AWKWARD_TEXTS
from gpt.interop.gguf_tokenizer import LLAMA3_PATTERN, list_comparable_texts
from gpt.interop.llama_cpp_runtime import LlamaCppRuntime
from gpt.interop.model_folder import write_model_folder
from gpt.interop.transformers_runtime import TransformersRuntime
from tests.interop.families import change_pre_tokenizer, make_model, make_split, make_tokenizer

MIN_TEXTS = 50
DIGITS = [
    {"type": "Digits", "individual_digits": True},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
]
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": build_gpt2_tokenizer,
    "byte": build_byte_tokenizer,
    "bpe": make_tokenizer,
    "qwen2": lambda: make_tokenizer("qwen2"),
    "llama 3": lambda: change_pre_tokenizer(make_tokenizer(), make_split(LLAMA3_PATTERN)),
    "smollm": lambda: change_pre_tokenizer(make_tokenizer(), DIGITS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_texts_get_the_ids_of_transformers(tmp_path: Path, kind: str) -> None:
    tokenizer = KINDS[kind]()
    model = make_model("llama", vocab_size=tokenizer.vocab_size)
    write_model_folder(tmp_path, model.state_dict(), model.config, tokenizer, dtype=torch.float32)
    runtime = TransformersRuntime(tmp_path)
    assert len(AWKWARD_TEXTS) >= MIN_TEXTS
    for text in AWKWARD_TEXTS:
        assert runtime.encode(text) == tokenizer.encode(text).tolist(), text


def test_texts_of_a_character_tokenizer_get_the_ids_of_transformers(tmp_path: Path) -> None:
    tokenizer = build_char_tokenizer("".join(AWKWARD_TEXTS), has_documents=True)
    model = make_model("llama", vocab_size=tokenizer.vocab_size)
    write_model_folder(tmp_path, model.state_dict(), model.config, tokenizer, dtype=torch.float32)
    runtime = TransformersRuntime(tmp_path)
    for text in AWKWARD_TEXTS:
        assert runtime.encode(text) == tokenizer.encode(text).tolist(), text


@pytest.mark.skipif(not llama_cpp_runtime.is_installed(), reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("kind", KINDS)
def test_texts_get_the_ids_of_llama_cpp(tmp_path: Path, kind: str) -> None:
    tokenizer = KINDS[kind]()
    model, path = make_model("llama", vocab_size=tokenizer.vocab_size), tmp_path / "model.gguf"
    gguf.write_gguf(path, model.state_dict(), model.config, tokenizer, dtype="float32")
    texts = list_comparable_texts(tokenizer)
    assert len(texts) >= MIN_TEXTS
    with LlamaCppRuntime(path, context=8, vocab_size=tokenizer.vocab_size) as runtime:
        for text in texts:
            assert runtime.encode(text) == tokenizer.encode(text).tolist(), text
