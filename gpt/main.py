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
import logging
import os
from collections.abc import Sequence

from gpt.configs.presets import PRESETS
from gpt.errors import UserError

VERBS = {"train": "train a model, or continue a run", "sample": "let a trained model continue a text"}

HELP = f"""usage: gpt [VERB] [ARGS]

Train GPT models. Without a verb: gpt train quickstart.

verbs:
{chr(10).join(f"  {name:8}{purpose}" for name, purpose in VERBS.items())}

presets of gpt train:
  {", ".join(PRESETS)}

examples:
  gpt                                      train a small model on Python's own sources, in minutes
  gpt train debug                          every part of a run, in seconds
  gpt train --data.source my_texts --run-dir runs/mine
  gpt sample runs/quickstart --prompt "def main("

gpt train --help and gpt sample --help list every flag.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status: 0, 2 for what the user can mend, 130 and 143 for signals."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    verb = arguments.pop(0) if arguments and arguments[0] in VERBS else "train"
    _log_to_stdout()
    try:
        status: int = importlib.import_module(f"gpt.commands.{verb}").run(arguments)
    except UserError as error:
        print(f"gpt: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpt: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _log_to_stdout() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
