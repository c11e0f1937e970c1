"""Remedies for files that are taken for a tokenizer.json, or that this version of the library cannot read."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

CONVERT = (
    "convert it: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OUT) of transformers writes a tokenizer.json"
)
CONVERT_TIKTOKEN = "convert_tiktoken_to_fast of transformers.integrations.tiktoken writes a tokenizer.json"
UPDATE = "pip install -U tokenizers"
OTHER_FILES = ("*.model", "*.tiktoken", "vocab.json", "encoder.json", "vocab.txt", "vocab.bpe", "merges.txt")
"""Names of files of tokenizers in other formats."""
PARTS_WITH_STEPS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}
"""Part of a tokenizer.json -> key of the steps in its Sequence."""
MODEL_TYPES = ("BPE", "Unigram", "WordPiece", "WordLevel")


def explain_missing_file(path: Path) -> str:
    """Return why a path that is no file cannot be used as a tokenizer, and the remedy."""
    if not path.is_dir():
        return "no such file; one of byte, char, bpe, gpt2, or a tokenizer.json"
    if (path / "tokenizer.json").is_file():
        return f"a folder; name the file in it: {path / 'tokenizer.json'}"
    others = sorted(file.name for pattern in OTHER_FILES for file in path.glob(pattern))
    if not others:
        return "a folder without a tokenizer.json; one of byte, char, bpe, gpt2, or the path of a tokenizer.json"
    remedy = CONVERT_TIKTOKEN if others[0].endswith(".tiktoken") else CONVERT
    return f"a folder with {others[0]} and no tokenizer.json; {remedy}"


def explain_unreadable_file(path: Path, error: Exception) -> str:
    """Return what a file is instead of a tokenizer.json, or what in it the library cannot read, and the remedy.

    Args:
        path: file that `tokenizers` refuses.
        error: exception of the library.
    """
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "its encoding is UTF-16; save it as UTF-8"
    if path.suffix == ".model" or (content.startswith(b"\n") and b"<unk>" in content[:64]):
        return f"a SentencePiece model; {CONVERT}"
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
        return f"ranks of tiktoken; {CONVERT_TIKTOKEN}"
    if content.startswith(b"#version"):
        return f"the merges alone; {CONVERT}"
    try:
        definition = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as problem:
        return f"not UTF-8 at byte {problem.start}; copy the file again"
    except ValueError as problem:
        is_list_of_tokens = path.suffix == ".txt" and not content.lstrip().startswith(b"{")
        return (
            f"a list of tokens; {CONVERT}" if is_list_of_tokens else f"not valid JSON: {problem}; copy the file again"
        )
    if not isinstance(definition, dict) or not isinstance(definition.get("model"), dict):
        return _explain_other_json(path, definition)
    culprits = ", ".join(_find_unknown_parts(definition))
    if culprits:
        return f"tokenizers {tokenizers.__version__} does not know its {culprits}; {UPDATE}"
    return f"{error}; if the file is no damaged copy, a newer version may read it: {UPDATE}"


def find_renumbered_token(definition: str, library: tokenizers.Tokenizer) -> str | None:
    """Return what the library changes in the ids of the added tokens; None if it keeps them.

    It gives an added token that is not in the vocabulary the next free id, whatever id the file says.
    """
    for token in json.loads(definition).get("added_tokens") or ():
        index = library.token_to_id(token["content"])
        if index != token["id"]:
            return (
                f"its added token {token['content']!r} has id {token['id']}, but the library gives it id {index}, "
                f"the next one of the vocabulary; set it to {index}, or add the tokens that are missing before it"
            )
    return None


def _explain_other_json(path: Path, content: Any) -> str:
    if isinstance(content, dict) and len(content) > 1 and all(isinstance(value, int) for value in content.values()):
        return f"a vocabulary alone; {CONVERT}"
    beside = path.with_name("tokenizer.json")
    remedy = f"name {beside}" if beside != path and beside.is_file() else "name the tokenizer.json of the model"
    return f"no 'model' in it; {remedy}"


def _find_unknown_parts(definition: dict[str, Any]) -> Iterator[str]:
    """Yield the parts that the library cannot read by themselves."""
    model = definition["model"]
    if model.get("type", MODEL_TYPES[0]) not in MODEL_TYPES:
        yield f"model {model['type']!r}"
    for part, steps_key in PARTS_WITH_STEPS.items():
        if isinstance(definition.get(part), dict):
            steps = definition[part].get(steps_key)
            for step in steps if isinstance(steps, list) else [definition[part]]:
                if not _is_known(part, step):
                    kind = step.get("type") if isinstance(step, dict) else step
                    yield f"{part} {kind!r} or one of its settings"


def _is_known(part: str, step: Any) -> bool:
    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    try:
        tokenizers.Tokenizer.from_str(json.dumps(empty | {part: step}))
    except Exception:  # the library raises bare Exceptions
        return False
    return True
