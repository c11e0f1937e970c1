import json
import math

import pytest

from gpt.commands.output import build_console, print_json


def test_json_has_null_for_numbers_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"loss": math.nan, "nested": [{"rate": math.inf}, (1.5, -math.inf)], "text": "é\n"})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "loss": None,
        "nested": [{"rate": None}, [1.5, None]],
        "text": "é\n",
    }


def test_console_prints_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    line = "[bold]not markup[/bold] " * 20
    build_console().print(line)
    build_console(stderr=True).print(line)
    assert capsys.readouterr() == (f"{line}\n", f"{line}\n")
