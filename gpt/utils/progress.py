"""A progress bar for work that a person waits for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from gpt.utils.helper import format_si


class _TokensPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        tokens, seconds = task.fields["tokens"], task.elapsed
        return Text(f"{format_si(tokens / seconds)} tokens/s" if tokens and seconds else "")


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """Show a bar over `total` bytes on stderr until the block ends; nothing if stderr is no terminal.

    Yields:
        advance: function to call with the bytes and the tokens done since its last call.
    """
    console = Console(stderr=True, emoji=False)
    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    with Progress(
        *columns,
        _TokensPerSecond(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(description, total=total or None, tokens=0)
        done = 0

        def advance(size: int, tokens: int) -> None:
            nonlocal done
            done += tokens
            progress.update(task, advance=size, tokens=done)

        yield advance
