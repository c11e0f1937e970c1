import pytest
import torch

from gpt.data.tokenizer_builders import build_byte_tokenizer
from gpt.inference.bfloat16 import BFloat16Linear, round_weights_to_bfloat16
from gpt.inference.generate import decode, prefill
from gpt.inference.kv_cache import KVCache
from gpt.inference.language_model import LanguageModel
from gpt.ops import linear_cpu
from tests.inference.families import FAMILIES, build_config
from tests.inference.test_kv_cache import build_model

CPU = torch.device("cpu")


def autocast_logits(model: torch.nn.Module, rows: list[list[int]]) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return torch.stack([model(torch.tensor([row]))[0, -1].float() for row in rows])


@pytest.mark.parametrize("uses_kernel", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_weights_compute_what_training_computes_under_autocast(
    family: str, uses_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not uses_kernel:
        monkeypatch.setattr(linear_cpu, "supports", lambda x: False)
    config = build_config(family)
    reference, model = build_model(config), build_model(config)
    round_weights_to_bfloat16(model)
    rows = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3]]
    cache = KVCache(config, n_rows=2, capacity=24, dtype=torch.bfloat16, device=CPU)
    logits = prefill(model, cache, rows)
    for token in (7, 8, 9):
        expected = autocast_logits(reference, rows)
        torch.testing.assert_close(logits, expected, atol=0.03 * expected.abs().max().item(), rtol=0)
        for row in rows:
            row.append(token)
        logits = decode(model, cache, [token, token])


def test_head_shares_the_embedding_if_it_is_tied() -> None:
    tied, untied = build_model(build_config("gpt2")), build_model(build_config("gpt2, untied head"))
    for model in (tied, untied):
        round_weights_to_bfloat16(model)
        assert isinstance(model.lm_head, BFloat16Linear)
        assert {weight.dtype for name, weight in model.named_parameters() if weight.dim() == 2} == {
            torch.bfloat16,
            torch.float32,  # wpe
        }
    assert tied.lm_head is not None and tied.lm_head.weight.data_ptr() == tied.wte.weight.data_ptr()
    assert untied.lm_head is not None and untied.lm_head.weight.data_ptr() != untied.wte.weight.data_ptr()


def test_text_is_scored_in_bfloat16() -> None:
    config = build_config("qwen3", vocab_size=257)
    exact = LanguageModel(build_model(config), build_byte_tokenizer())
    model = build_model(config)
    round_weights_to_bfloat16(model)
    rounded = LanguageModel(model, build_byte_tokenizer(), torch.bfloat16)
    assert rounded.score("the model") == pytest.approx(exact.score("the model"), rel=0.02)
    assert rounded.score("the model") != exact.score("the model")
    assert rounded.generate("the", max_new_tokens=5)
