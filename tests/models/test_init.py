import hashlib
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

import pytest

from gpt.configs.gpt_config import GPTConfig
from gpt.configs.presets import PRESETS
from gpt.models.gpt import GPT
from gpt.models.init import INITIALISATIONS

LLAMA = {"n_head": 4, "n_kv_head": 2, "n_embd": 32, "bias": False, "position": "rotary", "norm": "rmsnorm"}
MODELS = {
    **{name: PRESETS[name]().model.model_copy(update={"vocab_size": 65})
       for name in ("debug", "quickstart", "shakespeare-char", "speedrun-char")},
    "gpt2-3-layers": GPTConfig(vocab_size=65),
    "llama": GPTConfig(n_layer=2, block_size=16, vocab_size=50, mlp="swiglu", qk_norm=True, **LLAMA),
}  # fmt: skip
SHA256 = {
    "debug": "2390b68eee0d0408a5ebd6988613221eea8c02ea3248a20946f06f01dd478ee4",
    "gpt2-3-layers": "048b0173abccb4d38a2bd0a2c0d4ef0a84b2bc2a84fb29887b601bfc1ca453ba",
    "quickstart": "1e8b670bfe9270f3df642a0d9c2ec9adeb19bce955b3ddcf73f8dec3165e4212",
    "shakespeare-char": "3eba4f880367218d950641053b95bc9d5926a8c1f320631dc87f479a6407d40c",
    "speedrun-char": "60b0ea20067a3b561dffaa35ac460e512cc4aad2e78dc736463169626ebdef53",
    "llama": "301aa944a9363c00e8d7084dfdf6280e02483837f3604c64b1ecfaf0107b721f",
}
"""Digests of names and weights, at seed 1337, llama at 3. A released configuration keeps its initial weights."""


@pytest.mark.parametrize("name", MODELS)
def test_initial_weights_keep_every_bit(name: str) -> None:
    digest = hashlib.sha256()
    for key, tensor in GPT(MODELS[name], seed=3 if name == "llama" else 1337).state_dict().items():
        digest.update(key.encode() + tensor.numpy().tobytes())
    assert digest.hexdigest() == SHA256[name]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "n_kv_head": 1},
        {"qk_norm": True, "tie_embeddings": False, "mlp_bias": False},
    ],
)
def test_every_parameter_matches_one_row_of_the_table(changes: dict[str, Any]) -> None:
    config = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=11).model_copy(update=changes)
    for name, _ in GPT(config, seed=0).named_parameters():
        for table in INITIALISATIONS.values():
            assert sum(fnmatchcase(name, pattern) for pattern in table) == 1, name


def test_init_std_scales_the_matrices() -> None:
    weights = GPT(GPTConfig(vocab_size=300, n_layer=1, init_std=0.5), seed=0).state_dict()
    assert weights["wte.weight"].std().item() == pytest.approx(0.5, rel=0.02)


def test_every_row_of_the_tables_is_used() -> None:
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 11}
    names = [name for name, _ in GPT(GPTConfig(**sizes, qk_norm=True, tie_embeddings=False), seed=0).named_parameters()]
    for pattern in chain(*INITIALISATIONS.values()):
        assert any(fnmatchcase(name, pattern) for name in names), pattern
