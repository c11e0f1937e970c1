"""Entry point: `gpt ARGS`, `python -m gpt.main ARGS` and `python gpt/main.py ARGS` run the same program."""

import sys
from pathlib import Path

if __name__ == "__main__" and __package__ in (None, "") and sys.path:
    # Python puts a script's own folder first on the import path, where `data` or `models` would shadow installed
    # packages. Replace it by the folder above, which holds the package.
    package_folder = Path(__file__).resolve().parent
    if Path(sys.path[0]).resolve() == package_folder:
        sys.path[0] = str(package_folder.parent)

if __name__ == "__main__":  # before the imports below, which take a while
    from gpt.utils import interrupts

    interrupts.answer_interrupts()

import contextlib
import importlib
import io
import logging
import os
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from gpt import __version__
from gpt.configs.arguments import VERBS, has_flag
from gpt.configs.presets import PRESETS
from gpt.errors import OwnError, ReportedError
from gpt.utils import launch
from gpt.utils.helper import describe_mistake, printable
from gpt.utils.interrupts import answer_interrupts

OTHER_RANKS_DELAY_SECONDS = 5.0
"""Delay before a rank other than 0 reports an error, in case rank 0 reports the same one."""

HELP = f"""usage: gpt [VERB] [ARGS]

Train GPT models. Without a verb: gpt train quickstart.

verbs:
{chr(10).join(f"  {name:15}{purpose}" for name, purpose in VERBS.items())}

presets of gpt train:
  {", ".join(PRESETS)}

examples:
  gpt                                      train a small model on Python's standard library, in minutes
  gpt train debug                          run every part of a training run, in seconds
  gpt train --data.source examples/texts --run-dir runs/texts
  gpt prepare examples/texts --vocab-size 1024 --out data/texts
  gpt sample runs/quickstart --prompt "def main("
  gpt export runs/quickstart --to hf --out exported/quickstart
  gpt serve runs/quickstart                OpenAI's API and a page on http://127.0.0.1:8000
  gpt data-at runs/quickstart --step 100   the documents of a step
  gpt verify runs/quickstart               compare every checkpoint with its SHA-256 digests
  gpt verify-resume debug --kills 10       kill and resume a run 10 times; compare it bit by bit
  gpt selftest                             compare this device with the CPU; a report for an issue
  gpt bench quickstart                     tokens per second, and the time of each part of a step

gpt VERB --help lists its flags; of a flag given twice the last counts.
With --json, a command prints its result as JSON."""


SHORTAGE_REMEDIES = {
    "train": "lower --micro-batch-size or the sizes of the model",
    "selftest": "lower --micro-batch-size or the sizes of the model",
    "bench": "lower --micro-batch-size or the sizes of the model",
    "verify-resume": "lower --micro-batch-size or the sizes of the model",
    "prepare": "lower --workers, or give the process more memory",
}
"""Verb -> advice where memory or threads run out; other verbs have no flag that saves any."""
VERSION = f"gpt-training-pipeline {__version__}"
INFO_FLAGS = {
    **dict.fromkeys(("-h", "--help", "--help-all", "help"), HELP),
    **dict.fromkeys(("-V", "--version", "version"), VERSION),
}
"""First word -> text to print instead of running a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status: 0, 2 for a user's mistake, 130 and 143 for signals."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _set_up_output(log_to_stderr=has_flag(arguments, "json"))
    launch.provide_home()
    launch.quiet_native_logs()
    launch.widen_terminal()
    verb = arguments[0] if arguments and arguments[0] in VERBS else "train"
    try:
        status = _run_command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        status = 0
    except KeyboardInterrupt:
        if launch.speaks_first():
            _print_line("gpt: interrupted")
        status = 130
    except Exception as error:
        message = describe_mistake(error)
        if message is None:
            raise
        if isinstance(error, MemoryError | RuntimeError):
            message += f"; {SHORTAGE_REMEDIES.get(verb, 'give the process more memory')}"
        _report_error(message, error)
        status = 2
    _flush()
    return status


def _run_command(arguments: list[str]) -> int:
    if arguments[:1] == ["help"] and len(arguments) > 1:  # gpt help VERB
        arguments = [*arguments[1:], "--help"]
    if arguments and arguments[0] in INFO_FLAGS:
        print(INFO_FLAGS[arguments[0]])
        return 0
    verb = arguments.pop(0) if arguments and arguments[0] in VERBS else "train"
    module = {"import": "import_model"}.get(verb, verb.replace("-", "_"))  # `import` is no name of a module
    status: int = importlib.import_module(f"gpt.commands.{module}").run(arguments)
    return status


def _set_up_output(*, log_to_stderr: bool) -> None:
    """Make stdout usable and set up logging: information to stdout, warnings to stderr, below errors from rank 0 only.

    Args:
        log_to_stderr: send information to stderr, too, because stdout is for JSON.
    """
    _open_closed_streams()
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="backslashreplace")  # a terminal without some character must not end a run
    stream = sys.stderr if log_to_stderr else sys.stdout
    information, warnings = logging.StreamHandler(stream), logging.StreamHandler(sys.stderr)
    information.addFilter(lambda record: record.levelno < logging.WARNING)
    warnings.setLevel(logging.WARNING)
    level = logging.INFO if launch.speaks_first() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=[information, warnings])
    logging.getLogger("torch").setLevel(logging.WARNING)  # it logs statistics of its caches when the process ends
    logging.raiseExceptions = False  # a closed stdout must not fill stderr with tracebacks


def _open_closed_streams() -> None:
    """Open the standard streams that the parent process has closed, so that no other file gets their descriptors.

    What a library writes to descriptor 2 would otherwise end up in that file.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free descriptor: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115


def _flush() -> None:
    """Flush stdout; if its reader has closed it, redirect it, so that Python's own flush at exit does not fail."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report_error(message: str, error: Exception) -> None:
    """Print an error as one line on stderr.

    Every rank sees most mistakes. Rank 0 reports them at once; the launcher then ends the other ranks in their delay.

    Args:
        message: the line.
        error: its type says which rank reports it.
    """
    if not (launch.speaks_first() or isinstance(error, OwnError)):
        time.sleep(OTHER_RANKS_DELAY_SECONDS)
    if not isinstance(error, ReportedError):
        _print_line("gpt: error: " + printable(message).replace("\n", "\\n"))


def _print_line(line: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be closed, too; the status says that it failed
        print(line, file=sys.stderr, flush=True)


def program() -> NoReturn:
    """Run `main` and end the process at once, without the teardown of the interpreter."""
    answer_interrupts()
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    launch.end_process(status)


if __name__ == "__main__":
    program()
