"""Every family against transformers: logits, gradients, an optimizer step, initial weights, exported folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import PreTrainedModel

from gpt.commands import export, import_model, parity
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError
from gpt.inference.load import load_for_inference
from gpt.interop import proof
from gpt.interop.hf_config import describe_config
from gpt.interop.huggingface import export_tensors, import_tensors
from gpt.interop.imported_run import import_model as import_folder
from gpt.interop.model_folder import open_model_folder, write_model_folder
from gpt.interop.parity import compare_with_transformers
from gpt.interop.transformers_runtime import TransformersRuntime, build_model
from gpt.models.gpt import GPT
from gpt.pipeline import build_trainer
from gpt.run import open_run
from gpt.utils.helper import sha256_of_file
from tests.interop.families import CHANGES, make_config, make_model, make_tokenizer, write_folder

TOLERANCE = 1e-5
Tiny = Callable[..., TrainConfig]


@pytest.mark.parametrize("name", CHANGES)
def test_logits_gradients_and_a_step_match_transformers(name: str) -> None:
    for item in compare_with_transformers(make_model(name), make_tokenizer()):
        assert item.difference <= TOLERANCE, item


def test_a_wrong_weight_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("qwen3")
    exported = export_tensors(model.state_dict(), model.config)
    exported["model.layers.1.mlp.up_proj.weight"] = exported["model.layers.1.mlp.gate_proj.weight"]
    monkeypatch.setattr("gpt.interop.transformers_runtime.export_tensors", lambda *args: exported)
    logits, _, gradients, _ = compare_with_transformers(model, make_tokenizer())
    assert logits.difference > 0.1
    assert gradients.difference > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral, window", "qwen2", "qwen3"])
def test_initial_weights_have_the_mean_and_std_of_transformers(name: str) -> None:
    config = make_config(name, n_layer=6, n_embd=96, head_dim=24)
    torch.manual_seed(0)
    theirs = initial_weights_of_transformers(config)
    for key, mine in GPT(config, seed=0).named_parameters():
        assert mine.mean().item() == pytest.approx(theirs[key].mean().item(), abs=2e-3), key
        assert mine.std().item() == pytest.approx(theirs[key].std().item(), rel=0.05, abs=1e-9), key


def initial_weights_of_transformers(config: GPTConfig) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**describe_config(config)))
    return import_tensors(dict(model.named_parameters()), config)


@pytest.mark.parametrize("name", CHANGES)
def test_an_exported_folder_is_proven_and_round_trips_to_the_byte(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "first", name)
    tokenizer = make_tokenizer(name)
    result = proof.prove(make_model(name), tokenizer, TransformersRuntime(folder), tolerance=TOLERANCE)
    assert result.logits_difference <= TOLERANCE * max(1.0, result.logits_scale)
    assert (result.texts, result.skipped_texts) == (len(proof.AWKWARD_TEXTS), 0)
    assert result.greedy_tokens == 24 or result.greedy_tie
    import_folder(open_model_folder(folder), tmp_path / "run")
    loaded = load_for_inference(tmp_path / "run", "cpu", "float32")
    weights, config = loaded.model.state_dict(), loaded.model.config
    (tmp_path / "second").mkdir()
    write_model_folder(tmp_path / "second", weights, config, loaded.tokenizer, dtype=torch.float32)
    for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert sha256_of_file(folder / file) == sha256_of_file(tmp_path / "second" / file), file


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "llama 3", "qwen3"])
def test_rounded_weights_round_trip_to_the_byte(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    weights, config, tokenizer = make_model(name).state_dict(), make_config(name), make_tokenizer(name)
    for folder in folders:
        folder.mkdir()
        write_model_folder(folder, weights, config, tokenizer, dtype=dtype)
        import_folder(open_model_folder(folder), tmp_path / f"run-{folder.name}")
        loaded = load_for_inference(tmp_path / f"run-{folder.name}", "cpu", "float32")
        weights, config, tokenizer = loaded.model.state_dict(), loaded.model.config, loaded.tokenizer
    for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert sha256_of_file(folders[0] / file) == sha256_of_file(folders[1] / file), file


def test_a_qwen_2_with_another_tokenizer_is_exported_as_a_llama(tmp_path: Path) -> None:
    model, tokenizer = make_model("qwen2"), make_tokenizer()
    write_model_folder(tmp_path, model.state_dict(), model.config, tokenizer, dtype=torch.float32)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    proof.prove(model, tokenizer, TransformersRuntime(tmp_path), tolerance=TOLERANCE)
    windowed = model.config.with_(sliding_window=9)
    with pytest.raises(UserError, match="another tokenizer than Qwen's; nearest: LlamaForCausalLM"):
        write_model_folder(tmp_path, model.state_dict(), windowed, tokenizer, dtype=torch.float32)


def test_the_default_configuration_is_exported_and_loads_as_qwen_3(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = TrainConfig().model.with_(n_embd=32, block_size=16).model_dump()
    with open_run(
        tiny(tmp_path / "run", model=model, max_steps=2, data={"tokenizer": "bpe", "vocab_size": 300})
    ) as run:
        build_trainer(run).train()
    assert export.run([str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "out"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["class"] == "Qwen3ForCausalLM"
    assert "54 texts tokenized identically" in facts["proof"]
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    assert type(loaded).__name__ == "Qwen3ForCausalLM"
    assert AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True).eos_token == "<|endoftext|>"
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("`Qwen3ForCausalLM`", "text.txt", "train/loss", "val/bpb", "`--model.qk-norm` | True", "transformers"):
        assert part in card


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_weights_are_proven_as_they_are_in_the_files(
    finished_run: Path, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(finished_run), "--to", "hf", "--dtype", dtype, "--out", str(tmp_path / "out"), "--json"]
    assert export.run(argv) == 0
    difference = float(json.loads(capsys.readouterr().out)["proof"].split("logits ")[1].split()[0])
    assert difference <= TOLERANCE
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == getattr(torch, dtype)


@pytest.mark.parametrize("what", ["weights", "tokenizer"])
def test_an_export_that_differs_leaves_nothing(
    finished_run: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "weights":
        monkeypatch.setattr("gpt.interop.model_folder.export_tensors", wrong_tensors)
    else:
        monkeypatch.setattr(TransformersRuntime, "encode", lambda self, text: [0])
    message = "after token 0 the logit of id" if what == "weights" else "tokenizes 'Hello, world!' as"
    with pytest.raises(UserError, match=f"the export differs: .*{message}.*; nothing was written"):
        export.run([str(finished_run), "--to", "hf", "--out", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


def wrong_tensors(*args: Any) -> dict[str, torch.Tensor]:
    tensors = export_tensors(*args)
    return tensors | {"transformer.wpe.weight": tensors["transformer.wpe.weight"].flip(0)}


def test_import_and_parity_of_a_model_that_transformers_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_model("llama 3")
    build_model(dict(source.state_dict()), source.config).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(make_tokenizer().definition)
    assert import_model.run([str(tmp_path / "model"), "--out", str(tmp_path / "run")]) == 0
    for folder in (tmp_path / "model", tmp_path / "run"):
        capsys.readouterr()
        assert parity.run([str(folder), "--json", "--tolerance", str(TOLERANCE)]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["equal"]
        assert [item["quantity"] for item in facts["differences"]] == [
            *("logits", "loss", "gradients", "weights after a step")
        ]


def test_parity_returns_1_beyond_the_tolerance(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.run([str(finished_run), "--tolerance", "1e-12"]) == 1
    assert "differs by more than 1e-12" in capsys.readouterr().out
