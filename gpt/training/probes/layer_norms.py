"""The probe behind `--log.grad-norms`: norms of each layer's gradient and weights."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import nn

from gpt.training.observer import Probe


class LayerNorms(Probe):
    """`grad_norm/LAYER` and `param_norm/LAYER`, where LAYER is wte, wpe, h.0, h.1, ..., ln_f or lm_head."""

    def measure(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """Return the 2-norms of each layer; a layer without gradients has no `grad_norm`."""
        weights: dict[str, list[torch.Tensor]] = defaultdict(list)
        gradients: dict[str, list[torch.Tensor]] = defaultdict(list)
        for name, parameter in parameters.items():
            layer = find_layer(name)
            weights[layer].append(parameter)
            if parameter.grad is not None:
                gradients[layer].append(parameter.grad)
        norms = {f"grad_norm/{layer}": nn.utils.get_total_norm(tensors) for layer, tensors in gradients.items()}
        return norms | {f"param_norm/{layer}": nn.utils.get_total_norm(tensors) for layer, tensors in weights.items()}


def find_layer(parameter: str) -> str:
    """Return the layer of a parameter: `h.0.attn.c_attn.weight` -> `h.0`, `wte.weight` -> `wte`."""
    first, second, *_ = parameter.split(".")
    return f"{first}.{second}" if second.isdigit() else first
