"""Notes for the user about a prepared corpus: documents that nothing separates, characters without a token."""

from pathlib import Path

from gpt.configs.data_config import PreparationConfig
from gpt.data.end_of_text import find_rule_beside
from gpt.data.manifest import CorpusManifest
from gpt.data.tokenizer import Tokenizer
from gpt.utils.helper import plural


def list_notes(manifest: CorpusManifest) -> list[str]:
    """Return the notes about what a preparation could not do."""
    notes = []
    unseparated = [
        source.name
        for source in manifest.sources
        if max(sum(shard.documents for shard in split) for split in (source.train, source.val)) > 1
    ]
    if unseparated and "end_of_text" not in manifest.special_ids:
        notes.append(
            f"no token separates the documents of {', '.join(unseparated)}: the tokenizer has no special token whose "
            "name says so; name one with --data.end-of-text"
        )
    for source in manifest.sources:
        if source.unrepresented:
            notes.append(
                f"{source.name}: the tokenizer has no token for {plural(source.unrepresented, 'character')}, "
                f"first {source.first_unrepresented}; they are no part of bits per byte; "
                "use a tokenizer with all bytes (gpt2, bpe, byte) to keep them"
            )
    return notes


def compare_end_of_text(config: PreparationConfig, manifest: CorpusManifest, tokenizer: Tokenizer) -> str | None:
    """Return a note if a corpus in the cache has another end-of-text token than its tokenizer would get today."""
    path = Path(config.tokenizer)
    if config.end_of_text is not None or not path.is_file():
        return None
    index = tokenizer.find_end_of_text(find_rule_beside(path))
    if index in (None, tokenizer.end_of_text):
        return None
    name = tokenizer.name_token(index)
    return (
        f"the documents are separated as when they were prepared, by {manifest.special_ids or 'no token'}; "
        f"to prepare them again with {name}, add --data.end-of-text '{name}'"
    )
