"""The MLP's activations, by their names in GPTConfig; large outputs are recomputed in backward.

To add one: docs/extending.md, "A model family".
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from gpt.ops.gelu import gelu
from gpt.ops.recompute import recompute_in_backward


def relu2(x: torch.Tensor) -> torch.Tensor:
    """Return the squared ReLU (So et al. 2021, "Primer", section 4)."""
    return F.relu(x).square()


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """Return SiLU(gate) * value (Shazeer 2020, equation 6), whose gate is the first half of the channels.

    Args:
        x: (..., 2F).

    Returns:
        (..., F).
    """
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": partial(recompute_in_backward, gelu),
    "gelu_erf": partial(recompute_in_backward, F.gelu),  # x * Phi(x) (Hendrycks and Gimpel 2016, section 2)
    "relu2": partial(recompute_in_backward, relu2),
    "swiglu": partial(recompute_in_backward, swiglu),
}
