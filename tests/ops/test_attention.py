import shutil
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_mask

from gpt.configs.gpt_config import GPTConfig
from gpt.models.gpt import GPT
from gpt.ops import attention
from gpt.ops import attention_cpu as kernel
from gpt.ops.attention import DocumentMask, attend, positions_in_documents
from gpt.utils.helper import IGNORED

CONFIG = GPTConfig(n_layer=3, n_head=2, n_embd=32, block_size=1024, vocab_size=50)
IMPLEMENTATIONS = [(torch.float32, 32), (torch.bfloat16, 32), (torch.bfloat16, 64)]
"""Dtype and n_embd: SDPA, matmuls, and the kernel, which takes heads of 32 channels."""


def rows(*lengths: Sequence[int]) -> torch.Tensor:
    """Return (B, T) documents, given the lengths of each row's documents."""
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])


def make_documents(length: int) -> torch.Tensor:
    """Return documents of many lengths, one of a single token, in two rows of different layout."""
    return rows([length // 4 + 1, length // 3, 1, length - length // 4 - length // 3 - 2], [5, length - 12, 4, 3])


def random_tokens(documents: torch.Tensor) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, documents.shape, generator=torch.Generator().manual_seed(0))


def large_model(config: GPTConfig = CONFIG) -> GPT:
    """Return a model with weights larger than at init, so that attention is far from uniform."""
    model = GPT(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def test_positions_restart_with_each_document() -> None:
    documents = torch.tensor([[7, 7, 7, 8, 8, 9], [0, 1, 2, 2, 2, 2], [4, 4, 4, 4, 4, 4]])
    expected = [[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert positions_in_documents(documents).tolist() == expected


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(("dtype", "width"), IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [64, 100, 256, 1024])
def test_documents_are_isolated_bit_exactly(length: int, dtype: torch.dtype, width: int, dropout: float) -> None:
    model = large_model(CONFIG.model_copy(update={"dropout": dropout, "n_embd": width}))
    documents = make_documents(length)
    tokens = random_tokens(documents)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)  # drops the same weights
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(tokens, documents=documents)

    before = logits(tokens)
    assert before.dtype == dtype
    assert before.isfinite().all()
    for document in range(4):
        inside = documents == document
        after = logits(torch.where(inside, (tokens + 1) % CONFIG.vocab_size, tokens))
        assert torch.equal(before[~inside], after[~inside])
        assert (before[inside] != after[inside]).any(dim=-1).all()


@pytest.mark.parametrize(("dtype", "width"), IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [64, 100, 256, 1024])
def test_gradients_stay_inside_their_document(length: int, dtype: torch.dtype, width: int) -> None:
    model = large_model(CONFIG.model_copy(update={"n_embd": width}))
    documents = make_documents(length)
    tokens = random_tokens(documents)
    embedded: list[torch.Tensor] = []
    model.wte.register_forward_hook(lambda module, args, output: embedded.append(output))
    for document in range(4):
        inside = documents == document
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(tokens, torch.where(inside, tokens.roll(-1, dims=1), IGNORED), documents)
        (gradient,) = torch.autograd.grad(loss, embedded.pop())  # (B, T, C)
        assert not gradient[~inside].any()
        assert gradient.isfinite().all()
        assert gradient[inside].any(dim=-1).all()


def test_packed_documents_get_the_logits_they_get_alone() -> None:
    model = large_model()
    lengths = ([17, 40, 1, 6], [64], [1, 63])
    documents = rows(*lengths)
    tokens = random_tokens(documents)
    packed = model(tokens, documents=documents)
    for row, row_logits, row_lengths in zip(tokens, packed, lengths, strict=True):
        alone = [model(document[None])[0] for document in row.split(row_lengths)]
        torch.testing.assert_close(row_logits, torch.cat(alone), atol=2e-5, rtol=0)


def test_a_row_of_one_document_needs_no_mask() -> None:
    model = large_model()
    documents = torch.full((2, 100), 3)
    tokens = random_tokens(documents)
    torch.testing.assert_close(model(tokens, documents=documents), model(tokens), atol=2e-5, rtol=0)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_document_layouts_do_not_recompile() -> None:
    config = CONFIG.model_copy(update={"n_layer": 1})
    plain, compiled = large_model(config), large_model(config)
    compiled.compile(fullgraph=True)
    stance = "default"
    for documents in (make_documents(64), make_documents(64).flip(0)):
        tokens = random_tokens(documents)
        loss = plain(tokens, tokens, documents)
        with torch.compiler.set_stance(stance):
            compiled_loss = compiled(tokens, tokens, documents)
        assert compiled_loss.item() == pytest.approx(loss.item(), rel=1e-5)
        expected = torch.autograd.grad(loss, list(plain.parameters()))
        for mine, other in zip(torch.autograd.grad(compiled_loss, list(compiled.parameters())), expected, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-3)
        stance = "fail_on_recompile"


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use FlexAttention on the CPU, where it runs without gradients, and here without its compiler."""
    monkeypatch.setattr(attention, "supports_flex", lambda *args, **kwargs: True)
    monkeypatch.setattr(attention, "_compile", lambda function: torch.compile(function, backend="eager"))


@pytest.mark.parametrize("window", [0, 40])
def test_block_mask_equals_the_boolean_mask(flex_on_cpu: None, window: int) -> None:
    documents = make_documents(300)
    blocks = DocumentMask(documents, dropout=0, head_dim=16, dtype=torch.float32, window=window).blocks
    assert blocks is not None
    allowed = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
    if window:
        allowed = allowed.triu(1 - window)
    assert torch.equal(create_mask(blocks.mask_mod, 2, 1, 300, 300, device="cpu"), allowed)
    # At block granularity, which is all that the kernels read.
    padded = F.pad(allowed, (0, 84, 0, 84)).view(2, 1, 3, 128, 3, 128)
    assert torch.equal(blocks.to_dense().bool(), padded.any(dim=5).any(dim=3))


@pytest.mark.parametrize("model_is_compiled", [False, True])
def test_flex_attention_matches_sdpa(flex_on_cpu: None, model_is_compiled: bool) -> None:
    documents = make_documents(300)
    tokens = random_tokens(documents)
    model, plain = large_model(), large_model()
    if model_is_compiled:
        model.compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        given = model(tokens, documents=documents)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "supports_flex", lambda *args, **kwargs: False)
            expected = plain(tokens, documents=documents)
    torch.testing.assert_close(given, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("device", "dtype", "dropout", "head_dim", "serves"),
    [
        *(("cuda", torch.bfloat16, 0.0, 16, True), ("cuda", torch.float16, 0.0, 16, True)),
        *(("cuda", torch.float32, 0.0, 16, False), ("cuda", torch.bfloat16, 0.1, 64, False)),
        *(("cuda", torch.bfloat16, 0.0, 8, False), ("cpu", torch.bfloat16, 0.0, 64, False)),
    ],
)
def test_supports_flex_needs_an_ampere_gpu_triton_a_half_dtype_and_no_dropout(
    device: str, dtype: torch.dtype, dropout: float, head_dim: int, serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def supports() -> bool:
        return attention.supports_flex(torch.device(device), dtype, dropout=dropout, head_dim=head_dim)

    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "_flex_works", lambda *args: True)
    monkeypatch.setattr(attention, "HAS_TRITON", True)
    assert supports() == serves
    with monkeypatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert not supports()
    capability = (7, 5)
    assert not supports()
    capability = (9, 0)
    monkeypatch.setattr(attention, "HAS_TRITON", False)
    assert not supports()


def test_document_mask_is_boolean_where_flex_attention_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail_to_compile(function: object) -> None:
        raise RuntimeError("out of resource: shared memory\nRequired: 131072")

    monkeypatch.setattr(attention, "_is_ampere", lambda device: True)
    monkeypatch.setattr(attention, "_flex_works", attention._flex_works.__wrapped__)
    monkeypatch.setattr(attention, "HAS_TRITON", True)
    monkeypatch.setattr(attention, "_compile", fail_to_compile)
    documents = make_documents(300)
    mask = DocumentMask(documents, dropout=0, head_dim=16, dtype=torch.bfloat16)
    assert mask.blocks is None
    assert mask.allowed is not None
    assert "FlexAttention does not work here (out of resource: shared memory)" in caplog.text


def test_flex_attention_is_tried_with_gradients_also_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = list[tuple[bool, bool]]()

    def record(function: object) -> None:
        modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        raise RuntimeError("not compiled in this test")

    monkeypatch.setattr(attention, "_compile", record)
    with torch.inference_mode():
        attention._flex_works.__wrapped__(torch.device("cpu"), torch.bfloat16, 16)
    assert modes == [(False, True)]


def test_shared_heads_equal_repeated_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 40, 16, generator=generator, requires_grad=True) for heads in (6, 2, 2))
    results = []
    for shares in (False, True):
        monkeypatch.setattr(attention, "_supports_shared_heads", lambda *args, shares=shares: shares)
        out = attend(q, k, v, None, dropout=0.0)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dropout", [0.0, 1e-9])
def test_cuda_loss_and_gradients_match_cpu(dropout: float) -> None:
    config = CONFIG.model_copy(update={"dropout": dropout})
    cpu, cuda = large_model(config), large_model(config).cuda()
    documents = make_documents(300)
    tokens = random_tokens(documents)
    losses = cpu(tokens, tokens, documents), cuda(tokens.cuda(), tokens.cuda(), documents.cuda())
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-4)
    for loss in losses:
        loss.backward()
    for mine, other in zip(cpu.parameters(), cuda.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad.cpu(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("length", [1, 7, 64, attention.QUERY_BLOCK + 1, attention.SAVE_WEIGHTS_MAX_LEN + 88])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [16, 32])  # matmuls, and the kernel
def test_bfloat16_attention_matches_float32_sdpa_within_rounding(length: int, masked: bool, width: int) -> None:
    """Compare outputs and gradients, on a CPU."""
    torch.manual_seed(0)
    exact = [torch.randn(2, 3, length, width, requires_grad=True) for _ in range(3)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    documents = torch.arange(length).div(5, rounding_mode="floor").expand(2, -1)
    results = []
    for tensors in (exact, rounded):
        mask = DocumentMask(documents, dropout=0.0, head_dim=width, dtype=tensors[0].dtype) if masked else None
        out = attend(*tensors, mask, dropout=0.0)
        weight = torch.linspace(-1, 1, width)
        results.append([out, *torch.autograd.grad((out.float() * weight).sum(), tensors)])
    for expected, found in zip(*results, strict=True):
        assert found.dtype == torch.bfloat16
        assert (expected - found.float()).norm() <= 0.02 * expected.norm() + 1e-6


@pytest.mark.parametrize("window", [1, 6, 100, 299])
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 16), (torch.bfloat16, 16), (torch.bfloat16, 32)])
def test_a_sliding_window_limits_what_each_token_attends_to(
    window: int, has_documents: bool, dtype: torch.dtype, width: int
) -> None:
    torch.manual_seed(0)
    exact = [torch.randn(2, 3, 300, width, requires_grad=True) for _ in range(3)]
    tensors = [x.detach().to(dtype).requires_grad_() for x in exact]
    documents = make_documents(300) if has_documents else torch.zeros(2, 300, dtype=torch.int64)
    distances = torch.arange(300)[:, None] - torch.arange(300)
    allowed = (distances >= 0) & (distances < window) & (documents[:, None, :, None] == documents[:, None, None, :])
    mask = DocumentMask(documents, dropout=0.0, head_dim=width, dtype=dtype, window=window)
    outs = F.scaled_dot_product_attention(*exact, attn_mask=allowed), attend(*tensors, mask, dropout=0.0)
    weight = torch.linspace(-1, 1, width)
    results = [
        [out, *torch.autograd.grad((out.float() * weight).sum(), inputs)]
        for out, inputs in zip(outs, (exact, tensors), strict=True)
    ]
    for expected, found in zip(*results, strict=True):
        assert (expected - found.float()).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * expected.norm() + 1e-4


def test_a_model_with_a_sliding_window_sees_no_further() -> None:
    config = CONFIG.model_copy(update={"n_layer": 1, "sliding_window": 10})
    model = large_model(config)
    tokens = random_tokens(rows([64], [64]))
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % CONFIG.vocab_size
    differs = (model(tokens) != model(changed)).any(dim=-1)
    assert differs[:, 20:30].all()
    assert not differs[:, :20].any() and not differs[:, 30:].any()
    short = tokens[:, :10]
    assert torch.equal(model(short), large_model(config.model_copy(update={"sliding_window": 0}))(short))


@pytest.mark.skipif(not kernel.is_enabled(), reason="no compiler at installation, or no AVX512_BF16")
def test_second_derivatives_of_the_kernel_are_an_error() -> None:
    q = torch.randn(1, 1, 8, 32, dtype=torch.bfloat16, requires_grad=True)
    (gradient,) = torch.autograd.grad(attend(q, q, q, None, dropout=0.0).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_recomputed_attention_weights_keep_every_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 300, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    results = []
    for longest in (300, 299):
        monkeypatch.setattr(attention, "SAVE_WEIGHTS_MAX_LEN", longest)
        out = attend(*tensors, None, dropout=0.0)
        results.append(torch.autograd.grad(out.square().sum(), tensors))
    for saved, recomputed in zip(*results, strict=True):
        assert torch.equal(saved, recomputed)


@pytest.mark.parametrize(("length", "saved"), [(512, 256 * 256 + 256 * 512), (1024, 0)])
def test_attention_weights_of_long_rows_are_not_saved(length: int, saved: int) -> None:
    """Count what is saved besides q, k and v: for 512 tokens two blocks of 256 queries, with 256 and 512 keys."""
    q = torch.randn(1, 1, length, 16, dtype=torch.bfloat16, requires_grad=True)
    tensors: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensors.append(tensor) or tensor, lambda tensor: tensor
    ):
        attend(q, q, q, None, dropout=0.0)
    assert sum(tensor.numel() for tensor in tensors) - 3 * length * 16 == saved
