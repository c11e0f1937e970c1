import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpt.commands.train import TrainCommand, parse_train
from gpt.configs.fields import list_flags
from gpt.configs.load import load_config
from gpt.configs.presets import PRESETS
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError


def config_of(line: str) -> TrainConfig:
    return parse_train(line.split()).as_train_config()


@pytest.mark.parametrize("name", PRESETS)
def test_preset_without_flags_is_that_preset(name: str) -> None:
    assert config_of(name) == PRESETS[name]()


def test_no_arguments_give_quickstart_which_has_every_default() -> None:
    assert config_of("") == TrainConfig() == PRESETS["quickstart"]()


def test_flags_override_the_preset_in_every_section() -> None:
    config = config_of(
        "debug --seed 7 --model.n-layer=3 --model.no-bias --data.source a/b --lr.schedule wsd --lr.max-lr 1e-2 "
        "--optimizer.beta1 0.8 --eval.batches 0 --checkpoint.keep 5 --log.interval 2 --compile --init-from x "
        "--sample.prompts one two"
    )
    assert (config.seed, config.model.n_layer, config.model.bias) == (7, 3, False)
    assert (config.data.source, config.lr.schedule, config.lr.max_lr) == (("a/b",), "wsd", 0.01)
    assert (config.optimizer.beta1, config.eval.batches, config.checkpoint.keep) == (0.8, 0, 5)
    assert (config.log.interval, config.compile, config.init_from) == (2, "on", Path("x"))
    assert config.sample.prompts == ("one", "two")
    assert config.model.n_embd == PRESETS["debug"]().model.n_embd


def test_underscores_in_flags_work_like_hyphens() -> None:
    assert config_of("--model.n_layer 3") == config_of("--model.n-layer 3")


@pytest.mark.parametrize(("flag", "expected"), [("--max-tokens 99", (0, 99, 0)), ("--epochs 0.5", (0, 0, 0.5))])
def test_horizon_flag_replaces_the_presets_horizon(flag: str, expected: tuple[float, ...]) -> None:
    config = config_of(f"debug {flag}")
    assert (config.max_steps, config.max_tokens, config.epochs) == expected


def test_several_horizon_flags_all_apply() -> None:
    config = config_of("debug --max-steps 5 --epochs 2")
    assert (config.max_steps, config.epochs) == (5, 2)


