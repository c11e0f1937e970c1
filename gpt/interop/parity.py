"""The same weights here and in transformers: logits, loss, every gradient and one optimizer step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gpt.data.tokenizer import Tokenizer
from gpt.interop.huggingface import Tensors, export_tensors, import_tensors
from gpt.interop.proof import build_rows
from gpt.interop.transformers_runtime import build_model
from gpt.models.gpt import GPT
from gpt.optim.adamw import EPSILON, AdamW

LR, BETAS, WEIGHT_DECAY = 1e-3, (0.9, 0.95), 0.1
"""Settings of the optimizer step."""


@dataclass(frozen=True)
class Difference:
    """Largest difference between two sides, and where it is."""

    quantity: str
    """Compared quantity: logits, loss, gradients or weights after a step."""
    difference: float
    scale: float
    """Largest absolute value of the quantity here."""
    place: str

    @property
    def relative(self) -> float:
        """Difference relative to the scale, or to 1 where the scale is smaller."""
        return self.difference / max(1.0, self.scale)


def compare_with_transformers(model: GPT, tokenizer: Tokenizer) -> list[Difference]:
    """Compare a model on the CPU with the same weights in transformers, in float32.

    The batch is text that the model has not seen, and random ids.

    Raises:
        UserError: no class of transformers has this configuration.
    """
    theirs = build_model(dict(model.state_dict()), model.config)
    rows = build_rows(tokenizer, model)
    length = max(2, min(map(len, rows)))
    tokens = torch.tensor([row[:length] for row in rows])  # (B, T)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with torch.no_grad():
        logits, their_logits = model(inputs), theirs(inputs).logits
    differences = [_compare_logits(logits, their_logits)]
    loss = model(inputs, targets) / targets.numel()
    their_loss = theirs(tokens, labels=tokens).loss
    differences.append(Difference("loss", abs(loss.item() - their_loss.item()), abs(loss.item()), "mean over tokens"))
    loss.backward()
    their_loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    differences.append(_compare_tensors("gradients", gradients, _read_gradients(theirs, model)))
    differences.append(_compare_optimizer_steps(model, theirs, gradients))
    return differences


def _read_gradients(theirs: Any, model: GPT) -> Tensors:
    return import_tensors({name: parameter.grad for name, parameter in theirs.named_parameters()}, model.config)


def _compare_optimizer_steps(model: GPT, theirs: Any, gradients: Tensors) -> Difference:
    """Compare the weights after one step from the same gradients.

    Adam divides a gradient by its own size, so from gradients of their own the two sides would make a full step of
    rounding where a gradient is 0, as that of a bias of keys is: a softmax ignores what all its inputs share.
    """
    named = dict(theirs.named_parameters())
    for name, gradient in export_tensors(gradients, model.config).items():
        named[name].grad = gradient
    AdamW([{"params": list(model.parameters()), "lr": LR, "weight_decay": WEIGHT_DECAY}], betas=BETAS).step()
    torch.optim.AdamW(theirs.parameters(), lr=LR, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY).step()
    after = {name: parameter.detach() for name, parameter in model.named_parameters()}
    their_weights = {name: parameter.detach() for name, parameter in theirs.named_parameters()}
    return _compare_tensors("weights after a step", after, import_tensors(their_weights, model.config))


def _compare_logits(mine: torch.Tensor, theirs: torch.Tensor) -> Difference:
    distances = (mine - theirs).abs()
    row, token, index = (int(part) for part in torch.unravel_index(distances.argmax(), distances.shape))
    place = f"sequence {row}, token {token}, id {index}"
    return Difference("logits", float(distances.max()), float(mine.abs().max()), place)


def _compare_tensors(quantity: str, mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> Difference:
    largest, scale, place = -1.0, 0.0, ""
    for name, tensor in mine.items():
        distances = (tensor - theirs[name]).abs()
        scale = max(scale, float(tensor.abs().max()))
        if not float(distances.max()) <= largest:  # NaN is the largest
            index = [int(part) for part in torch.unravel_index(distances.argmax(), distances.shape)]
            largest, place = float(distances.max()), f"{name}{index}"
    return Difference(quantity, largest, scale, place)
