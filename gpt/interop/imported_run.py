"""Write a model from elsewhere as a run folder with one checkpoint, of step 0."""

import hashlib
import json
from pathlib import Path

from gpt.checkpoint.run_folder import RunFolder
from gpt.checkpoint.store import Snapshot, write_checkpoint
from gpt.configs.checkpoint_config import CheckpointConfig
from gpt.configs.data_config import HUB_PREFIX, DataConfig
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.lr_config import LRConfig
from gpt.configs.observer_config import EvalConfig, TextSampleConfig
from gpt.configs.optimizer_config import OptimizerConfig
from gpt.configs.run_plan import TOKENIZER_KEY
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError
from gpt.interop.model_folder import ModelFolder, is_model_folder, open_model_folder
from gpt.models.gpt import shorten_context
from gpt.utils.atomic_io import commit_folder, make_folder, write_text
from gpt.utils.helper import first_line

DOWNLOADED = ("*.json", "*.jinja", "*.safetensors", "pytorch_model*.bin")
"""Patterns of the files of a model on the hub that are read."""
FINE_TUNING_LR = 3e-5
"""Highest learning rate in the config.json of an imported model; nanoGPT fine-tunes GPT-2 with it."""
FINE_TUNING_SEQUENCES = 8
"""Sequences per step in that config.json."""


def download_model(source: str) -> Path:
    """Return the folder that a source names; `hf:NAME` is downloaded into the Hugging Face cache.

    Raises:
        UserError: there is no network, or no such model.
    """
    if not source.startswith(HUB_PREFIX):
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source.removeprefix(HUB_PREFIX), allow_patterns=list(DOWNLOADED)))
    except Exception as error:  # its HTTP client raises exceptions of many kinds
        raise UserError(
            f"{source} cannot be downloaded ({type(error).__name__}: {first_line(error)}); download it elsewhere and "
            "name its folder"
        ) from error


def import_model(source: ModelFolder, out: Path, *, block_size: int = 0) -> Path:
    """Commit a model as the run folder `out`, and return its checkpoint.

    Args:
        source: the model.
        out: folder that does not exist.
        block_size: longest context in tokens; 0: the model's.

    Raises:
        UserError: the weights are damaged or not those of the configuration, or `block_size` exceeds the model's.
        OSError: the disk refused; nothing is left of the attempt.
    """
    model = source.config
    if block_size > model.block_size:
        raise UserError(
            f"--block-size {block_size} is longer than the context of {source.path}, {model.block_size} tokens "
            f"(nearest: {model.block_size})"
        )
    model = model.with_(block_size=block_size or model.block_size)
    weights = shorten_context(source.read_weights(), model.block_size)
    config_json = build_recipe(out, model).saved_json()
    progress = {
        "step": 0,
        "tokens": 0,
        "skipped_updates": 0,
        "scaler": {},
        "identity": {TOKENIZER_KEY: source.tokenizer.sha256},
    }
    make_folder(out.absolute().parent)
    with commit_folder(out) as folder:
        run = RunFolder(folder)
        source.tokenizer.save(folder)
        if source.chat_template is not None:
            source.chat_template.save(folder)
        write_text(run.config, config_json + "\n")
        write_checkpoint(run.checkpoint_path(0), Snapshot(weights, {}, progress, {}, 1), config_json)
    return RunFolder(out).checkpoint_path(0)


def import_into_cache(source: str, cache_dir: Path) -> Path | None:
    """Return the checkpoint of a model, imported into the cache unless it is there already.

    Args:
        source: the value of --init-from: a path, or hf:NAME.
        cache_dir: folder of the cache.

    Returns:
        None if the source is no folder in Hugging Face's format.

    Raises:
        UserError: the model cannot be downloaded or imported.
    """
    folder = download_model(source)
    if not is_model_folder(folder):
        return None
    model = open_model_folder(folder)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps([str(folder.resolve()), states]).encode()).hexdigest()[:20]
    run = RunFolder(cache_dir / f"{key}-imported")
    if run.config.is_file():
        return run.checkpoint_path(0)
    return import_model(model, run.path)


def build_recipe(run_dir: Path, model: GPTConfig) -> TrainConfig:
    """Return a configuration that fine-tunes a model, with the tokenizer that is saved beside it."""
    return TrainConfig(
        run_dir=run_dir,
        micro_batch_size="auto",
        tokens_per_step=FINE_TUNING_SEQUENCES * model.block_size,
        model=model,
        data=DataConfig(tokenizer=str(RunFolder(run_dir.absolute()).tokenizer)),
        lr=LRConfig(schedule="cosine", max_lr=FINE_TUNING_LR),
        optimizer=OptimizerConfig(),
        eval=EvalConfig(),
        checkpoint=CheckpointConfig(),
        sample=TextSampleConfig(),
    )
