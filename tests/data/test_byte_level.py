from gpt.data.byte_level import BYTE_TO_CHAR, bytes_to_chars, chars_to_bytes, derive_merges


def test_every_byte_has_its_own_printable_character() -> None:
    assert sorted(BYTE_TO_CHAR) == list(range(256))
    assert len(set(BYTE_TO_CHAR.values())) == 256
    assert all(char.isprintable() and not char.isspace() for char in BYTE_TO_CHAR.values())


def test_chars_to_bytes_inverts_bytes_to_chars() -> None:
    assert chars_to_bytes(bytes_to_chars(bytes(range(256)))) == bytes(range(256))
    assert bytes_to_chars(b" hello\n") == "\u0120hello\u010a"  # as in GPT-2's vocabulary


def test_derive_merges_finds_the_last_pair_that_lower_ranks_join() -> None:
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b"bc": 4, b"abc": 5}
    assert list(derive_merges(ranks)) == [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c")]
