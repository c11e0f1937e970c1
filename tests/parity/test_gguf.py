"""Every architecture of GGUF in llama.cpp: logits, greedy text, tokenization."""

from pathlib import Path

import pytest

from gpt.commands import export
from gpt.commands.export import GGUF_TOLERANCES
from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_builders import build_byte_tokenizer, build_gpt2_tokenizer
from gpt.errors import UserError
from gpt.interop import gguf, llama_cpp_runtime
from gpt.interop.awkward_texts import AWKWARD_TEXTS
from gpt.interop.gguf_tokenizer import list_comparable_texts
from gpt.interop.llama_cpp_runtime import LlamaCppRuntime
from gpt.interop.proof import Proof, prove
from gpt.models.gpt import GPT
from tests.interop.families import make_model, make_tokenizer
from tests.interop.test_gguf import EXPORTABLE

pytestmark = pytest.mark.skipif(not llama_cpp_runtime.is_installed(), reason="llama-cpp-python is not installed")

F32_TOLERANCE = 1e-3
GELU = {"gpt2", "gpt2 without biases"}
"""Families whose activation is a table of float16 numbers in llama.cpp."""


def prove_file(folder: Path, model: GPT, tokenizer: Tokenizer, dtype: str) -> Proof:
    path = folder / "model.gguf"
    gguf.write_gguf(path, model.state_dict(), model.config, tokenizer, dtype=dtype)
    model.load_state_dict(gguf.round_weights(model.state_dict(), model.config, dtype=dtype))
    with LlamaCppRuntime(path, context=model.config.block_size, vocab_size=tokenizer.vocab_size) as runtime:
        texts = list_comparable_texts(tokenizer)
        return prove(model, tokenizer, runtime, tolerance=GGUF_TOLERANCES[dtype], texts=texts)


@pytest.mark.parametrize("name", [*EXPORTABLE, "gpt2 without biases"])
def test_float32_files_agree_with_llama_cpp(tmp_path: Path, name: str) -> None:
    changes = {"mlp": "gelu"} if name in GELU else {}
    proof = prove_file(tmp_path, make_model(name, block_size=96, **changes), make_tokenizer(), "float32")
    assert proof.logits_difference < (F32_TOLERANCE if name in GELU else 1e-5)
    assert proof.greedy_tokens == 64 and not proof.greedy_tie
    assert proof.texts == len(AWKWARD_TEXTS) >= 50


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_rounded_files_agree_with_llama_cpp(tmp_path: Path, name: str, dtype: str) -> None:
    proof = prove_file(tmp_path, make_model(name, n_embd=64), make_tokenizer(), dtype)
    assert proof.logits_difference <= GGUF_TOLERANCES[dtype]
    assert proof.texts == len(AWKWARD_TEXTS)


@pytest.mark.parametrize("tied", [True, False])
def test_qwen2_with_the_usual_head_dim_is_a_qwen2_in_llama_cpp(tmp_path: Path, tied: bool) -> None:
    model = make_model("qwen2", block_size=96, head_dim=12, n_kv_head=2, tie_embeddings=tied)
    assert gguf.require_architecture(model.config) == "qwen2"
    proof = prove_file(tmp_path, model, make_tokenizer("qwen2"), "float32")
    assert proof.logits_difference < 1e-5
    assert proof.greedy_tokens == 64 and not proof.greedy_tie
    assert proof.texts >= 50


@pytest.mark.parametrize("kind", ["gpt2", "byte", "qwen2"])
def test_tokenizers_agree_with_llama_cpp(tmp_path: Path, kind: str) -> None:
    build = {"gpt2": build_gpt2_tokenizer, "byte": build_byte_tokenizer, "qwen2": lambda: make_tokenizer("qwen2")}[kind]
    tokenizer = build()
    model = make_model("qwen3", vocab_size=tokenizer.vocab_size)
    assert prove_file(tmp_path, model, tokenizer, "float32").texts >= 50


def test_export_writes_a_proven_file_and_its_card(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export.run([str(finished_run), "--to", "gguf", "--dtype", "q8_0", "--out", "tiny"]) == 0
    assert "54 texts tokenized identically" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "tiny").iterdir()} == {"tiny-Q8_0.gguf", "README.md"}
    assert "library_name: gguf" in (tmp_path / "tiny" / "README.md").read_text()


def test_a_file_that_llama_cpp_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF not really")
    with (
        LlamaCppRuntime(tmp_path / "bad.gguf", context=8, vocab_size=8) as runtime,
        pytest.raises(UserError, match=r"llama-cpp-python .* cannot run the export: .*; nothing was written") as caught,
    ):
        runtime.encode("a")
    assert "\n" not in str(caught.value)
