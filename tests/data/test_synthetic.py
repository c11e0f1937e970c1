import numpy as np

from gpt.data.synthetic import DOCUMENTS_PER_SEQUENCE, SyntheticTokens


def test_synthetic_sequences_have_the_shape_of_text() -> None:
    rows = SyntheticTokens(50, 16, document_mask=True).read(3, 100)
    assert rows.inputs.shape == rows.targets.shape == (100, 16)
    assert (rows.inputs[:, 1:] == rows.targets[:, :-1]).all()
    assert (rows.inputs.min(), rows.inputs.max()) == (0, 49)
    assert rows.documents is not None
    assert (np.diff(rows.documents) >= 0).all()
    assert set(rows.documents[0].tolist()) == set(range(DOCUMENTS_PER_SEQUENCE))


def test_position_decides_the_tokens_and_documents_need_a_document_mask() -> None:
    tokens = SyntheticTokens(50, 16, document_mask=False)
    assert (tokens.read(3, 2).inputs == tokens.read(3, 2).inputs).all()
    assert (tokens.read(3, 2).inputs != tokens.read(5, 2).inputs).any()
    assert tokens.read(3, 2).documents is None
    assert tokens.count_targets(0, 4) == 64
