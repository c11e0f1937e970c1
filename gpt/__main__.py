"""The `gpt` command, which `python -m gpt` runs, too: answers Ctrl-C from the first moment on."""

from typing import NoReturn

from gpt.utils.interrupts import answer_interrupts


def program() -> NoReturn:
    """Run `gpt.main.program`, whose imports take a while."""
    answer_interrupts()
    from gpt.main import program as run_program

    run_program()


if __name__ == "__main__":
    program()
