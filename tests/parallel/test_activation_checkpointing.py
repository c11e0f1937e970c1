import pytest
import torch

from gpt.configs.gpt_config import GPTConfig
from gpt.machine.memory import LiveMemory
from gpt.models.gpt import GPT
from gpt.ops import recompute
from gpt.parallel.activation_checkpointing import checkpoint_activations

MODERN = {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "n_kv_head": 1}
TOKENS = torch.randint(50, (4, 32), generator=torch.Generator().manual_seed(0))
DOCUMENTS = torch.arange(32).div(10, rounding_mode="floor").repeat(4, 1)


def make(mode: str, **changes: object) -> GPT:
    sizes = {"n_layer": 3, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 50} | changes
    model = GPT(GPTConfig.model_validate(sizes), seed=0)
    checkpoint_activations(model.h, mode)
    return model


@pytest.mark.parametrize("changes", [{"dropout": 0.2}, MODERN], ids=["gpt2", "modern"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("mode", ["block", "selective"])
@pytest.mark.parametrize("min_bytes", [recompute.RECOMPUTE_MIN_BYTES, 0], ids=["small", "large"])
def test_checkpointing_keeps_every_bit(
    min_bytes: int,
    mode: str,
    documents: torch.Tensor | None,
    dtype: torch.dtype,
    changes: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recompute, "RECOMPUTE_MIN_BYTES", min_bytes)
    results = []
    for model in (make("none", **changes), make(mode, **changes)):
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(TOKENS, TOKENS, documents)
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpointing_saves_less_for_backward(dtype: torch.dtype) -> None:
    saved: dict[str, int] = {}
    live: dict[str, int] = {}
    for mode in ("none", "block", "selective"):
        model, tensors = make(mode), []  # type: ignore[var-annotated]
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda x, t=tensors: t.append(x) or x, lambda x: x),  # type: ignore[misc]
            LiveMemory() as memory,
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        ):
            loss = model(TOKENS, TOKENS)
        saved[mode] = sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())
        live[mode] = memory.now
        loss.backward()
    assert saved["block"] < saved["none"] / 2
    # The outputs that selective saves do not pass through autograd's hooks; all live tensors are counted instead.
    assert live["block"] < live["selective"] * 0.8 < live["none"] * 0.7


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_checkpointing_changes_no_name_and_no_output(mode: str) -> None:
    plain, model = make("none"), make(mode)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    with torch.no_grad():
        assert torch.equal(model.eval()(TOKENS), plain.eval()(TOKENS))


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_checkpointed_models_compile_without_graph_breaks(mode: str) -> None:
    results = []
    for model in (make("none", n_layer=1), make(mode, n_layer=1)):
        if results:
            model.compile(fullgraph=True, backend="aot_eager")  # traced and partitioned as for the default backend
        loss = model(TOKENS, TOKENS)
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
