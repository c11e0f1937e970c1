"""Records -> documents: the text field of a record, and the treatment of bad records and files."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike

from gpt.data.prepare.documents import TextDocument
from gpt.errors import UserError
from gpt.utils.helper import first_line, printable

MAX_PATH_LETTERS = 140
"""Letters of a path in a message."""
MAX_REASON_LETTERS = 100
"""Letters of a reason in a message, such as a library's."""
MAX_LEFT_OUT_LETTERS = 60
"""Letters of the path of a file that is left out, in a list of several."""
MAX_NAME_LETTERS = 18
"""Letters of a key in a message."""
MAX_NAMED = 5
"""Keys that a message names."""
MAX_REASONS = 3
"""Bad records whose messages are kept."""


class BadFileError(UserError):
    """Error about a single file, which `--data.on-error skip` leaves out.

    Args:
        message: one line.
        is_foreign: the file has a format of another project; a folder leaves it out.
    """

    def __init__(self, message: str, *, is_foreign: bool = False):
        super().__init__(message)
        self.is_foreign = is_foreign


class Records:
    """The text field of records, and the treatment of bad ones.

    Args:
        text_field: the key or column that holds the text.
        skip_bad: leaves out and counts a record without a text, instead of raising an error.

    Attributes:
        skipped: number of bad records.
        reasons: messages of the first of them.
    """

    def __init__(self, text_field: str, *, skip_bad: bool):
        self.text_field = text_field
        self.skipped = 0
        self.reasons: list[str] = []
        self._skip_bad = skip_bad

    def read_document(self, record: object, place: str, name: str) -> Iterator[TextDocument]:
        """Yield the document of a record; nothing for an empty text, or a bad record that is skipped."""
        if not isinstance(record, Mapping):
            self.refuse(f"{place}: not a JSON object")
        elif self.text_field in record:
            yield from self.read_value(record[self.text_field], place, name)
        else:
            self.refuse(f"{place}: no text under {self.text_field!r}; set --data.text-field to one of: {join(record)}")

    def read_value(self, value: object, place: str, name: str) -> Iterator[TextDocument]:
        """Yield the document of a record's text; nothing for an empty one, or a bad record that is skipped."""
        if not isinstance(value, str):
            self.refuse(f"{place}: no text under {self.text_field!r}: it holds {_describe_type(value)}, not a string")
        elif not is_unicode(value):
            self.refuse(f"{place}: not valid Unicode: a lone surrogate")
        elif value:
            yield TextDocument(name, value)

    def refuse(self, message: str) -> None:
        """Count a bad record.

        Raises:
            UserError: bad records are not skipped.
        """
        if not self._skip_bad:
            raise UserError(f"{message} (--data.on-error skip leaves such records out)")
        self.skipped += 1
        if len(self.reasons) < MAX_REASONS:
            self.reasons.append(message)

    def refuse_file(self, error: BadFileError) -> None:
        """Count a damaged file as a bad record.

        Raises:
            UserError: bad records are not skipped, or the system cannot read a file now that was read to fingerprint
                it. Without that file, the corpus would not be the one of the fingerprint.
        """
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno is not None:
            raise UserError(f"{error}; run the same command again") from error
        self.refuse(str(error))

    @contextmanager
    def refuse_bad_file(self, path: PathLike[str]) -> Iterator[None]:
        """Count a file that turns out to be damaged as a bad record; what was read before stays.

        Raises:
            UserError: bad records are not skipped.
        """
        try:
            with reraise_as_user_error(path):
                yield
        except BadFileError as error:
            self.refuse_file(error)


class NotUtf8:
    """Stands for a string whose bytes are not UTF-8."""


@contextmanager
def reraise_as_user_error(path: PathLike[str]) -> Iterator[None]:
    """Turn the exceptions of many kinds that libraries raise for a damaged or unreadable file into a BadFileError."""
    try:
        yield
    except UserError:
        raise
    except EOFError as error:  # of gzip, bz2 and lzma
        raise BadFileError(
            f"{shorten(path)}: cannot be read: ends in the middle of a frame; copy or download it again"
        ) from error
    except MemoryError as error:
        raise UserError(f"{shorten(path)}: not enough memory; set --data.workers to a smaller number") from error
    except Exception as error:
        reason = shorten(getattr(error, "strerror", None) or first_line(error), MAX_REASON_LETTERS)
        raise BadFileError(f"{shorten(path)}: cannot be read: {reason}") from error


def shorten(text: object, max_letters: int = MAX_PATH_LETTERS) -> str:
    """Return a text as one line that a message can hold, with its middle left out if it is too long.

    >>> shorten("a name of many words", 12)
    'a na...words'
    """
    line = printable(str(text)).replace("\n", "\\n").replace("\t", "\\t")
    if len(line) <= max_letters:
        return line
    n_head = (max_letters - 3) // 2
    return f"{line[:n_head]}...{line[n_head + 3 - max_letters :]}"


def name_reason(message: str, path: PathLike[str]) -> str:
    """Return what a message says of a file, without the file's name."""
    for prefix in (f"{name}{verb}" for name in (shorten(path), path) for verb in (": ", " is ")):
        message = message.removeprefix(prefix)
    return message


def name_left_out(name: str, reason: str) -> str:
    """Return the name of a file that is left out with the reason, whose remedy is dropped if it is long.

    >>> name_left_out("docs/a.pdf", "a PDF; convert it with pdftotext")
    'docs/a.pdf (a PDF; convert it with pdftotext)'
    """
    if len(reason) > MAX_REASON_LETTERS:
        reason = shorten(reason.partition(";")[0], MAX_REASON_LETTERS)
    return f"{shorten(name, MAX_LEFT_OUT_LETTERS)} ({reason})"


def join(names: Iterable[object]) -> str:
    """Return the first names of many as a message shows them.

    >>> join("abcdefg"), join([])
    ('a, b, c, d, e and 2 more', 'none')
    """
    listed = [shorten(name, MAX_NAME_LETTERS) for name in names]
    rest = f" and {len(listed) - MAX_NAMED:,} more" if len(listed) > MAX_NAMED else ""
    return (", ".join(listed[:MAX_NAMED]) or "none") + rest


def is_unicode(text: str) -> bool:
    """Return whether a text has no lone surrogate, which JSON can spell but which is no character."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _describe_type(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case float() if value != value:
            return "NaN"
        case int() | float():
            return "a number"
        case bytes():
            return "bytes"
        case list() | tuple():
            return "a list"
        case Mapping():
            return "an object"
        case NotUtf8():
            return "bytes that are not UTF-8"
        case _:
            return f"a {type(value).__name__}"
