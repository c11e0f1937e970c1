"""Helpers that prepare a folder and read it back."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from gpt.configs.data_config import PreparationConfig
from gpt.data.manifest import CorpusManifest, read_corpus_manifest
from gpt.data.prepare.preparation import prepare_folder
from gpt.data.prepare.preparation_plan import plan_preparation
from gpt.data.tokenizer import Tokenizer


def prepare(out: Path, sources: Sequence[Path | str], **settings: Any) -> CorpusManifest:
    config = PreparationConfig(**{"tokenizer": "byte", "workers": 1, **settings})
    prepare_folder(out, plan_preparation([str(source) for source in sources], config), "--out")
    return read_corpus_manifest(out)


def decode_documents(folder: Path, role: str) -> list[str]:
    """Return every document of a prepared folder, decoded; pieces of one text joined."""
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    found: list[str] = []
    for entry in read_corpus_manifest(folder).sources:
        for shard in entry.train if role == "train" else entry.val:
            arrays = load_file(folder / shard.file)
            borders = arrays["document_offsets"].tolist()
            for number, (first, stop) in enumerate(pairwise(borders)):
                ids = arrays["tokens"][first:stop].tolist()
                continues = shard.continues and number == 0
                has_start = bool(ids) and ids[0] == tokenizer.end_of_text
                assert has_start == (not continues and tokenizer.end_of_text is not None)
                text = tokenizer.decode(ids[has_start:])
                if continues:
                    found[-1] += text
                else:
                    found.append(text)
    return found