def test_none_unsets_optional_fields(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(config_of("debug --init-from a --data.val-source b").model_dump_json())
    config = config_of(f"--config {path} --init-from none --data.val-source none")
    assert (config.init_from, config.data.val_source) == (None, ())


def test_optional_switch_takes_true_false_or_none() -> None:
    assert [config_of(f"--model.qkv-bias {value}").model.qkv_bias for value in ("true", "false", "none")] == [
        True,
        False,
        None,
    ]
    assert config_of("").model.qkv_bias is None


def test_numbers_may_have_underscores_signs_and_blank_ends() -> None:
    for text, number in (("1_000", 1000), (" 3", 3), ("3 ", 3), ("+5", 5), ("5.0", 5), ("-0", 0)):
        assert parse_train(["--seed", text]).seed == number
        assert parse_train([f"--grad-clip={text}"]).grad_clip == number
    assert str(parse_train(["--grad-clip", "-0"]).grad_clip) == "0.0"


def test_dry_run_is_not_part_of_the_configuration() -> None:
    command = parse_train(["debug", "--dry-run"])
    assert (command.as_train_config(), command.dry_run) == (PRESETS["debug"](), True)
    assert not parse_train(["debug"]).dry_run


REQUIRED_FLAGS = """
    --run-dir --seed --max-steps --max-tokens --epochs --micro-batch-size --tokens-per-step --device --dtype --compile
    --grad-clip --model.n-layer --model.n-head --model.n-embd --model.block-size --model.dropout --model.bias
    --model.vocab-size --data.source --data.val-source --data.val-fraction --data.cache-dir --data.tokenizer
    --data.vocab-size --data.weights --data.packing --data.document-mask
    --lr.schedule --lr.max-lr --lr.min-lr --lr.warmup-steps --lr.decay-steps
    --optimizer.weight-decay --optimizer.beta1 --optimizer.beta2 --log.interval --eval.interval --eval.batches
    --parallel.activation-checkpointing --parallel.reproducible --parallel.check-replicas --parallel.step-timeout
    --runtime.threads --runtime.keep-freed-memory --runtime.flush-denormals --runtime.fused-attention
    --checkpoint.interval --checkpoint.keep --resume --init-from --config --dry-run --json
    --profile.start --profile.steps
""".split()


def test_full_help_names_every_flag_and_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_train(["--help-all"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert [flag for flag in [*REQUIRED_FLAGS, *list_flags(TrainCommand)] if flag not in shown] == []
    assert "(default: 1337)" in shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--sed 3", "unknown flag --sed; did you mean --seed?"),
        ("--model.n-layr 3", "unknown flag --model.n-layr; did you mean --model.n-layer?"),
        ("--n-layer 3", "unknown flag --n-layer; did you mean --model.n-layer?"),
        ("--seed x", "--seed x: expected a whole number"),
        ("--tokens-per-step 1e3", "--tokens-per-step 1e3: expected a whole number"),
        ("--tokens-per-step 1e3", "--tokens-per-step 1e3: expected a whole number (nearest: 1000)"),
        ("--tokens-per-step 10k", "--tokens-per-step 10k: expected a whole number (nearest: 10000)"),
        ("--tokens-per-step 0x10", "--tokens-per-step 0x10: expected a whole number (nearest: 16)"),
        ("--tokens-per-step 1,000", "--tokens-per-step 1,000: expected a whole number (nearest: 1000)"),
        ("--tokens-per-step 2.5", "--tokens-per-step 2.5: expected a whole number (nearest: 2 or 3)"),
        ("--tokens-per-step inf", "--tokens-per-step inf: expected a whole number"),
        ("--tokens-per-step=", "--tokens-per-step '': expected a whole number"),
        ("--model.n-layer 0.5", "--model.n-layer 0.5: expected a whole number (nearest: 1)"),
        ("--data.val-fraction 10%", "--data.val-fraction 10%: expected a number (nearest: 0.1)"),
        ("--data.val-fraction 90%", "--data.val-fraction 90%: expected a number"),
        ("--lr.max-lr 1e400", "--lr.max-lr 1e400: expected a finite number"),
        ("--lr.max-lr -0", "--lr.max-lr -0: must be greater than 0"),
        ("--seed " + "9" * 5000, f"--seed {'9' * 80}...: expected a whole number"),
        ("--device gpu", "--device gpu: did you mean cuda? one of auto, cpu, cuda, mps"),
        ("--lr.max-lr fast", "--lr.max-lr fast: expected a number"),
        ("--lr.max-lr nan", "--lr.max-lr nan: expected a finite number"),
        ("--lr.max-lr 0", "--lr.max-lr 0: must be greater than 0"),
        ("--model.n-layer 0", "--model.n-layer 0: must be at least 1 (nearest: 1)"),
        ("--model.n-layer -3", "--model.n-layer -3: must be at least 1 (nearest: 1)"),
        ("--data.val-fraction 0.9", "--data.val-fraction 0.9: must be at most 0.5 (nearest: 0.5)"),
        ("--model.dropout 1", "--model.dropout 1: must be less than 1"),
        ("--lr.schedule cosin", "--lr.schedule cosin: did you mean cosine? one of cosine, linear, wsd"),
        ("--dtype fp32", "--dtype fp32: did you mean float32?"),
        ("--model.n-head 3", "model: n_embd=256 is not divisible by n_head=3 (nearest: 255 or 258); or set head_dim"),
        ("--model.n-kv-head 3", "model: n_kv_head=3 does not divide n_head=4 (nearest: 2)"),
        (
            "--model.position rotary --model.n-embd 36",
            "model: position=rotary needs an even head_dim: n_embd=36 over n_head=4 makes it 9 "
            "(nearest n_embd: 32 or 40)",
        ),
        ("--model.qkv-bias maybe", "--model.qkv-bias maybe: expected true, false or none"),
        ("--model.mlp swigl", "--model.mlp swigl: did you mean swiglu? one of gelu, gelu_erf, relu2, swiglu"),
        ("--optimizer.name moun", "--optimizer.name moun: did you mean muon? one of adamw, muon"),
        ("--lr.min-lr 1", "lr: min_lr=1 is above max_lr=0.02 (nearest: 0.02)"),
        (
            "--lr.schedule constant --lr.decay-steps 5",
            "lr: decay_steps=5 has no effect with schedule=constant; set it to 0",
        ),
        ("--max-steps 0", "max_steps, max_tokens and epochs are all 0, so the run would never end; set one of them"),
        ("--resume a --init-from b", "init_from=b and resume=a both set where the run starts; remove one"),
        ("--model.n-layer", "--model.n-layer needs a value"),
        ("--config", "--config needs a value"),
        ("--micro-batch-size atuo", "--micro-batch-size atuo: expected a whole number or auto"),
        ("--micro-batch-size 2.5", "--micro-batch-size 2.5: expected a whole number or auto"),
        ("--micro-batch-size 0", "--micro-batch-size 0: must be at least 1 (nearest: 1 or auto)"),
        ("--micro-batch-size auto --tokens-per-step 0", "micro_batch_size=auto divides tokens_per_step, which is 0"),
        (
            "--parallel.activation-checkpointing blocks",
            "--parallel.activation-checkpointing blocks: did you mean block? one of none, block, selective",
        ),
        ("--runtime.keep-freed-memory 1", "--runtime.keep-freed-memory takes no value"),
        ("--runtime.threads -1", "--runtime.threads -1: must be at least 0 (nearest: 0)"),
        ("smaple", "unknown verb or preset 'smaple'; did you mean sample?"),
        ("--compile=yes", "--compile yes: one of auto, on, off"),
        ("--no-compile=yes", "--no-compile takes no value: write --no-compile or --compile"),
        ("--model.bias=1", "--model.bias takes no value: write --model.bias or --model.no-bias"),
        ("shakespear", "unknown verb or preset 'shakespear'; did you mean shakespeare-char?"),
        ("--max-steps 5 debug", "unexpected argument 'debug'; a preset comes first: gpt train debug"),
        ("--model.bias True", "--model.bias takes no value: write --model.bias or --model.no-bias"),
        ("--device npu", "--device npu: did you mean cpu? one of auto, cpu, cuda, mps"),
        ("--dtype x", "--dtype x: one of auto, float32, bfloat16, float16"),
        ("--run-dir=", "--run-dir '': an empty path; name a file or folder"),
        ("--data.source=", "--data.source '': must not be empty"),
        ("--data.source", "--data.source (): must not be empty"),
        ("--data.source none", "--data.source (): must not be empty"),
        ("--data.source a b --data.weights 1 0", "--data.weights 0: must be greater than 0"),
        ("--data.source a b --data.weights 1 -2", "--data.weights -2: must be greater than 0"),
        ("--data.source a b --data.weights -0.5 1", "--data.weights -0.5: must be greater than 0"),
        ("--data.source a b --data.weights 1 nan", "--data.weights nan: expected a finite number"),
        ("--data.source a b --data.weights inf 1", "--data.weights inf: expected a finite number"),
        ("--data.source a b --data.weights 1e308 1e308", "--data.weights 1e308: must be at most 1000000"),
        ("--data.source a b --data.weights much 1", "--data.weights much: expected a number"),
        ("--data.weights 0.7,0.3", "--data.weights 0.7,0.3: expected a number; separate values by spaces"),
        ("--data.packing bestfit", "--data.packing bestfit: did you mean best-fit? one of stream, best-fit"),
        ("--data.document-mask yes", "--data.document-mask takes no value"),
        ("--seed \0", "'\\x00' is not valid text"),
        ("--config /no/such.json", "--config /no/such.json: No such file or directory"),
        ("--config --dry-run", "--config needs a value"),
        (
            "--seed 99999999999999999999",
            "--seed 99999999999999999999: must be at most 9223372036854775807 (nearest: 922",
        ),
        ("debug --config c.json", "--config c.json and the preset debug both set every value"),
    ],
)
def test_every_mistake_is_one_line_with_flag_and_remedy(line: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_train(line.split())
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_saved_configuration_is_loaded_and_overridden(tmp_path: Path) -> None:
    saved = config_of("debug --seed 5 --data.val-source some/where")
    path = tmp_path / "config.json"
    path.write_text(saved.model_dump_json())
    assert load_config(path) == saved
    assert config_of(f"--config {path} --seed 6") == saved.model_copy(update={"seed": 6})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ('{"sed": 1}', "unknown key sed; did you mean seed?"),
        ('{"model": {"n_layers": 1}}', "unknown key model.n_layers; did you mean model.n_layer?"),
        ('{"model": {"n_layer": "x"}}', "model.n_layer x: expected a whole number"),
        ('{"max_steps": -1}', "max_steps -1: must be at least 0"),
        ('{"data": {"weights": [1, 0]}}', "data.weights 0: must be greater than 0"),
        ('{"data": {"weights": ["much"]}}', "data.weights much: expected a number"),
        ('{"data": {"source": []}}', "data.source []: must not be empty"),
    ],
)
def test_broken_configuration_file_names_file_and_key(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UserError, match="^" + str(path)) as error:
        load_config(path)
    assert message in str(error.value)


