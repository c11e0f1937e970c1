import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt.checkpoint.manifest import verify
from gpt.configs.batch_plan import plan_batch
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.load import load_config
from gpt.configs.train_config import TrainConfig
from gpt.data.chat_template import find_chat_template
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.inference.load import load_for_inference
from gpt.interop.imported_run import download_model, import_into_cache, import_model
from gpt.interop.model_folder import open_model_folder, write_model_folder
from gpt.pipeline import build_trainer
from gpt.run import open_run
from tests.conftest import limit_file_size
from tests.data.chat_templates import build_chat_template, build_chat_tokenizer
from tests.interop.families import make_model, make_tokenizer, write_folder

Tiny = Callable[..., TrainConfig]


def test_an_imported_run_is_loaded_like_any_other(tmp_path: Path) -> None:
    source = open_model_folder(write_folder(tmp_path / "model", "qwen3"))
    checkpoint = import_model(source, tmp_path / "run")
    verify(checkpoint)
    loaded = load_for_inference(tmp_path / "run", "cpu", "float32")
    assert loaded.tokenizer.sha256 == make_tokenizer().sha256
    assert all(
        torch.equal(loaded.model.state_dict()[name], value) for name, value in make_model("qwen3").state_dict().items()
    )
    assert load_config(tmp_path / "run" / "config.json").run_dir == tmp_path / "run"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_shorter_context_gives_the_same_logits(tmp_path: Path, name: str) -> None:
    source = open_model_folder(write_folder(tmp_path / "model", name))
    import_model(source, tmp_path / "run", block_size=12)
    model = load_for_inference(tmp_path / "run", "cpu", "float32").model
    assert model.config.block_size == 12
    plan_batch(load_config(tmp_path / "run" / "config.json").model_copy(update={"micro_batch_size": 1}), world_size=1)
    tokens = torch.arange(12)[None]
    assert torch.equal(model(tokens), make_model(name)(tokens))


def test_a_longer_context_is_an_error(tmp_path: Path) -> None:
    source = open_model_folder(write_folder(tmp_path / "model"))
    with pytest.raises(UserError, match=r"--block-size 41 is longer than the context of .*, 40 tokens \(nearest: 40\)"):
        import_model(source, tmp_path / "run", block_size=41)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    source = open_model_folder(write_folder(tmp_path / "model"))
    with limit_file_size(100_000), pytest.raises(OSError, match="File too large") as caught:
        import_model(source, tmp_path / "run")
    assert caught.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_is_imported_into_the_cache_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    checkpoint = import_into_cache(str(folder), tmp_path / "cache")
    assert checkpoint is not None
    written = (checkpoint / "manifest.json").stat().st_mtime_ns
    assert import_into_cache(str(folder), tmp_path / "cache") == checkpoint
    assert (checkpoint / "manifest.json").stat().st_mtime_ns == written


def fine_tune(tiny: Tiny, run_dir: Path, folder: Path, **model: object) -> torch.Tensor:
    """Train a step from a model folder, and return the embedding."""
    changes = open_model_folder(folder).config.model_dump() | model
    config = tiny(
        run_dir,
        model=GPTConfig.model_validate(changes).model_dump(),
        init_from=folder,
        max_steps=1,
        data={"tokenizer": str(folder / "tokenizer.json")},
    )
    with open_run(config) as run:
        assert run.start.init_from is not None
        trainer = build_trainer(run)
        trainer.train()
        return trainer.model.state_dict()["wte.weight"]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_run_starts_from_a_model_folder_with_a_shorter_context(tiny: Tiny, tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "model", name)
    embedding = fine_tune(tiny, tmp_path / "run", folder, block_size=32)
    assert (embedding - make_model(name).wte.weight).abs().max() < 0.02  # a step of Adam with lr 1e-2 / 2
    assert Tokenizer.from_folder(tmp_path / "run").sha256 == make_tokenizer().sha256


def test_another_tokenizer_is_an_error(tiny: Tiny, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    model = open_model_folder(folder).config.model_dump() | {"block_size": 32}
    with pytest.raises(UserError, match=r"another tokenizer; add --data.tokenizer .*tokenizer.json"):
        open_run(tiny(tmp_path / "run", model=model, init_from=folder))


def test_a_longer_context_than_the_weights_have_is_an_error(tiny: Tiny, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    with pytest.raises(UserError, match=r"another architecture: --model.block-size is 40 there and 64 in this command"):
        fine_tune(tiny, tmp_path / "run", folder, block_size=64)


def test_without_a_network_a_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=r"hf:a/b cannot be downloaded \(ConnectionError: no route to host\)"):
        download_model("hf:a/b")


def test_chat_template_is_kept_through_import_fine_tuning_and_export(tiny: Tiny, tmp_path: Path) -> None:
    folder, template = write_folder(tmp_path / "model"), build_chat_template()
    (folder / "tokenizer.json").write_text(build_chat_tokenizer().definition)
    settings = {"chat_template": template.source, **template.special_tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    import_model(open_model_folder(folder), tmp_path / "run")
    fine_tune(tiny, tmp_path / "tuned", folder, block_size=32)
    for number, run_dir in enumerate((tmp_path / "run", tmp_path / "tuned")):
        loaded = load_for_inference(run_dir, "cpu", "float32")
        assert loaded.chat_template == template
        out = tmp_path / f"out-{number}"
        out.mkdir()
        model, tokenizer = loaded.model, loaded.tokenizer
        write_model_folder(
            out, model.state_dict(), model.config, tokenizer, dtype=torch.float32, chat_template=loaded.chat_template
        )
        assert open_model_folder(out).chat_template == template
        assert open_model_folder(out).tokenizer.end_of_text == tokenizer.end_of_text


def test_fork_of_a_run_keeps_its_chat_template(tiny: Tiny, tmp_path: Path, finished_run: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(finished_run, source)
    build_chat_template().save(source)
    checkpoint = source / "checkpoints" / "step_00000004"
    with open_run(tiny(tmp_path / "fork", resume=str(checkpoint))) as run:
        build_trainer(run).train()
    assert find_chat_template(tmp_path / "fork") == build_chat_template()


def test_downloaded_model_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "qwen3")
    (folder / "README.md").write_text("not needed")
    asked = list[str]()

    def download(name: str, allow_patterns: list[str]) -> str:
        """Return the folder with the files that match, as the hub's client does."""
        asked.append(name)
        for file in folder.iterdir():
            if not any(file.match(pattern) for pattern in allow_patterns):
                file.unlink()
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    import_model(open_model_folder(download_model("hf:some/model")), tmp_path / "run")
    assert asked == ["some/model"]
    assert not (folder / "README.md").exists()
    assert load_for_inference(tmp_path / "run", "cpu", "float32").tokenizer.sha256 == make_tokenizer().sha256
