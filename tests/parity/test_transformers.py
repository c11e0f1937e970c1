"""The same weights in transformers' GPT-2 and here: same logits, same loss, same gradients."""

from collections.abc import Iterator

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gpt.configs.gpt_config import GPTConfig
from gpt.models.gpt import GPT

TOLERANCE = 1e-5
Pair = tuple[GPT, GPT2LMHeadModel]


def named_pairs(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, our tensor, their tensor in our layout: transformers' Conv1D holds its weight transposed."""
    for name, tensor in ours.items():
        other = theirs[f"transformer.{name}"]
        is_linear = name.endswith("weight") and ".c_" in name
        yield name, tensor, other.t() if is_linear else other


@pytest.fixture(scope="module", params=[(2, 2, 32, 16, 101), (3, 4, 64, 33, 257)], ids=["even", "odd"])
def pair(request: pytest.FixtureRequest) -> Pair:
    n_layer, n_head, n_embd, block_size, vocab_size = request.param
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "vocab_size": vocab_size}
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=block_size, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **sizes))
    with torch.no_grad():  # larger than at init, so that every path matters
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ours = GPT(GPTConfig(block_size=block_size, **sizes), seed=1)
    with torch.no_grad():
        for _, mine, other in named_pairs(dict(ours.named_parameters()), dict(theirs.named_parameters())):
            mine.copy_(other)
    return ours, theirs


@pytest.fixture
def tokens(pair: Pair) -> torch.Tensor:
    config = pair[0].config
    return torch.randint(config.vocab_size, (3, config.block_size), generator=torch.Generator().manual_seed(2))


def test_parameter_counts_match(pair: Pair) -> None:
    ours, theirs = (sum(p.numel() for p in model.parameters()) for model in pair)
    assert ours == theirs


def test_logits(pair: Pair, tokens: torch.Tensor) -> None:
    torch.testing.assert_close(pair[0](tokens), pair[1](tokens).logits, atol=TOLERANCE, rtol=0)


def test_logits_of_a_shorter_context(pair: Pair, tokens: torch.Tensor) -> None:
    torch.testing.assert_close(pair[0](tokens[:, :7]), pair[1](tokens[:, :7]).logits, atol=TOLERANCE, rtol=0)


def test_logits_of_documents_packed_in_a_row(pair: Pair, tokens: torch.Tensor) -> None:
    ours, theirs = pair
    length = tokens.shape[1]
    lengths = [length // 3, 1, length // 2, length - length // 3 - 1 - length // 2]
    documents = torch.arange(4).repeat_interleave(torch.tensor(lengths)).expand_as(tokens)
    alone = [theirs(document).logits for document in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(ours(tokens, documents=documents), torch.cat(alone, dim=1), atol=TOLERANCE, rtol=0)


def test_loss_and_gradients(pair: Pair, tokens: torch.Tensor) -> None:
    ours, theirs = pair
    ours.zero_grad()
    theirs.zero_grad()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss = ours(inputs, targets) / targets.numel()
    their_loss = theirs(tokens, labels=tokens).loss
    assert abs(loss.item() - their_loss.item()) < TOLERANCE
    loss.backward()
    their_loss.backward()
    gradients = [{n: p.grad for n, p in model.named_parameters()} for model in pair]
    for name, mine, other in named_pairs(*gradients):
        torch.testing.assert_close(mine, other, atol=TOLERANCE, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_initial_weights_have_the_same_mean_and_std() -> None:
    sizes = {"n_layer": 6, "n_head": 4, "n_embd": 128, "vocab_size": 400}
    torch.manual_seed(0)
    theirs = dict(GPT2LMHeadModel(GPT2Config(n_positions=64, **sizes)).named_parameters())
    ours = dict(GPT(GPTConfig(block_size=64, **sizes), seed=0).named_parameters())
    for name, mine, other in named_pairs(ours, theirs):
        assert mine.mean().item() == pytest.approx(other.mean().item(), abs=2e-3), name
        assert mine.std().item() == pytest.approx(other.std().item(), rel=0.05, abs=1e-9), name


def test_greedy_generation(pair: Pair, tokens: torch.Tensor) -> None:
    from gpt.configs.observer_config import SampleConfig
    from gpt.inference.generate import Completion, generate

    ours, theirs = pair
    prompt = tokens[:1, :4]
    expected = theirs.eval().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=10,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )[0, 4:]
    completion = Completion(prompt[0].tolist(), SampleConfig(max_new_tokens=10, temperature=0), seed=0)
    for _ in generate(ours, ours.config, [completion], vocab_size=ours.config.vocab_size, end_of_text=None):
        pass
    assert completion.tokens == expected.tolist()
