import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt.configs.data_config import DataConfig
from gpt.data.corpus import prepare_corpus
from gpt.data.manifest import CORPUS_FORMAT_VERSION, CORPUS_MANIFEST, read_corpus_manifest
from gpt.errors import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("manifest")
    (root / "t.txt").write_text("some text " * 50)
    return prepare_corpus(DataConfig(source=str(root / "t.txt"), cache_dir=root / "c", tokenizer="byte"))[0]


@pytest.fixture
def path(prepared: Path, tmp_path: Path) -> Path:
    """Copy the manifest, to damage it."""
    (tmp_path / CORPUS_MANIFEST).write_bytes((prepared / CORPUS_MANIFEST).read_bytes())
    return tmp_path / CORPUS_MANIFEST


def test_manifest_describes_the_folder(prepared: Path) -> None:
    manifest = read_corpus_manifest(prepared)
    assert (manifest.documents, manifest.tokens, manifest.text_bytes) == (2, 502, 500)
    assert (manifest.vocab_size, manifest.special_ids, manifest.dtype) == (257, {"end_of_text": 256}, "uint16")
    assert manifest.largest_id == 256
    assert [shard.file for source in manifest.sources for shard in (*source.train, *source.val)] == [
        "train-000000.safetensors",
        "val-000000.safetensors",
    ]


def test_manifest_round_trips(prepared: Path, tmp_path: Path) -> None:
    manifest = read_corpus_manifest(prepared)
    manifest.write(tmp_path)
    assert (tmp_path / CORPUS_MANIFEST).read_bytes() == (prepared / CORPUS_MANIFEST).read_bytes()
    assert read_corpus_manifest(tmp_path) == manifest
    assert json.loads((prepared / CORPUS_MANIFEST).read_text())["sha256"] == manifest.sha256


@pytest.mark.parametrize(
    "content", ["", "{", "{}", "[]", "5", '{"splits": {"train": [{}]}}', "[" * 100_000, '{"sha256": 5}', "\xff"]
)
def test_damaged_manifest_names_the_folder_to_delete(tmp_path: Path, content: str) -> None:
    (tmp_path / CORPUS_MANIFEST).write_text(content, encoding="latin-1")
    with pytest.raises(
        UserError, match=r"corpus.json: (damaged: .*|format None, .*); delete the folder and prepare it"
    ):
        read_corpus_manifest(tmp_path)


def test_changed_bytes_are_detected(path: Path) -> None:
    original = path.read_bytes()
    for place in range(0, len(original), 3):
        changed = bytearray(original)
        changed[place] ^= 1 << (place % 7)
        path.write_bytes(changed)
        with pytest.raises(UserError, match=rf"{path}: (damaged|format)"):
            read_corpus_manifest(path.parent)


def list_paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in nested lists and dicts."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, inner in items for found in list_paths(inner, (*path, key)))][bool(not path) :]


def test_changed_fields_are_detected(path: Path) -> None:
    original = json.loads(path.read_text())
    for place in list_paths(original):
        changed = json.loads(json.dumps(original))
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        value = inner[place[-1]]
        inner[place[-1]] = value + 1 if type(value) in (int, float) else f"{value}x"
        path.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=rf"{path}: (damaged|format)"):
            read_corpus_manifest(path.parent)
        del inner[place[-1]]
        path.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=rf"{path}: (damaged|format)"):
            read_corpus_manifest(path.parent)


def reseal_with(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and give it the digest that it should have then."""
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    text = json.dumps(content, indent=2).removesuffix("\n}")
    path.write_text(f'{text},\n  "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n')


@pytest.mark.parametrize(
    "name",
    ["../train-000000.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b.safetensors", "x.safetensors\n"],
)
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_shard_outside_the_folder_is_refused(path: Path, name: str) -> None:
    reseal_with(path, lambda content: content["sources"][0]["train"][0].update(file=name))
    with pytest.raises(UserError, match=rf"{path}: damaged; delete the folder and prepare it again"):
        read_corpus_manifest(path.parent)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_matching_digest_is_accepted(path: Path) -> None:
    reseal_with(path, lambda content: content["sources"][0].update(name="other"))
    assert read_corpus_manifest(path.parent).sources[0].name == "other"


def test_key_after_the_digest_is_refused(path: Path) -> None:
    path.write_text(path.read_text().replace("\n}\n", ',\n  "tokens": 7\n}\n'))
    with pytest.raises(UserError, match=rf"{path}: damaged"):
        read_corpus_manifest(path.parent)


def test_other_format_version_is_named(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 1}))
    with pytest.raises(
        UserError, match=rf"{path}: format 1, but this version reads format {CORPUS_FORMAT_VERSION}; delete the folder"
    ):
        read_corpus_manifest(path.parent)


def test_folder_without_a_manifest_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path}: no prepared corpus here"):
        read_corpus_manifest(tmp_path)
    with pytest.raises(UserError, match=r"none: no prepared corpus here"):
        read_corpus_manifest(tmp_path / "none")
    (tmp_path / CORPUS_MANIFEST).mkdir()
    with pytest.raises(UserError, match=r"corpus.json: cannot be read: Is a directory"):
        read_corpus_manifest(tmp_path)
