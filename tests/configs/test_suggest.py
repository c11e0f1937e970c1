import pytest

from gpt.commands.prepare import PrepareCommand
from gpt.commands.sample import SampleCommand
from gpt.commands.train import TrainCommand
from gpt.configs.fields import list_flags
from gpt.configs.suggest import read_number, suggest_choice, suggest_flag, suggest_key
from gpt.configs.synonyms import ADVICE, FLAG_SYNONYMS

FLAGS = list_flags(TrainCommand)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--lr", "--lr.max-lr"),
        ("--learning-rate", "--lr.max-lr"),
        ("--optimizer.lr", "--lr.max-lr"),
        ("--batch-size", "--micro-batch-size"),
        ("--per_device_train_batch_size", "--micro-batch-size"),
        ("--training.local_batch_size", "--micro-batch-size"),
        ("--max_iters", "--max-steps"),
        ("--train.max_steps", "--max-steps"),
        ("--num_train_epochs", "--epochs"),
        ("--weight_decay", "--optimizer.weight-decay"),
        ("--output_dir", "--run-dir"),
        ("--out_dir", "--run-dir"),
        ("--n-layers", "--model.n-layer"),
        ("--num_hidden_layers", "--model.n-layer"),
        ("--hidden-size", "--model.n-embd"),
        ("--context-length", "--model.block-size"),
        ("--training.seq_len", "--model.block-size"),
        ("--fp16", "--dtype float16"),
        ("--bf16", "--dtype bfloat16"),
        ("--gpu", "--device cuda"),
        ("--dropout", "--model.dropout"),
        ("--eval_iters", "--eval.batches"),
        ("--log_interval", "--log.interval"),
        ("--model-n-layer", "--model.n-layer"),
        ("--no-bias", "--model.no-bias"),
        ("--no-model.bias", "--model.no-bias"),
        ("--random_seed", "--seed"),
        ("--max_grad_norm", "--grad-clip"),
        ("--vocab-size", "--model.vocab-size or --data.vocab-size"),
        ("--eval", "--eval.interval or --eval.batches"),
        ("--interval", "--log.interval, --eval.interval or --checkpoint.interval"),
        ("--sed", "--seed"),
        ("--model.dropuot", "--model.dropout"),
        ("--warmup-stps", "--lr.warmup-steps"),
    ],
)
def test_unknown_flag_leads_to_the_flag_of_that_meaning(word: str, meant: str) -> None:
    assert suggest_flag(word, FLAGS, "gpt train --help-all") == f"did you mean {meant}?"


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("--gradient_accumulation_steps", "it is derived: tokens_per_step / (micro_batch_size * block_size"),
        ("--warmup_ratio", "--lr.warmup-steps"),
        ("--global_batch_size", "--tokens-per-step"),
        ("--wandb_log", "metrics.jsonl"),
        ("--devices", "torchrun"),
        ("--model", "gpt train PRESET"),
        ("--xyzzy", "gpt train --help-all lists them all"),
    ],
)
def test_unknown_flag_without_an_equal_here_names_the_remedy(word: str, remedy: str) -> None:
    assert remedy in suggest_flag(word, FLAGS, "gpt train --help-all")


def test_other_commands_suggest_their_own_flags() -> None:
    flags = list_flags(SampleCommand)
    suggestions = [suggest_flag(word, flags, "gpt sample --help") for word in ("--max-tokens", "--start", "--temp")]
    assert suggestions == [f"did you mean --{name}?" for name in ("max-new-tokens", "prompt", "temperature")]
    flags = list_flags(PrepareCommand)
    assert suggest_flag("--output-dir", flags, "gpt prepare --help") == "did you mean --out?"
    assert suggest_flag("--num_proc", flags, "gpt prepare --help") == "did you mean --workers?"


def test_unknown_key_leads_to_a_key() -> None:
    assert suggest_key("learning_rate", ["lr.max_lr", "seed"]) == "did you mean lr.max_lr?"


def test_synonyms_name_fields_that_exist_and_no_flag_of_the_command() -> None:
    names = {flag[2:] for command in (TrainCommand, SampleCommand, PrepareCommand) for flag in list_flags(command)}
    names |= {"step", "kills"}
    assert [meaning for meaning in FLAG_SYNONYMS if meaning.split()[0] not in names] == []
    synonyms = {word for words in FLAG_SYNONYMS.values() for word in words.split()}
    assert synonyms & ADVICE.keys() == set()


@pytest.mark.parametrize(
    ("value", "choices", "meant"),
    [
        ("gpu", "auto cpu cuda mps", "cuda"),
        ("GPU", "auto cpu cuda mps", "cuda"),
        ("cuda:0", "auto cpu cuda mps", "cuda"),
        ("CPU ", "auto cpu cuda mps", "cpu"),
        ("npu", "auto cpu cuda mps", "cpu"),
        ("metal", "auto cpu cuda mps", "mps"),
        ("fp16", "auto float32 bfloat16 float16", "float16"),
        ("bf16", "auto float32 bfloat16 float16", "bfloat16"),
        ("full", "none block selective", "block"),
        ("adam", "adamw muon", "adamw"),
        ("inverse_sqrt", "cosine linear wsd inverse-sqrt constant", "inverse-sqrt"),
        ("rope", "learned rotary", "rotary"),
        ("x", "auto cpu cuda mps", None),
    ],
)
def test_unknown_choice_leads_to_the_choice_of_that_meaning(value: str, choices: str, meant: str | None) -> None:
    assert suggest_choice(value, choices.split()) == meant


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("1e3", 1000), ("10k", 10_000), ("2M", 2e6), ("1,000,000", 1e6), ("1 000", 1000), ("0x10", 16)),
        *(("1.5", 1.5), ("50%", 0.5), ("-3", -3), ("-0", 0), ("1.", 1), (" 7 ", 7)),
        *(("inf", None), ("nan", None), ("1e400", None), ("0.7,0.3", None), ("", None), ("x", None), ("1e", None)),
    ],
)
def test_numbers_are_read_in_other_notations(text: str, number: float | None) -> None:
    assert read_number(text) == number
