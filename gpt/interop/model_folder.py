"""Model folders in Hugging Face's format: config.json, tokenizer.json, and weights in one or several files."""

import json
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt.checkpoint.tensor_file import read_tensors, write_tensors
from gpt.configs.gpt_config import GPTConfig
from gpt.data.chat_template import CHAT_TEMPLATE_FILE, ChatTemplate, find_chat_template
from gpt.data.end_of_text import TOKENIZER_SETTINGS_FILE, find_rule_beside
from gpt.data.tokenizer import TOKENIZER_FILE, Tokenizer
from gpt.data.tokenizer_files import CONVERT
from gpt.errors import UserError
from gpt.interop.families import Family, find_families, require_family
from gpt.interop.hf_config import describe_config, parse_config
from gpt.interop.huggingface import Tensors, export_tensors, import_tensors
from gpt.utils.atomic_io import read_json, write_json, write_text
from gpt.utils.helper import first_line

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHT_FILES = (SAFETENSORS_INDEX, SAFETENSORS, "pytorch_model.bin.index.json", "pytorch_model.bin")
"""Files that hold or list the weights; the first that exists is read."""
MAX_SHARD_BYTES = 5_000_000_000
"""Bytes of tensors in one file; transformers' own limit."""
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Regular expression that cuts text into words in the tokenizer.json of Qwen 2 and Qwen 3."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ModelFolder:
    """A model folder whose configuration and tokenizer are read and checked, and whose weights are not read yet."""

    path: Path
    config: GPTConfig
    """Resolved."""
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None

    def read_weights(self) -> Tensors:
        """Return the weights under our names and in our layout, float32.

        Raises:
            UserError: a file is missing or damaged, or the tensors are not those that config.json describes.
        """
        theirs: Tensors = {}
        for file in list_weight_files(self.path):
            theirs |= _read_weight_file(file)
        others = [name for name, tensor in theirs.items() if tensor.dtype not in FLOATS]
        if others:
            raise UserError(
                f"{self.path}: {others[0]} is {theirs[others[0]].dtype}, not float32, bfloat16 or float16; use the "
                "weights before they were quantized"
            )
        try:
            ours = import_tensors(theirs, self.config)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error
        return {name: tensor.float() for name, tensor in ours.items()}


def is_model_folder(path: Path) -> bool:
    """Return whether a folder holds a model in Hugging Face's format, and not a run or a checkpoint."""
    if not (path / CONFIG).is_file():
        return False
    return _is_foreign(read_json(path / CONFIG))


def _is_foreign(config_json: Mapping[str, Any]) -> bool:
    """Return whether a config.json is that of a model in Hugging Face's format, and not that of a run."""
    return "model_type" in config_json or not {"run_dir", "model"} <= config_json.keys()


def open_model_folder(path: Path) -> ModelFolder:
    """Read and check configuration and tokenizer of a model folder.

    Raises:
        UserError: one of them is missing, damaged or not supported, or their sizes disagree.
    """
    config = read_model_config(path)
    tokenizer = _read_tokenizer(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{path}: tokenizer.json has {tokenizer.vocab_size:,} tokens, but the embedding of config.json has "
            f"{config.vocab_size:,} rows (vocab_size); use the tokenizer of this model"
        )
    list_weight_files(path)
    return ModelFolder(path, config, tokenizer, find_chat_template(path))


