from pathlib import Path

import pytest

from gpt.utils.helper import (
    first_line,
    format_count,
    format_duration,
    format_percent,
    format_si,
    plural,
    random_bits,
    sha256_of_file,
)


def test_random_bits_depend_on_every_part_of_the_address_and_its_place() -> None:
    addresses = [(seed, step, batch) for seed in range(10) for step in range(10) for batch in range(10)]
    assert len({random_bits(*address) for address in addresses}) == len(addresses)
    assert random_bits(1, 2) != random_bits(2, 1) != random_bits(2, 1, 0)


def test_random_bits_never_change_between_versions() -> None:
    """Check known values: a run that one version saved must resume in the same order with the next."""
    assert [random_bits(0), random_bits(1337, 5), random_bits(2**64 - 1, 3, 1)] == [
        16294208416658607535,
        18305536251264625655,
        7606371796534432975,
    ]


def test_random_bits_are_evenly_spread() -> None:
    bits = [bin(random_bits(7, index)).count("1") for index in range(4000)]
    assert abs(sum(bits) / len(bits) - 32) < 0.3


def test_sha256_of_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "f").startswith("ba7816bf8f01cfea")


def test_sha256_of_file_may_refuse_links(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "f")
    assert sha256_of_file(tmp_path / "link") == sha256_of_file(tmp_path / "f", follow_links=False)
    with pytest.raises(OSError, match="symbolic link"):
        sha256_of_file(tmp_path / "link", follow_links=False)


def test_numbers_are_formatted_for_people() -> None:
    assert [format_count(n) for n in (0.5, 999, 1234567, 2.5e9, 3e15)] == ["0.5", "999", "1.23 M", "2.5 B", "3,000 T"]
    assert [format_si(n, "B") for n in (0, 999, 1234567, 2.5e9)] == ["0 B", "999 B", "1.23 MB", "2.5 GB"]
    assert [format_percent(share) for share in (0.5284, 0.0005, 0.00032, 0.0)] == ["52.8%", "0.1%", "0.03%", "0%"]
    assert [plural(1, "file"), plural(2000, "file")] == ["1 file", "2,000 files"]


@pytest.mark.parametrize("power", range(5))
def test_number_that_rounds_up_to_1000_takes_the_next_prefix(power: int) -> None:
    assert format_si(999.6 * 1000**power, "B") == f"1 {'kMGTP'[power]}B"
    assert format_si(999.4 * 1000**power, "B") == f"999 {('', *'kMGT')[power]}B"


def test_durations_are_formatted_for_people() -> None:
    seconds = (0, 59.6, 69, 3600, 86399, 86400 * 51 + 7200)
    assert [format_duration(n) for n in seconds] == ["0:00:00", "0:01:00", "0:01:09", "1:00:00", "23:59:59", "51 d 2 h"]
    assert format_duration(float("inf")) == "unknown"


def test_first_line_is_that_of_the_message_or_the_type() -> None:
    assert first_line(ValueError("\n  one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
