from pathlib import Path

import pytest

from gpt.errors import UserError
from gpt.resume.journal import Journal, joined, quarantine_of, read_journal
from gpt.utils.distributed import DistContext


def filled(path: Path) -> Journal:
    journal = Journal(path, "order", [], DistContext("cpu"))
    journal.add_rollback({5: "spike", 7: "not finite"}, 3, "first")
    journal.add_rollback({5: "spike"}, 3, "second")
    return journal


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = filled(path)
    records = read_journal(path, "order")
    assert [record["quarantined"] for record in records] == [{"4": "spike", "6": "not finite"}, {"5": "spike"}]
    assert [record["to_step"] for record in records] == [3, 3]
    again = Journal(path, "order", records, DistContext("cpu"))
    assert again.rollbacks == journal.rollbacks == 2
    assert [again.quarantine.find_batch(step) for step in range(6)] == [0, 1, 2, 3, 7, 8]
    assert [journal.quarantine.find_batch(step) for step in range(6)] == [0, 1, 2, 3, 7, 8]


def test_no_file_is_an_empty_journal_and_a_torn_line_no_record(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert read_journal(path, "order") == []
    filled(path)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert len(read_journal(path, "order")) == 1


@pytest.mark.parametrize(
    "line",
    [
        "{", "[]", "{}", '{"order": "order", "quarantined": [1, 2]}', '{"order": "order", "quarantined": {"-1": ""}}',
        '{"order": "order", "quarantined": {"x": ""}}', '{"quarantined": {"1": ""}}', "[" * 100_000,
        '{"order": "order", "quarantined": {"99999999999999999999": ""}}', '{"order": "order", "quarantined": 1}',
    ],
)  # fmt: skip
def test_a_damaged_journal_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "journal.jsonl"
    filled(path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"journal\.jsonl, line 3: damaged"):
        read_journal(path, "order")
    path.write_bytes(b"\xff\n")
    with pytest.raises(UserError, match="not UTF-8 at byte 0"):
        read_journal(path, "order")


def test_a_journal_of_other_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    filled(path)
    with pytest.raises(UserError, match="line 1: of another order of batches"):
        read_journal(path, "another")


def test_a_journal_that_is_given_adds_what_was_not_trained_on_yet(tmp_path: Path) -> None:
    source = tmp_path / "journal.jsonl"
    filled(source)
    given = read_journal(source, "order")
    (record,) = joined([], given, source, "order", 0)
    assert record["quarantined"].keys() == {"4", "5", "6"}
    assert "to_step" not in record
    assert joined(given, given, source, "order", 100) == given
    assert quarantine_of(joined(given[:1], given, source, "order", 4)).find_batch(4) == 7
    with pytest.raises(UserError, match=r"batch 5 was trained on before step 5; name another --run-dir"):
        joined(given[:1], given, source, "order", 5)
