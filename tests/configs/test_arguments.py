import shlex

import pytest

from gpt.commands.prepare import PrepareCommand
from gpt.commands.sample import SampleCommand
from gpt.commands.train import TrainCommand, parse_train
from gpt.configs.arguments import Flag, _list_known_flags
from gpt.configs.cli import parse
from gpt.errors import UserError

TRAIN_FLAGS = [flag for flag in _list_known_flags(TrainCommand) if "help" not in flag.name and flag.name != "-h"]
SWITCHES = [flag for flag in TRAIN_FLAGS if flag.kind == "switch"]


def message_of(line: str) -> str:
    with pytest.raises(UserError) as error:
        parse_train(shlex.split(line))
    assert "\n" not in str(error.value)
    return str(error.value)


def sample_message(line: str) -> str:
    with pytest.raises(UserError) as error:
        parse(SampleCommand, shlex.split(line), prog="gpt sample")
    return str(error.value)


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda flag: flag.name)
def test_unknown_flag_is_named_and_not_the_switch_before_it(switch: Flag) -> None:
    for unknown in ("--learning-rate 1e-3", "--learning-rate=1e-3", "-lr 1e-3"):
        name = unknown.replace("=", " ").split()[0]
        assert message_of(f"debug {switch.name} {unknown}") == f"unknown flag {name}; did you mean --lr.max-lr?"


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda flag: flag.name)
def test_switch_with_a_value_is_named_in_every_form(switch: Flag) -> None:
    expected = f"{switch.name} takes no value: write {switch.name} or {switch.opposite}"
    for line in (f"{switch.name}=true", f"{switch.name} true", f"{switch.name}=", f"--seed 3 {switch.name} 3"):
        assert message_of(line) == expected
    assert message_of(f"{switch.name.replace('-', '_').replace('__', '--', 1)}=1") == expected


@pytest.mark.parametrize("flag", [flag for flag in TRAIN_FLAGS if flag.kind == "value"], ids=lambda flag: flag.name)
def test_flag_without_its_value_is_named(flag: Flag) -> None:
    for line in (flag.name, f"{flag.name} --seed 3", f"{flag.name} -h", f"{flag.name} -seed 3"):
        assert message_of(line).startswith(f"{flag.name} needs a value")


def test_last_of_a_repeated_flag_counts() -> None:
    assert parse_train(["--seed", "1", "--seed=2"]).seed == 2
    assert not parse_train(["--model.bias", "--model.no-bias"]).model.bias
    assert parse_train(["--compile", "--no-compile"]).compile == "off"
    assert message_of("--config /no/a.json --config /no/b.json").startswith("--config /no/b.json: No such file")
    assert parse_train("--data.source a b --data.source c".split()).data.source == ("c",)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        *(("", "auto"), ("--compile", "on"), ("--compile --seed 3", "on"), ("--no-compile", "off")),
        *(("--compile on", "on"), ("--compile=off", "off"), ("--compile auto", "auto")),
    ],
)
def test_value_of_an_optional_flag_may_be_left_out(line: str, value: str) -> None:
    assert parse_train(shlex.split(line)).compile == value


def test_text_may_begin_with_a_hyphen() -> None:
    for line in ("r --prompt -x", "r --prompt=-x", "--prompt -x r"):
        assert parse(SampleCommand, shlex.split(line), prog="gpt sample").prompt == "-x"
    assert parse_train(["--run-dir", "-x", "--seed", "3"]).seed == 3
    assert parse_train(["--sample.prompts=-x", "y"]).sample.prompts == ("-x", "y")
    assert message_of("--sample.prompts -x y") == (
        "unknown flag -x; a value that begins with - is joined by =: --sample.prompts=-x"
    )
    assert sample_message("r --prompt --x") == (
        "--prompt needs a value; a value that begins with -- is joined by =: --prompt=--x"
    )
    assert sample_message("r --prompt --seed 3") == "--prompt needs a value"


def test_negative_numbers_are_values() -> None:
    for value in ("-3", "-.5", "-1e3", "-inf"):
        assert message_of(f"--lr.max-lr {value}").startswith(f"--lr.max-lr {value}: ")
        assert message_of(f"--data.source a b --data.weights 1 {value}").startswith(f"--data.weights {value}: ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("debug quickstart", "unexpected argument 'quickstart': debug is the preset already; name one of them"),
        ("debug --dry-run quickstart", "unexpected argument 'quickstart': debug is the preset already"),
        ("--dry-run quickstart", "unexpected argument 'quickstart'; a preset comes first: gpt train quickstart"),
        ("debug sample", "unexpected argument 'sample'; the verb comes first: gpt sample"),
        ("debug seed=3", "unexpected argument 'seed=3'; a flag begins with --: --seed=3"),
        ("debug lr=3", "unexpected argument 'lr=3'; did you mean --lr.max-lr?"),
        ("model.n_layer=3", "unknown verb or preset 'model.n_layer=3'; a flag begins with --: --model.n-layer=3"),
        ("generate", "unknown verb or preset 'generate'; did you mean sample?"),
        ("GPT2", "unknown verb or preset 'GPT2'; did you mean gpt2-124m?"),
        ("\u2014seed 3", "unknown flag \u2014seed; did you mean --seed?"),
        ("\u2013-seed 3", "unknown flag \u2013-seed; did you mean --seed?"),
        ("-seed 3", "unknown flag -seed; did you mean --seed?"),
        ("--SEED 3", "unknown flag --SEED; did you mean --seed?"),
        ("--help=1", "--help takes no value: write --help"),
        ("debug -- x", "unexpected argument 'x'; see gpt train debug --help"),
    ],
)
def test_stray_word_is_named_with_its_remedy(line: str, message: str) -> None:
    assert message_of(line).startswith(message)


def test_path_in_place_of_a_preset_names_the_flag_for_it(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "config.json").touch()
    assert message_of("texts").endswith("did you mean --data.source texts?")
    assert message_of("config.json").endswith("did you mean --config config.json?")


def test_positional_arguments_take_no_flag_and_no_more_than_their_number() -> None:
    assert sample_message("--run-dir r") == "unknown flag --run-dir; it has no flag: gpt sample RUN_DIR"
    assert sample_message("r x") == "unexpected argument 'x'; see gpt sample --help"
    assert sample_message("r --json x") == "--json takes no value: write --json or --no-json"
    command = parse(PrepareCommand, ["--deduplicate", "a", "b", "--out", "o"], prog="gpt prepare")
    assert (command.source, command.deduplicate) == (("a", "b"), True)
