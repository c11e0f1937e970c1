"""The Triton kernel against the loss in torch's operations, by Triton's interpreter on the CPU."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
COMPARISON = """
import torch
from gpt.ops import cross_entropy_triton as kernel
from gpt.ops.cross_entropy import _compute_tile
from gpt.utils.helper import IGNORED

kernel.BLOCK = 64
for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
    for n_vocab in (50, 64, 200):
        for softcap in (0.0, 3.0):
            for grad_scale in (1.0, 1024.0):
                generator = torch.Generator().manual_seed(n_vocab)
                logits = (4 * torch.randn(9, n_vocab, generator=generator)).to(dtype)
                targets = torch.randint(n_vocab, (9,), generator=generator)
                targets[[2, 5]] = IGNORED
                expected = logits.clone()
                loss = _compute_tile(expected, targets, softcap, into_gradient=True, grad_scale=grad_scale)
                expected[targets == IGNORED] = 0
                forward_only = logits.clone()
                ours = kernel.compute_chunk(forward_only, targets, softcap, into_gradient=False, grad_scale=1.0)
                assert torch.equal(forward_only, logits)
                torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-5)
                ours = kernel.compute_chunk(logits, targets, softcap, into_gradient=True, grad_scale=grad_scale)
                torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance * grad_scale)
logits = torch.zeros(2, 70)
logits[1, 69] = torch.nan
assert kernel.compute_chunk(logits, torch.tensor([1, 2]), 0.0, into_gradient=True, grad_scale=1.0).isnan()
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_kernel_equals_the_loss_in_torchs_operations() -> None:
    # The interpreter is chosen when a kernel is defined, by an environment variable.
    code = 'import os; os.environ["TRITON_INTERPRET"] = "1"\n' + COMPARISON
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
