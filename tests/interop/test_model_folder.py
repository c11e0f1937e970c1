import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gpt.errors import UserError
from gpt.interop import model_folder
from gpt.interop.model_folder import is_model_folder, open_model_folder, write_model_folder
from tests.interop.families import make_model, make_tokenizer, write_folder


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_written_weights_are_read_back(tmp_path: Path) -> None:
    source = open_model_folder(write_folder(tmp_path / "model"))
    assert source.tokenizer.sha256 == make_tokenizer().sha256
    weights = source.read_weights()
    for name, tensor in make_model("llama").state_dict().items():
        assert torch.equal(weights[name], tensor)


def test_weights_in_several_files_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single = write_folder(tmp_path / "single")
    monkeypatch.setattr(model_folder, "MAX_SHARD_BYTES", 40_000)
    sharded = write_folder(tmp_path / "sharded")
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    tensors = load_file(single / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    assert all((sharded / name).stat().st_size < 41_000 + 301 * 48 * 4 for name in files)
    expected, found = (open_model_folder(folder).read_weights() for folder in (single, sharded))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_pytorch_model_bin_is_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    expected = open_model_folder(folder).read_weights()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = open_model_folder(folder).read_weights()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_bfloat16_weights_become_float32(tmp_path: Path) -> None:
    model = make_model("qwen3")
    write_model_folder(tmp_path, model.state_dict(), model.config, make_tokenizer(), dtype=torch.bfloat16)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16
    for name, tensor in open_model_folder(tmp_path).read_weights().items():
        assert torch.equal(tensor, model.state_dict()[name].bfloat16().float())


def test_ids_without_a_token_are_never_generated(tmp_path: Path) -> None:
    folder, n_tokens = write_folder(tmp_path / "model"), make_tokenizer().vocab_size
    suppressed = json.loads((folder / "generation_config.json").read_text())["suppress_tokens"]
    assert suppressed == list(range(n_tokens, 301)) != []


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


@pytest.mark.parametrize("code_first", [False, True])
def test_code_in_a_pickle_is_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], code_first: bool) -> None:
    folder = write_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    if code_first:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    else:
        torch.save({"weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="not a file of tensors alone, and code in it is never run"):
        open_model_folder(folder).read_weights()
    assert capsys.readouterr().out == ""


def break_folder(folder: Path, name: str) -> None:
    weights = folder / "model.safetensors"
    match name:
        case "no config":
            (folder / "config.json").unlink()
        case "config":
            (folder / "config.json").write_text("{")
        case "unsupported":
            change_json(folder / "config.json", model_type="bert")
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
        case "tokenizer":
            (folder / "tokenizer.json").write_text("{}")
        case "vocabulary":
            change_json(folder / "config.json", vocab_size=200)
        case "no weights":
            weights.unlink()
        case "weights":
            weights.write_bytes(weights.read_bytes()[:1000])
        case "bin":
            weights.unlink()
            (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut off")
        case "tensor":
            save_file({**load_file(weights), "extra": torch.zeros(2)}, weights)
        case "integers":
            tensors = load_file(weights)
            save_file(tensors | {"model.norm.weight": torch.zeros(48, dtype=torch.int8)}, weights)
        case "index":
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
        case "shard":
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001.safetensors"}}')
        case "map":
            (folder / "model.safetensors.index.json").write_text('{"weight_map": []}')


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no config", "model: no config.json"),
        ("config", "config.json: not valid JSON"),
        ("unsupported", "config.json: model_type 'bert' is not supported"),
        ("no tokenizer", "model: no tokenizer.json; convert it: AutoTokenizer"),
        ("tokenizer", "tokenizer.json: not a Hugging Face tokenizer.json"),
        ("vocabulary", r"tokenizer.json has 290 tokens, but the embedding of config.json has 200 rows"),
        ("no weights", "model: no model.safetensors or pytorch_model.bin"),
        ("weights", "model.safetensors: not a valid safetensors file"),
        ("bin", "pytorch_model.bin: cannot be read"),
        ("tensor", "model: the tensors are not those that config.json describes: not in this model: extra"),
        ("integers", "model: model.norm.weight is torch.int8, not float32"),
        ("index", r"index.json: it names '../model.safetensors', which is not a file of this folder"),
        ("shard", r"index.json: it names 'model-00001.safetensors', which is not a file of this folder"),
        ("map", "index.json: no weight_map in it"),
    ],
)
def test_a_bad_folder_is_one_line(tmp_path: Path, name: str, message: str) -> None:
    folder = write_folder(tmp_path / "model")
    break_folder(folder, name)
    with pytest.raises(UserError, match=message) as caught:
        open_model_folder(folder).read_weights()
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        open_model_folder(tmp_path / "nowhere")


def test_a_run_is_not_imported(finished_run: Path) -> None:
    with pytest.raises(UserError, match="a run or a checkpoint of this program; it needs no import"):
        open_model_folder(finished_run)


def test_a_run_and_a_checkpoint_are_no_model_folders(tmp_path: Path, finished_run: Path) -> None:
    assert is_model_folder(write_folder(tmp_path / "model"))
    assert not is_model_folder(tmp_path)
    assert not is_model_folder(finished_run)
    assert not is_model_folder(finished_run / "checkpoints" / "step_00000008")
