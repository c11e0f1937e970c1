from pathlib import Path

import pytest

from gpt.errors import UserError
from gpt.resume.journal import Journal, build_quarantine, merge_records, read_journal
from gpt.utils.distributed import DistContext


def write_journal(path: Path) -> Journal:
    journal = Journal(path, "order", [], DistContext("cpu"))
    journal.add_rollback({5: "spike", 7: "not finite"}, 3, "first")
    journal.add_rollback({5: "spike"}, 3, "second")
    return journal


def test_written_records_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = write_journal(path)
    records = read_journal(path, "order")
    assert [record["quarantined"] for record in records] == [{"4": "spike", "6": "not finite"}, {"5": "spike"}]
    assert [record["to_step"] for record in records] == [3, 3]
    again = Journal(path, "order", records, DistContext("cpu"))
    assert again.rollbacks == journal.rollbacks == 2
    assert [again.quarantine.find_batch(step) for step in range(6)] == [0, 1, 2, 3, 7, 8]
    assert [journal.quarantine.find_batch(step) for step in range(6)] == [0, 1, 2, 3, 7, 8]


def test_missing_file_is_an_empty_journal_and_a_torn_line_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert read_journal(path, "order") == []
    write_journal(path)
    complete = path.read_bytes()
    first = complete.index(b"\n") + 1
    for end in range(first, len(complete) - 1):
        path.write_bytes(complete[:end])
        assert len(read_journal(path, "order")) == 1


@pytest.mark.parametrize(
    "line",
    [
        "{", "[]", "{}", '{"order": "order", "quarantined": [1, 2]}', '{"order": "order", "quarantined": {"-1": ""}}',
        '{"order": "order", "quarantined": {"x": ""}}', '{"quarantined": {"1": ""}}', "[" * 100_000,
        '{"order": "order", "quarantined": {"99999999999999999999": ""}}', '{"order": "order", "quarantined": 1}',
    ],
)  # fmt: skip
def test_damaged_journal_is_refused_with_file_and_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "journal.jsonl"
    write_journal(path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"journal\.jsonl, line 3: damaged"):
        read_journal(path, "order")
    path.write_bytes(b"\xff\n")
    with pytest.raises(UserError, match="not UTF-8 at byte 0"):
        read_journal(path, "order")


def test_journal_of_other_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write_journal(path)
    with pytest.raises(UserError, match="line 1: written for other batches"):
        read_journal(path, "another")


def test_given_journal_adds_batches_that_were_not_trained_on(tmp_path: Path) -> None:
    source = tmp_path / "journal.jsonl"
    write_journal(source)
    given = read_journal(source, "order")
    (record,) = merge_records([], given, source, "order", step=0)
    assert record["quarantined"].keys() == {"4", "5", "6"}
    assert "to_step" not in record
    assert merge_records(given, given, source, "order", step=100) == given
    assert build_quarantine(merge_records(given[:1], given, source, "order", step=4)).find_batch(4) == 7
    with pytest.raises(UserError, match=r"batch 5 was trained on before step 5; use another --run-dir"):
        merge_records(given[:1], given, source, "order", step=5)
