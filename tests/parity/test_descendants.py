"""The same weights here and in transformers' descendants of GPT-2: same logits, same loss, same gradients."""

from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gpt.configs.gpt_config import GPTConfig
from gpt.models.gpt import GPT

TOLERANCE = 1e-5
SIZES = {"vocab_size": 101, "num_hidden_layers": 2, "num_attention_heads": 4}
Pair = tuple[GPT, nn.Module]
Tensors = dict[str, torch.Tensor]

ROPE_SCALING = {
    "rope_scaling": "llama3",
    "rope_factor": 4.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 3.0,
    "rope_original_block_size": 16,
}
EVERY_BIAS = {"qkv_bias": True, "attn_out_bias": True, "mlp_bias": True}
FAMILIES: dict[str, tuple[dict[str, object], type, type, dict[str, object]]] = {
    "llama": ({"n_kv_head": 4, "n_embd": 48}, LlamaForCausalLM, LlamaConfig, {}),
    "llama, grouped queries": ({"n_kv_head": 2, "n_embd": 32}, LlamaForCausalLM, LlamaConfig, {}),
    "llama, untied head, head_dim and MLP of other sizes": (
        {"n_kv_head": 2, "n_embd": 32, "head_dim": 12, "intermediate_size": 50, "tie_embeddings": False},
        LlamaForCausalLM,
        LlamaConfig,
        {},
    ),
    "llama, every bias": (
        {"n_kv_head": 4, "n_embd": 48, **EVERY_BIAS},
        LlamaForCausalLM,
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True},
    ),
    "llama, norm_eps and rope_theta": (
        {"n_kv_head": 4, "n_embd": 48, "norm_eps": 0.1, "rope_theta": 50.0},
        LlamaForCausalLM,
        LlamaConfig,
        {},
    ),
    "llama 3, scaled rotary embeddings": (
        {"n_kv_head": 2, "n_embd": 48, "rope_theta": 1000.0, "tie_embeddings": False, **ROPE_SCALING},
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0}
            | {"high_freq_factor": 3.0, "original_max_position_embeddings": 16}
        },
    ),
    "mistral, sliding window": (
        {"n_kv_head": 2, "n_embd": 32, "head_dim": 12, "sliding_window": 5, "tie_embeddings": False},
        MistralForCausalLM,
        MistralConfig,
        {"sliding_window": 5},
    ),
    "qwen3, sliding window": (
        {"n_kv_head": 2, "n_embd": 48, "qk_norm": True, "sliding_window": 7},
        Qwen3ForCausalLM,
        Qwen3Config,
        {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 0},
    ),
    "qwen2": (
        {"n_kv_head": 2, "n_embd": 48, "qkv_bias": True, "rope_theta": 1e6, "tie_embeddings": False},
        Qwen2ForCausalLM,
        Qwen2Config,
        {},
    ),
    "qwen3": ({"n_kv_head": 1, "n_embd": 48, "qk_norm": True}, Qwen3ForCausalLM, Qwen3Config, {}),
    "qwen3, untied head, head_dim, norm_eps and rope_theta": (
        {"n_kv_head": 2, "n_embd": 48, "qk_norm": True, "head_dim": 16, "norm_eps": 0.01, "rope_theta": 1e6}
        | {"tie_embeddings": False},
        Qwen3ForCausalLM,
        Qwen3Config,
        {},
    ),
}


