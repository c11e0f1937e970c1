import numpy as np

from gpt.data.synthetic import DOCUMENTS_PER_ROW, SyntheticTokens


def test_rows_are_like_those_of_a_text() -> None:
    rows = SyntheticTokens(50, 16, masked=True).read(3, 100)
    assert rows.inputs.shape == rows.targets.shape == (100, 16)
    assert (rows.inputs[:, 1:] == rows.targets[:, :-1]).all()
    assert (rows.inputs.min(), rows.inputs.max()) == (0, 49)
    assert rows.documents is not None
    assert (np.diff(rows.documents) >= 0).all()
    assert set(rows.documents[0].tolist()) == set(range(DOCUMENTS_PER_ROW))


def test_the_position_decides_and_documents_are_told_apart_only_where_asked() -> None:
    tokens = SyntheticTokens(50, 16, masked=False)
    assert (tokens.read(3, 2).inputs == tokens.read(3, 2).inputs).all()
    assert (tokens.read(3, 2).inputs != tokens.read(5, 2).inputs).any()
    assert tokens.read(3, 2).documents is None
    assert tokens.count_targets(0, 4) == 64
