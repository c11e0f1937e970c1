"""Content of a GGUF file, read back by the package `gguf`; tests/parity/test_gguf.py runs the files in llama.cpp."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, TokenType
from gguf.quants import dequantize

from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_builders import build_byte_tokenizer, build_char_tokenizer
from gpt.errors import UserError
from gpt.interop.gguf import require_architecture, round_weights, write_gguf
from gpt.interop.gguf_tokenizer import LLAMA3_PATTERN, describe_vocabulary, find_pre_tokenizer, list_comparable_texts
from tests.conftest import limit_file_size
from tests.data.chat_templates import build_chat_template, build_chat_tokenizer
from tests.data.tokenizer_families import FAMILIES, add_tokens
from tests.interop.families import CHANGES, VOCAB_SIZE, make_config, make_model, make_tokenizer

EXPORTABLE = {
    "gpt2": "gpt2",
    "llama": "llama",
    "llama, untied, biases": "llama",
    "llama 3": "llama",
    "qwen2": "llama",
    "qwen3": "qwen3",
}
"""Family -> architecture of llama.cpp; a Qwen 2 with a head_dim of its own is a Llama with biases there."""


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_matrices_have_the_type_and_are_rounded_as_the_proof_assumes(tmp_path: Path, dtype: str) -> None:
    model = make_model("qwen3", n_embd=64)
    write_gguf(tmp_path / "model.gguf", model.state_dict(), model.config, make_tokenizer(), dtype=dtype)
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    rounded = round_weights(model.state_dict(), model.config, dtype=dtype)
    expected = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    for theirs, ours in (("token_embd", "wte"), ("blk.1.attn_output", "h.1.attn.c_proj")):
        found = tensors[f"{theirs}.weight"]
        is_block = ours == "wte" or dtype != "q8_0"  # rows of 56 channels fit no block of Q8_0
        assert found.tensor_type == GGMLQuantizationType[expected if is_block else "F16"]
        assert np.array_equal(dequantize(found.data, found.tensor_type), rounded[f"{ours}.weight"].numpy())
    assert tensors["blk.0.attn_norm.weight"].tensor_type == GGMLQuantizationType.F32


@pytest.mark.parametrize(("name", "architecture"), EXPORTABLE.items())
def test_architectures(name: str, architecture: str) -> None:
    assert require_architecture(make_config(name)) == architecture


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2, untied", "no --model.mlp gelu_erf in gpt2; nearest: --model.mlp gelu"),
        ("mistral, window", "no --model.sliding-window 7 in llama; nearest: 0, or a --model.block-size of at most 7"),
        ("qwen2, untied, window", "no --model.sliding-window 9 in qwen2"),
        ("qwen3, untied, window", "no --model.sliding-window 11 in qwen3"),
    ],
)
def test_fields_that_llama_cpp_lacks_are_named(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        require_architecture(make_config(name))


@pytest.mark.parametrize(
    "changes",
    [{"rope_scaling": "llama3"}, {"qkv_bias": True}, {"attn_out_bias": True}],
    ids=lambda value: next(iter(value)),
)
def test_fields_that_llama_cpp_lacks_in_qwen3_are_named(changes: dict[str, object]) -> None:
    with pytest.raises(UserError, match="in qwen3; nearest: --model"):
        require_architecture(make_config("qwen3", **changes))


def test_a_window_as_long_as_the_context_is_none() -> None:
    assert require_architecture(make_config("mistral, window", sliding_window=40)) == "llama"


def test_every_row_has_a_token() -> None:
    tokenizer = make_tokenizer()
    vocabulary = describe_vocabulary(tokenizer, VOCAB_SIZE)
    assert len(vocabulary.tokens) == len(set(vocabulary.tokens)) == VOCAB_SIZE
    assert vocabulary.types[tokenizer.end_of_text] == TokenType.CONTROL
    assert vocabulary.types[tokenizer.vocab_size :] == [TokenType.UNUSED] * (VOCAB_SIZE - tokenizer.vocab_size)
    assert vocabulary.tokens[: tokenizer.vocab_size] == [tokenizer.name_token(i) for i in range(tokenizer.vocab_size)]


def test_chat_template_and_its_first_token_are_in_the_file(tmp_path: Path) -> None:
    model, tokenizer, template = make_model("llama"), build_chat_tokenizer(), build_chat_template()
    path = tmp_path / "model.gguf"
    write_gguf(path, model.state_dict(), model.config, tokenizer, dtype="float32", chat_template=template)
    fields = GGUFReader(path).fields
    assert fields["tokenizer.chat_template"].contents() == template.source
    assert tokenizer.name_token(fields["tokenizer.ggml.bos_token_id"].contents()) == "<s>"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.end_of_text


def split_definition(pattern: str) -> dict[str, object]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    steps = [split, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]
    return {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


def test_pre_tokenizers_are_found_by_what_they_do() -> None:
    assert find_pre_tokenizer(json.loads(make_tokenizer().definition)) == "gpt-2"
    assert find_pre_tokenizer(json.loads(build_byte_tokenizer().definition)) == "gpt-2"
    assert find_pre_tokenizer(json.loads(make_tokenizer("qwen2").definition)) == "qwen2"
    assert find_pre_tokenizer(split_definition(LLAMA3_PATTERN)) == "llama-bpe"
    assert find_pre_tokenizer(split_definition(r"\w+")) is None
    digits = [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False}]
    steps = {"type": "Sequence", "pretokenizers": digits}
    assert find_pre_tokenizer({"model": {"type": "BPE"}, "pre_tokenizer": steps}) == "smollm"


def test_texts_that_are_not_nfc_are_left_out_for_a_tokenizer_that_normalises() -> None:
    everything, nfc = list_comparable_texts(make_tokenizer()), list_comparable_texts(make_tokenizer("qwen2"))
    assert "nai\u0308ve cafe\u0301" in set(everything) - set(nfc)
    assert len(nfc) >= 50


@pytest.mark.parametrize("kind", ["char", "BPE with byte fallback", "Unigram", "WordPiece", "WordLevel"])
def test_other_tokenizers_are_refused(tmp_path: Path, kind: str) -> None:
    if kind == "char":
        tokenizer = build_char_tokenizer("abc", has_documents=True)
    else:
        tokenizer = Tokenizer(add_tokens(FAMILIES[kind](), ["</s>"]).to_str())
    model = make_model("llama")
    with pytest.raises(
        UserError, match=r"GGUF has no such tokenizer \(byte-level BPE .* gpt export --to hf writes any"
    ):
        write_gguf(tmp_path / "model.gguf", model.state_dict(), model.config, tokenizer, dtype="float32")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    model = make_model("llama")
    with limit_file_size(50_000), pytest.raises(UserError, match=r"model.gguf: cannot be written: .*; free space"):
        write_gguf(tmp_path / "model.gguf", model.state_dict(), model.config, make_tokenizer(), dtype="float32")


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in EXPORTABLE])
def test_every_family_is_exportable_or_refused(name: str) -> None:
    config = make_config(name)
    if name == "gpt2 without biases":
        config = config.with_(mlp="gelu")
        assert require_architecture(config.resolve()) == "gpt2"
    else:
        with pytest.raises(UserError, match=r"llama\.cpp has no"):
            require_architecture(config)


def test_llama_channels_are_interleaved_for_its_rotary_embeddings(tmp_path: Path) -> None:
    model = make_model("llama 3")
    write_gguf(tmp_path / "model.gguf", model.state_dict(), model.config, make_tokenizer(), dtype="float32")
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    queries = model.state_dict()["h.0.attn.c_attn.weight"][:12]  # the first head, D = 12
    order = torch.tensor([0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11])
    assert np.array_equal(tensors["blk.0.attn_q.weight"][:12], queries[order].numpy())
    assert tensors["rope_freqs.weight"].shape == (6,)
    assert tensors["rope_freqs.weight"].max() == pytest.approx(4)
