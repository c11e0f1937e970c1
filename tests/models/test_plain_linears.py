"""Every linear layer is called: hooks, wrappers and parametrizations of each one act, at every size and dtype.

The reference is a GPT-2 made of `nn.Linear` and `torch.nn.functional` alone, to which the same is done.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from gpt.configs.gpt_config import GPTConfig
from gpt.models.gpt import GPT
from gpt.ops import recompute

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=50, tie_embeddings=False)
LINEARS = ["h.1.attn.c_attn", "h.1.attn.c_proj", "h.1.mlp.c_fc", "h.1.mlp.c_proj", "lm_head"]
NEVER, ALWAYS = 2**40, 0
Modify = Callable[[nn.Module, str], None]


class ReferenceBlock(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        n_embd, self.n_head = config.n_embd, config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(n_embd, 3 * n_embd), "c_proj": nn.Linear(n_embd, n_embd)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(n_embd, 4 * n_embd), "c_proj": nn.Linear(4 * n_embd, n_embd)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape  # noqa: N806
        qkv = self.attn["c_attn"](self.ln_1(x)).view(B, T, 3, self.n_head, -1).transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2).reshape(B, T, C)
        x = x + self.attn["c_proj"](y)
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))


class ReferenceGPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(config.vocab_size, config.n_embd), nn.Embedding(128, config.n_embd)
        self.h = nn.ModuleList(ReferenceBlock(config) for _ in range(config.n_layer))
        self.ln_f, self.lm_head = nn.LayerNorm(config.n_embd), nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


class Lora(nn.Module):
    """A layer of its own around a frozen one (Hu et al. 2022), with matrices of `nn.Linear`."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, 4, bias=False)
        self.b = nn.Linear(4, base.out_features, bias=False)
        generator = torch.Generator().manual_seed(1)
        for layer in (self.a, self.b):
            nn.init.normal_(layer.weight, std=0.3, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x) + self.b(self.a(x))
        return out


class Scaled(nn.Module):
    """A trained scale of every row of a weight."""

    def __init__(self, rows: int):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(-1, 3, rows)[:, None])

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.scale


def add_hook(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_hook(lambda module, args, out: 1.5 * out + 0.1)


def add_pre_hook(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: (1.5 * args[0] + 0.1,))


def wrap_in_lora(model: nn.Module, name: str) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, Lora(model.get_submodule(name)))  # type: ignore[arg-type]
    if isinstance(model.get_submodule(parent), nn.ModuleDict):  # of the reference
        model.get_submodule(parent)[child] = Lora(model.get_submodule(name).base)  # type: ignore[index]


def add_parametrization(model: nn.Module, name: str) -> None:
    layer = model.get_submodule(name)
    parametrize.register_parametrization(layer, "weight", Scaled(layer.out_features))  # type: ignore[arg-type]


MODIFICATIONS: dict[str, Modify] = {
    "hook": add_hook,
    "pre-hook": add_pre_hook,
    "lora": wrap_in_lora,
    "parametrization": add_parametrization,
}


def make_pair(config: GPTConfig) -> tuple[GPT, ReferenceGPT]:
    ours, reference = GPT(config, seed=2), ReferenceGPT(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # larger than at init, so that every path matters
        for parameter in ours.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        reference.wpe = nn.Embedding(config.block_size, config.n_embd)
    reference.load_state_dict(ours.state_dict())
    return ours, reference


def train_once(model: nn.Module, tokens: torch.Tensor, *, autocast: bool) -> dict[str, torch.Tensor]:
    """Return the mean loss and every parameter's gradient."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(tokens, tokens.roll(-1, dims=1)) / tokens.numel()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def check(config: GPTConfig, linears: list[str], modify: Modify, batch: int, *, autocast: bool) -> None:
    tokens = torch.randint(50, (batch, config.block_size), generator=torch.Generator().manual_seed(2))
    untouched = train_once(make_pair(config)[0], tokens, autocast=autocast)["loss"]
    ours, reference = make_pair(config)
    for name in linears:
        modify(ours, name)
        modify(reference, name)
    given, expected = (train_once(model, tokens, autocast=autocast) for model in (ours, reference))
    tolerance = 0.03 if autocast else 1e-4
    assert given.keys() == expected.keys()
    for name, tensor in given.items():
        assert tensor.dtype == torch.float32, name
        assert distance(tensor, expected[name]) < tolerance, name
    change = distance(untouched, expected["loss"])
    assert distance(given["loss"], expected["loss"]) < change / 5, "what is done to a layer must be seen in the loss"


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("min_bytes", [NEVER, ALWAYS], ids=["small", "large"])
@pytest.mark.parametrize("modification", MODIFICATIONS)
@pytest.mark.parametrize("linear", LINEARS)
def test_modifications_of_a_linear_layer_act(
    linear: str, modification: str, min_bytes: int, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recompute, "RECOMPUTE_MIN_BYTES", min_bytes)
    check(CONFIG, [linear], MODIFICATIONS[modification], 4, autocast=autocast)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("modification", MODIFICATIONS)
def test_modifications_act_on_inputs_above_8_mib(modification: str, autocast: bool) -> None:
    config = CONFIG.model_copy(update={"n_embd": 128, "block_size": 128})
    assert 4 * 128 * config.block_size * config.n_embd >= recompute.RECOMPUTE_MIN_BYTES
    check(config, LINEARS, MODIFICATIONS[modification], 128, autocast=autocast)