def test_every_field_has_a_help_text() -> None:
    def undocumented(model: type, prefix: str = "") -> list[str]:
        fields = model.model_fields.items()  # type: ignore[attr-defined]
        nested = [
            name
            for n, f in fields
            if hasattr(f.annotation, "model_fields")
            for name in undocumented(f.annotation, f"{n}.")
        ]
        return nested + [
            prefix + n for n, f in fields if not f.description and not hasattr(f.annotation, "model_fields")
        ]

    assert undocumented(TrainConfig) == []


def test_command_line_loads_without_torch() -> None:
    code = "import sys, gpt.main, gpt.configs.cli, gpt.commands.train; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "False\n"


def test_configuration_survives_json() -> None:
    for preset in PRESETS.values():
        assert TrainConfig.model_validate(json.loads(preset().model_dump_json())) == preset()


def test_number_or_word_is_saved_and_loaded_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for given, size in (("auto", "auto"), ("8", 8)):
        path.write_text(config_of(f"debug --micro-batch-size {given}").model_dump_json())
        assert config_of(f"--config {path}").micro_batch_size == load_config(path).micro_batch_size == size
    path.write_text('{"micro_batch_size": "atuo"}')
    with pytest.raises(UserError, match=r"micro_batch_size atuo: expected a whole number or auto$"):
        load_config(path)


