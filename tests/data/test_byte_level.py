from gpt.data.byte_level import (
    BYTE_TO_CHAR,
    bytes_to_chars,
    chars_to_bytes,
    derive_merges,
    list_all_merges,
    list_ambiguous_words,
)


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


def test_all_merges_are_ordered_by_the_ranks_of_the_token_and_its_parts() -> None:
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4, b"abc": 5}
    assert list(list_all_merges(ranks)) == [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc"), (b"ab", b"c")]


def test_ambiguous_words_hold_one_token_at_two_places_that_overlap() -> None:
    ranks = {b"a": 0, b"b": 1, b"ab": 2, b"ba": 3, b"aba": 4, b"aa": 5}
    assert list(list_ambiguous_words(list_all_merges(ranks))) == [b"aaa", b"ababa"]