def make_pair(family: str) -> Pair:
    changes, architecture, configuration, their_changes = FAMILIES[family]
    config = GPTConfig.model_validate(
        {"n_layer": 2, "n_head": 4, "block_size": 20, "vocab_size": 101, "bias": False}
        | {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu"}
        | changes
    ).resolve()
    torch.manual_seed(0)
    theirs = architecture(
        configuration(
            **SIZES,
            hidden_size=config.n_embd,
            intermediate_size=config.intermediate_size,
            num_key_value_heads=config.n_kv_head,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
            **({"rope_theta": config.rope_theta} | their_changes),
        )
    )
    with torch.no_grad():  # larger than at init, so that every path matters
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ours = GPT(config, seed=1)
    ours.load_state_dict(in_our_layout(dict(theirs.named_parameters())))
    return ours, theirs


LAYERS = {
    "ln_1": ["input_layernorm"],
    "ln_2": ["post_attention_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.c_proj": ["self_attn.o_proj"],
    "attn.q_norm": ["self_attn.q_norm"],
    "attn.k_norm": ["self_attn.k_norm"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
}
"""Our layer -> theirs, which ours concatenates."""


def in_our_layout(theirs: Tensors) -> Tensors:
    """Return their tensors under our names: queries, keys and values in one matrix, and gate and value in another."""

    def rename() -> Iterator[tuple[str, torch.Tensor]]:
        yield "wte.weight", theirs["model.embed_tokens.weight"]
        yield "ln_f.weight", theirs["model.norm.weight"]
        if "lm_head.weight" in theirs:
            yield "lm_head.weight", theirs["lm_head.weight"]
        for layer, (our, their) in product(range(2), LAYERS.items()):
            for kind in ("weight", "bias"):
                names = [f"model.layers.{layer}.{name}.{kind}" for name in their]
                if names[0] in theirs:
                    yield f"h.{layer}.{our}.{kind}", torch.cat([theirs[name] for name in names])

    return dict(rename())


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return make_pair(request.param)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(101, (3, 20), generator=torch.Generator().manual_seed(2))


def test_parameter_counts_match(pair: Pair) -> None:
    ours, theirs = pair
    assert ours.config.n_parameters == sum(parameter.numel() for parameter in theirs.parameters())


def test_logits(pair: Pair, tokens: torch.Tensor) -> None:
    torch.testing.assert_close(pair[0](tokens), pair[1](tokens).logits, atol=TOLERANCE, rtol=0)


def test_logits_of_documents_packed_in_a_row(pair: Pair, tokens: torch.Tensor) -> None:
    ours, theirs = pair
    lengths = [6, 1, 10, 3]
    documents = torch.arange(4).repeat_interleave(torch.tensor(lengths)).expand_as(tokens)
    alone = [theirs(document).logits for document in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(ours(tokens, documents=documents), torch.cat(alone, dim=1), atol=TOLERANCE, rtol=0)


def test_loss_and_gradients(pair: Pair, tokens: torch.Tensor) -> None:
    ours, theirs = pair
    for model in pair:
        model.zero_grad()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss = ours(inputs, targets) / targets.numel()
    their_loss = theirs(tokens, labels=tokens).loss
    assert abs(loss.item() - their_loss.item()) < TOLERANCE
    loss.backward()
    their_loss.backward()
    expected = in_our_layout({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    assert expected.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=TOLERANCE, rtol=0)


def test_capped_logits_and_their_loss_match_gemma_2(tokens: torch.Tensor) -> None:
    config = GPTConfig(n_layer=1, n_embd=32, block_size=20, vocab_size=101, logit_softcap=3.0)
    ours = GPT(config, seed=0)
    with torch.no_grad():
        ours.wte.weight.mul_(50)  # so that the cap matters
    gemma = Gemma2Config(
        **SIZES, tie_word_embeddings=True, hidden_size=32, intermediate_size=32, num_key_value_heads=4, head_dim=8
    )
    gemma.final_logit_softcapping = 3.0
    theirs = Gemma2ForCausalLM(gemma)
    hidden: list[torch.Tensor] = []
    ours.ln_f.register_forward_hook(lambda module, args, output: hidden.append(output))
    logits = ours(tokens)
    theirs.lm_head.weight = ours.wte.weight
    theirs.model = Given(hidden[0])  # Gemma 2's blocks have norms that ours have not: its head alone is compared
    expected = theirs(tokens, labels=tokens)
    assert logits.abs().max() > 2.5
    torch.testing.assert_close(logits, expected.logits, atol=TOLERANCE, rtol=0)
    loss = ours(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
    torch.testing.assert_close(loss, expected.loss, atol=TOLERANCE, rtol=0)


class Given(nn.Module):
    """In the place of transformers' blocks: what they would give."""

    def __init__(self, hidden: torch.Tensor):
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: object, **kwargs: object) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.hidden, past_key_values=None, hidden_states=None, attentions=None)