def test_lists_are_parsed_as_lists() -> None:
    data = config_of("--data.source a b c --data.weights 0.7 0.2 0.1 --data.val-source d e").data
    assert (data.source, data.weights, data.val_source) == (("a", "b", "c"), (0.7, 0.2, 0.1), ("d", "e"))
    assert config_of("--data.source x").data.source == config_of("--data.source=x").data.source == ("x",)
    assert config_of("--data.source 1 2").data.source == ("1", "2")
    assert config_of("--data.val-source --seed 3").data.val_source == ()


def test_lists_and_switches_are_saved_and_loaded(tmp_path: Path) -> None:
    saved = config_of(
        "debug --data.source a b --data.weights 7 3 --data.val-source v --data.packing best-fit --data.document-mask"
    )
    path = tmp_path / "config.json"
    path.write_text(saved.model_dump_json())
    assert load_config(path) == saved == config_of(f"--config {path}")
    assert config_of(f"--config {path} --data.weights 1 2").data.weights == (1, 2)
    assert config_of(f"--config {path} --data.source c --data.weights").data.weights == ()


def test_configuration_with_a_single_source_as_text_still_loads(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"data": {"source": "some/where", "val_source": null}}')
    data = load_config(path).data
    assert (data.source, data.val_source) == (("some/where",), ())
    path.write_text('{"data": {"source": "some/where", "val_source": "there"}}')
    assert load_config(path).data.val_source == ("there",)