def read_model_config(path: Path) -> GPTConfig:
    """Return the resolved configuration in a model folder.

    Raises:
        UserError: it is missing, damaged or not supported.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name a folder with config.json, tokenizer.json and model.safetensors")
    if not (path / CONFIG).is_file():
        raise UserError(f"{path}: no config.json; name the folder of a model in Hugging Face's format")
    content = read_json(path / CONFIG)
    if not _is_foreign(content):
        raise UserError(
            f"{path}: a run or a checkpoint of this program; it needs no import, --init-from takes it as it is"
        )
    try:
        return parse_config(content)
    except UserError as error:
        raise UserError(f"{path / CONFIG}: {error}") from error


def list_weight_files(path: Path) -> list[Path]:
    """Return the files that hold the weights: the one, or those that the index names.

    Raises:
        UserError: there is none, the index is damaged, or it names a file that is missing or outside the folder.
    """
    first = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if first is None:
        raise UserError(f"{path}: no {SAFETENSORS} or pytorch_model.bin, whole or with an index; download them as well")
    if not first.name.endswith(".index.json"):
        return [first]
    names = read_json(first).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{first}: no weight_map in it; download it again")
    files = sorted({str(name) for name in names.values()})
    for name in files:
        if Path(name).name != name or not (path / name).is_file():
            raise UserError(f"{first}: it names {name!r:.80}, which is not a file of this folder; download it again")
    return [path / name for name in files]


def choose_family(config: GPTConfig, tokenizer: Tokenizer) -> Family:
    """Return the class to export a model to.

    Transformers 5 cuts the text of every qwen2 model into words as Qwen's tokenizer does, whatever tokenizer.json says
    (MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS in its tokenization_auto.py). With another tokenizer such a model is
    a Llama, whose output projection has a bias of 0.

    Raises:
        UserError: no class of transformers has this configuration and this tokenizer.
    """
    families = [require_family(config), *find_families(config)[1:]]
    if families[0].model_type != "qwen2" or _is_qwen_tokenizer(tokenizer):
        return families[0]
    if len(families) == 1:
        raise UserError(
            "no class of transformers has --model.qkv-bias true, --model.sliding-window and another tokenizer than "
            "Qwen's; nearest: LlamaForCausalLM, with --model.sliding-window 0"
        )
    return families[1]


def _is_qwen_tokenizer(tokenizer: Tokenizer) -> bool:
    definition = json.loads(tokenizer.definition)
    steps = (definition.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
    is_nfc = (definition.get("normalizer") or {}).get("type") == "NFC"
    return is_nfc and steps[0].get("pattern") == {"Regex": QWEN_PATTERN}


def write_model_folder(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    config: GPTConfig,
    tokenizer: Tokenizer,
    *,
    dtype: torch.dtype,
    chat_template: ChatTemplate | None = None,
) -> None:
    """Write configuration, weights and tokenizer into an empty folder.

    Args:
        folder: the folder.
        weights: state dict of a GPT.
        config: its resolved configuration.
        tokenizer: its tokenizer.
        dtype: dtype of the weights in the files.
        chat_template: its chat template.

    Raises:
        UserError: no class of transformers has this configuration.
        OSError: the disk refused.
    """
    family = choose_family(config, tokenizer)
    tensors = {name: tensor.to(dtype) for name, tensor in export_tensors(weights, config, family).items()}
    content = describe_config(config, family, end_of_text=tokenizer.end_of_text)
    write_json(folder / CONFIG, content | {"torch_dtype": str(dtype).removeprefix("torch.")})
    write_json(folder / GENERATION_CONFIG, _describe_generation(config, tokenizer))
    write_text(folder / TOKENIZER_FILE, tokenizer.definition)
    write_json(folder / TOKENIZER_SETTINGS_FILE, _describe_tokenizer(config, tokenizer, chat_template))
    if chat_template is not None:
        write_text(folder / CHAT_TEMPLATE_FILE, chat_template.source)
    _write_weights(folder, tensors)


def _describe_generation(config: GPTConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return generation_config.json; ids without a token, which pad the embedding, are never generated."""
    padding = list(range(tokenizer.vocab_size, config.vocab_size))
    token = tokenizer.end_of_text
    ids = {} if token is None else dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), token)
    return ids | ({"suppress_tokens": padding} if padding else {})


def _describe_tokenizer(config: GPTConfig, tokenizer: Tokenizer, chat_template: ChatTemplate | None) -> dict[str, Any]:
    """Return tokenizer_config.json; the special tokens of a chat template go before those of this program."""
    token = tokenizer.end_of_text
    name = None if token is None else tokenizer.name_token(token)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name,
        "eos_token": name,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.block_size,
        **({} if chat_template is None else chat_template.special_tokens),
    }


def _write_weights(folder: Path, tensors: Tensors) -> None:
    """Write model.safetensors, or files of at most MAX_SHARD_BYTES and their index."""
    shards = list(_split_into_shards(tensors))
    if len(shards) == 1:
        write_tensors(folder / SAFETENSORS, tensors, {"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, {name: tensors[name] for name in names}, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / SAFETENSORS_INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _split_into_shards(tensors: Tensors) -> Iterator[list[str]]:
    """Yield the names of each file's tensors, in order; a tensor larger than MAX_SHARD_BYTES has a file of its own."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > MAX_SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def _read_weight_file(file: Path) -> Tensors:
    """Return the tensors in a file.

    Raises:
        UserError: it is damaged, or a pickle that holds anything but tensors.
    """
    if file.suffix == ".safetensors":
        return read_tensors(file)
    try:
        with warnings.catch_warnings(action="ignore"):  # it warns of pickles that it refuses next
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: cannot be read: {first_line(error)}; download it again") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file}: not a file of tensors alone, and code in it is never run; use model.safetensors"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{file}: not a table of tensors; use the state dict of the model")
    return dict(content)


def _read_tokenizer(path: Path) -> Tokenizer:
    file = path / TOKENIZER_FILE
    if not file.is_file():
        raise UserError(f"{path}: no tokenizer.json; {CONVERT}")
    tokenizer = Tokenizer.from_file(file, find_rule_beside(file))
    renumbered = tokenizer.find_renumbered_token()
    if renumbered is not None:
        raise UserError(f"{file}: {renumbered}")
    return tokenizer
