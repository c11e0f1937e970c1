"""How the model is made ready to train: what it keeps for the backward pass."""

from typing import Literal

from gpt.configs.base import Config


class ParallelConfig(Config):
    """What is applied to the model; none of it changes what is computed."""

    activation_checkpointing: Literal["none", "block", "selective"] = "none"
    """Less memory for more arithmetic: block makes each block's activations again in the backward pass; selective keeps
    its products of matrices and makes the rest again."""
