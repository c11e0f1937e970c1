"""The entry point: `gpt ARGS`, `python -m gpt.main ARGS` and `python gpt/main.py ARGS` are the same program."""

import sys
from pathlib import Path

if __name__ == "__main__" and __package__ in (None, "") and sys.path:
    # Run by its path, a script's own folder comes first on the import path, where `data` or `models` would shadow
    # installed packages; the folder above it is the one that holds the package.
    here = Path(__file__).resolve().parent
    if Path(sys.path[0]).resolve() == here:
        sys.path[0] = str(here.parent)

import importlib
import io
import logging
import os
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from gpt import __version__
from gpt.configs.cli import VERBS
from gpt.configs.presets import PRESETS
from gpt.errors import UserError
from gpt.utils import launch
from gpt.utils.helper import first_line, printable

OTHER_RANKS_WAIT = 5.0
"""Seconds before a rank other than the first tells of an error that perhaps it alone has seen."""

HELP = f"""usage: gpt [VERB] [ARGS]

Train GPT models. Without a verb: gpt train quickstart.

verbs:
{chr(10).join(f"  {name:15}{purpose}" for name, purpose in VERBS.items())}

presets of gpt train:
  {", ".join(PRESETS)}

examples:
  gpt                                      train a small model on Python's own sources, in minutes
  gpt train debug                          every part of a run, in seconds
  gpt train --data.source my_texts --run-dir runs/mine
  gpt prepare my_texts --tokenizer gpt2 --out data/mine
  gpt sample runs/quickstart --prompt "def main("
  gpt data-at runs/quickstart --step 100   the documents of a step
  gpt verify runs/quickstart               is every checkpoint as it was written?
  gpt verify-resume debug --kills 10       kill a run again and again: is a bit lost?
  gpt bench quickstart                     tokens per second, and where a step's time goes

gpt VERB --help lists every flag."""


INFO_FLAGS = {"-h": HELP, "--help": HELP, "--version": f"gpt-training-pipeline {__version__}"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status: 0, 2 for what the user can mend, 130 and 143 for signals."""
    _open_terminal()
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except UserError as error:
        _tell(str(error))
        status = 2
    except BrokenPipeError:  # the reader of our output has what it wanted
        status = 0
    except OSError as error:
        _tell(f"{error.filename or 'output'}: {error.strerror}")
        status = 2
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or "allocate" in str(error) or "out of memory" in str(error)):
            raise
        _tell(f"not enough memory: {first_line(error)}; lower --micro-batch-size or the sizes of the model")
        status = 2
    except KeyboardInterrupt:
        print("gpt: interrupted", file=sys.stderr)
        status = 130
    _flush()
    return status


def _run(arguments: list[str]) -> int:
    if arguments and arguments[0] in INFO_FLAGS:
        print(INFO_FLAGS[arguments[0]])
        return 0
    verb = arguments.pop(0) if arguments and arguments[0] in VERBS else "train"
    status: int = importlib.import_module(f"gpt.commands.{verb.replace('-', '_')}").run(arguments)
    return status


def _open_terminal() -> None:
    """Make stdout usable whatever it is; progress goes to it and warnings to stderr, from the first rank."""
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a character must not end a run
    information, warnings = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    information.addFilter(lambda record: record.levelno < logging.WARNING)
    warnings.setLevel(logging.WARNING)
    level = logging.INFO if launch.rank() == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=[information, warnings])
    logging.raiseExceptions = False  # a closed stdout must not fill stderr with tracebacks


def _flush() -> None:
    """Write out what is buffered; a reader that has left is no error, and Python must not trip over it at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell(message: str) -> None:
    """Most mistakes are seen by every rank and told by the first; the launcher ends the others while they wait."""
    if launch.rank() > 0:
        time.sleep(OTHER_RANKS_WAIT)
    line = printable(message).replace("\n", "\\n")
    print(f"gpt: error: {line}", file=sys.stderr)


def program() -> NoReturn:
    """The process: `main`, and then its end, at once."""
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    launch.end_process(status)


if __name__ == "__main__":
    program()
