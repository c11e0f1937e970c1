import pytest
import torch
from torch import nn

from gpt.configs.gpt_config import GPTConfig
from gpt.configs.optimizer_config import OptimizerConfig
from gpt.models.gpt import GPT
from gpt.optim.build import build_optimizer, decay_groups, set_learning_rate
from gpt.optim.muon import orthogonalize

MODEL = GPTConfig(n_layer=2, n_head=2, n_kv_head=1, mlp="swiglu", n_embd=16, block_size=4, vocab_size=11)
CONFIG = OptimizerConfig(name="muon", muon_lr=0.05, weight_decay=0.2, beta1=0.8, beta2=0.9)


def matrices(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def train(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


def optimizer_of(model: GPT, precision: torch.dtype = torch.float32) -> torch.optim.Optimizer:
    hidden = model.hidden_matrices()
    optimizer = build_optimizer(model, CONFIG, max_lr=1e-2, hidden=hidden, precision=precision)
    set_learning_rate(optimizer, 0.5)
    return optimizer


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest() -> None:
    model = GPT(MODEL, seed=0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    matrices, *others = ({names[p] for p in group["params"]} for group in optimizer_of(model).param_groups)
    assert matrices == {name for name in names.values() if ".c_" in name and name.endswith("weight")}
    assert {name for group in others for name in group} == set(names.values()) - matrices
    assert others[0] == {"wte.weight", "wpe.weight"}


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_updates_match_torchs_muon_and_adamw(precision: torch.dtype) -> None:
    ours, theirs = GPT(MODEL, seed=0), GPT(MODEL, seed=0)
    train(ours, optimizer_of(ours, precision))
    hidden = theirs.hidden_matrices()
    pieces = {p: p.detach().split(parts) for p, parts in hidden.items()}  # torch does not split fused matrices
    muon = torch.optim.Muon([piece for own in pieces.values() for piece in own], lr=0.025, weight_decay=0.2)
    adamw = torch.optim.AdamW(
        decay_groups(theirs, 0.2, max_lr=0, without=hidden.keys()), lr=5e-3, betas=(0.8, 0.9), fused=True
    )

    def pass_gradients_on(*_: object) -> None:
        for p, own in pieces.items():
            for piece, grad in zip(own, p.grad.split(hidden[p]), strict=True):
                piece.grad = grad

    muon.register_step_pre_hook(pass_gradients_on)
    train(theirs, muon, adamw)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # torch orthogonalises in bfloat16, which rounds each of three updates of 0.025 to 8 bits
        atol = 1e-3 if mine in ours.hidden_matrices() else 0
        torch.testing.assert_close(mine, other, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("shape", [(3, 16, 48), (2, 48, 16), (1, 16, 16)])
def test_orthogonalize_brings_singular_values_near_one(shape: tuple[int, ...]) -> None:
    given = matrices(*shape)
    values = torch.linalg.svdvals(orthogonalize(given))
    assert values.min() > 0.6
    assert values.max() < 1.3
    u, _, vh = torch.linalg.svd(given, full_matrices=False)
    turned = u.mT @ orthogonalize(given) @ vh.mT  # diagonal, where the singular vectors are the given ones
    torch.testing.assert_close(turned, torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1)), atol=1e-4, rtol=0)


def test_matrices_of_a_batch_do_not_mix() -> None:
    given = matrices(3, 8, 8)
    torch.testing.assert_close(orthogonalize(given)[1:2], orthogonalize(given[1:2]))


def test_orthogonalize_of_zeros_is_zero() -> None:
    assert not orthogonalize(torch.zeros(1, 4, 4)).any()


def test_parameters_without_a_gradient_do_not_change() -> None:
    model = GPT(MODEL, seed=0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer_of(model).step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
