"""Tokenizers that are learned from the corpus: char from all of it, bpe from a sample of its training texts."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gpt.data.prepare.compression import is_compressed
from gpt.data.prepare.documents import Document, TextDocument
from gpt.data.prepare.parts import Part
from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_builders import build_char_tokenizer, train_bpe_tokenizer
from gpt.utils.progress import progress_bar

SAMPLE_BYTES = 2**26
"""Bytes of text that bpe is trained on: all of a small corpus, a sample from all over a large one."""
MIN_SAMPLE_BYTES_PER_PART = 2**20

LEARNED_KINDS = ("char", "bpe")

ReadSplits = Callable[[Part], Iterator[tuple[list[Document], list[Document]]]]
"""Reads the (training, validation) documents of a part, some at a time."""


def learn_char_tokenizer(parts: Sequence[Part], read_splits: ReadSplits) -> Tokenizer | None:
    """Return a tokenizer of all characters of the corpus, or None if it has none.

    It has an end-of-text token if either split has several documents to separate.
    """
    characters: set[str] = set()
    n_documents = [0, 0]
    with progress_bar("finding the characters", total=sum(part.size for part in parts)) as advance:
        for part in parts:
            for splits in read_splits(part):
                for index, documents in enumerate(splits):
                    n_documents[index] += 0 if part.continues else len(documents)
                    for document in documents:
                        assert isinstance(document, TextDocument)
                        characters.update(document.text)
                        advance(document.size, 0)
    return build_char_tokenizer(characters, has_documents=max(n_documents) > 1) if characters else None


def learn_bpe_tokenizer(parts: Sequence[Part], read_splits: ReadSplits, vocab_size: int) -> Tokenizer:
    """Train bpe on the training texts of the corpus, or on a sample of them."""
    total = min(SAMPLE_BYTES, sum(part.size for part in parts))
    with progress_bar("learning the tokenizer", total) as advance:

        def texts() -> Iterator[str]:
            for text in sample_training_texts(parts, read_splits):
                yield text
                advance(len(text), 0)

        return train_bpe_tokenizer(texts(), vocab_size)


def sample_training_texts(parts: Sequence[Part], read_splits: ReadSplits) -> Iterator[str]:
    """Yield all training texts, or the first texts of evenly spaced parts, together about SAMPLE_BYTES."""
    parts = [part for part in parts if part.role != "val"]
    part_bytes = max(MIN_SAMPLE_BYTES_PER_PART, SAMPLE_BYTES // max(1, len(parts)))
    sampled = parts[:: max(1, -(-len(parts) * part_bytes // SAMPLE_BYTES))]
    take_all = sum(part.size for part in parts) <= SAMPLE_BYTES and all(map(_has_known_size, parts))
    for part in sampled:
        texts = (document for train, _ in read_splits(part) for document in train)
        taken = 0
        for document in texts:
            assert isinstance(document, TextDocument)
            taken += document.size
            yield document.text if take_all else document.text[:part_bytes]
            if taken >= part_bytes and not take_all:
                break


def _has_known_size(part: Part) -> bool:
    """Return whether the part's size is the size of its texts."""
    return part.size > 0 and not any(is_compressed(Path(path)) for _, path in part.files)
