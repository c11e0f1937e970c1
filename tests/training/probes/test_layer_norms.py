import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt.configs.gpt_config import GPTConfig
from gpt.configs.train_config import TrainConfig
from gpt.models.gpt import GPT
from gpt.pipeline import build_trainer
from gpt.run import open_run
from gpt.training.metrics import Meter
from gpt.training.probes.layer_norms import LayerNorms, find_layer

Configure = Callable[..., TrainConfig]


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("wte.weight", "wte"),
        ("wpe.weight", "wpe"),
        ("h.0.attn.c_attn.weight", "h.0"),
        ("h.11.ln_1.bias", "h.11"),
        ("ln_f.weight", "ln_f"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_layer_of_a_parameter(parameter: str, layer: str) -> None:
    assert find_layer(parameter) == layer


def test_norms_are_those_of_all_parameters_of_a_layer() -> None:
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=13), seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    norms = LayerNorms().measure(dict(model.named_parameters()))
    layers = {"wte": model.wte, "wpe": model.wpe, "h.0": model.h[0], "h.1": model.h[1], "ln_f": model.ln_f}
    assert norms.keys() == {f"{kind}_norm/{layer}" for kind in ("grad", "param") for layer in layers}
    for name, module in layers.items():
        assert module is not None
        weights = torch.cat([p.detach().double().flatten() for p in module.parameters()])
        gradients = torch.cat([p.grad.double().flatten() for p in module.parameters() if p.grad is not None])
        assert norms[f"param_norm/{name}"].item() == pytest.approx(float(weights.norm()), rel=1e-6)
        assert norms[f"grad_norm/{name}"].item() == pytest.approx(float(gradients.norm()), rel=1e-6)


def test_layer_without_gradient_has_no_gradient_norm() -> None:
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=13), seed=0)
    assert all(name.startswith("param_norm/") for name in LayerNorms().measure(dict(model.named_parameters())))


def test_run_logs_norms_whose_squares_add_up_to_the_squared_gradient_norm(tiny: Configure, tmp_path: Path) -> None:
    log = {"interval": 2, "grad_norms": True}
    build_trainer(open_run(tiny(tmp_path, max_steps=4, grad_clip=0.01, log=log))).train()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    reports = [record for record in records if "train/loss" in record]
    assert [report["step"] for report in reports] == [1, 2, 4]
    for report in reports:
        norms = {name: value for name, value in report.items() if name.startswith("grad_norm/")}
        assert norms.keys() == {f"grad_norm/{layer}" for layer in ("wte", "wpe", "h.0", "h.1", "ln_f")}
        assert math.hypot(*norms.values()) == pytest.approx(report["grad_norm"], rel=1e-5)
        assert sum(name.startswith("param_norm/") for name in report) == len(norms)


def test_norms_cost_the_report_no_host_sync(tiny: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs: list[int] = []
    plain, report = torch.Tensor.tolist, Meter.report

    def counted_report(meter: Meter) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", lambda tensor: (syncs.append(tensor.numel()), plain(tensor))[1])
            patch.setattr(torch.Tensor, "item", lambda tensor: pytest.fail("a second host sync"))
            return report(meter)

    monkeypatch.setattr(Meter, "report", counted_report)
    for grad_norms in (False, True):
        log = {"interval": 2, "grad_norms": grad_norms}
        build_trainer(open_run(tiny(tmp_path / str(grad_norms), max_steps=3, log=log))).train()
    losses_norms_skips = [3, 3, 3]  # one sync in each report, of steps 1, 2 and 3
    assert syncs == losses_norms_skips + [numbers + 2 * 5 for numbers in losses_norms_skips]  # of five layers
