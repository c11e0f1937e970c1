import json
from pathlib import Path

import pytest

from gpt.configs.batch_plan import BatchPlan
from gpt.configs.data_config import DataConfig
from gpt.data.corpus import Corpus, build_sequences, open_corpus, prepare_corpus
from gpt.data.provenance import MAX_NAMED_DOCUMENTS, find_excerpts, name_documents
from gpt.data.sequences import TraceableSequences

BLOCK = 16
BATCH = BatchPlan(micro_batch_size=4, block_size=BLOCK, world_size=1, grad_accum_steps=1)


@pytest.fixture
def opened(tmp_path: Path) -> tuple[Corpus, TraceableSequences]:
    """Open documents of 11 bytes, so that every window has parts of several."""
    texts = [f"document {index:02d}" for index in range(40)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = DataConfig(source=str(tmp_path / "t.jsonl"), cache_dir=tmp_path / "cache", tokenizer="byte", workers=1)
    corpus = open_corpus(prepare_corpus(config), config, BLOCK)
    return corpus, build_sequences(corpus, config, BLOCK, seed=0)


def test_excerpts_hold_the_inputs_of_their_sequence(opened: tuple[Corpus, TraceableSequences]) -> None:
    corpus, sequences = opened
    for index in (0, 3, 1000):
        inputs = sequences.read(index * BATCH.sequences_per_step, BATCH.sequences_per_step).inputs
        for excerpts, row in zip(find_excerpts(corpus, sequences, BATCH, index), inputs, strict=True):
            assert [token for excerpt in excerpts for token in excerpt.read(BLOCK).tolist()] == row.tolist()
            assert all(excerpt.source == "t" and excerpt.offset == 0 for excerpt in excerpts[1:])


def test_first_documents_of_a_batch_are_named_in_one_line(opened: tuple[Corpus, TraceableSequences]) -> None:
    corpus, sequences = opened
    excerpts = [str(excerpt) for row in find_excerpts(corpus, sequences, BATCH, 5) for excerpt in row]
    n_more = len(excerpts) - MAX_NAMED_DOCUMENTS
    expected = "; ".join(excerpts[:MAX_NAMED_DOCUMENTS]) + f"; and {n_more} more, see gpt data-at"
    assert name_documents(corpus, sequences, BATCH, 5) == expected
    assert excerpts[0].startswith("t: train-000000.safetensors document ")
