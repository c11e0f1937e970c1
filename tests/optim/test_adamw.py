import subprocess
import sys

import torch

from gpt.optim.adamw import AdamW

ONE_STEP = """
import sys
import torch
from gpt.optim.adamw import AdamW

p = torch.nn.Parameter(torch.ones(3))
optimizer = AdamW([{"params": [p], "weight_decay": 0.1}], betas=(0.9, 0.95))
p.grad = torch.ones(3)
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
assert p.grad is None
sys.exit("torch._dynamo" in sys.modules)
"""


def test_updates_are_bit_exact_with_torchs_fused_adamw() -> None:
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(5, 7)), torch.nn.Parameter(torch.randn(33))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    groups = [[{"params": [first], "weight_decay": 0.2}, {"params": [last], "weight_decay": 0.0}] for first, last in
              (ours, theirs)]  # fmt: skip
    optimizer = AdamW(groups[0], betas=(0.8, 0.9))
    reference = torch.optim.AdamW(groups[1], betas=(0.8, 0.9), fused=True)
    for step in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = 1e-2 * (step + 1)
        optimizer.step()
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
        assert optimizer.state[mine].keys() == reference.state[other].keys()
        for key, value in optimizer.state[mine].items():
            assert torch.equal(value, reference.state[other][key])


def test_adamw_does_not_import_torchs_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", ONE_STEP], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
