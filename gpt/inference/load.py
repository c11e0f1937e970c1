"""Loading of a trained model for inference."""

import logging
from pathlib import Path

import torch

from gpt.checkpoint.app_state import load_model_tensors
from gpt.checkpoint.run_folder import find_run, locate_checkpoint
from gpt.checkpoint.store import read_weights
from gpt.configs.load import load_config
from gpt.data.chat_template import find_chat_template
from gpt.data.tokenizer import Tokenizer
from gpt.device_check import choose_device
from gpt.errors import UserError
from gpt.inference.bfloat16 import round_weights_to_bfloat16
from gpt.inference.language_model import LanguageModel
from gpt.machine.arithmetic_check import require_right_arithmetic
from gpt.machine.cpu_runtime import initialize_vector_math, match_openmp_team
from gpt.machine.hardware import detect_machine
from gpt.machine.spinning import sleep_when_busy
from gpt.models.gpt import GPT
from gpt.utils.helper import format_count

log = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16")
"""Values of `dtype`."""


def load_for_inference(path: Path, device: str, dtype: str = "auto") -> LanguageModel:
    """Load a trained model and its tokenizer from a run folder (its newest checkpoint) or a checkpoint.

    Args:
        path: run folder or checkpoint.
        device: auto, cpu, cuda or mps.
        dtype: dtype of weights and matmuls, float32 or bfloat16; auto: bfloat16 if the hardware has it.

    Raises:
        UserError: another device or dtype, there is no checkpoint, it is damaged, or this machine multiplies wrongly.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: one of {', '.join(DTYPES)}")
    initialize_vector_math()
    match_openmp_team()
    sleep_when_busy(torch.get_num_threads())
    checkpoint = locate_checkpoint(path, "RUN_DIR")
    run_path = find_run(checkpoint).path
    tokenizer, chat_template = Tokenizer.from_folder(run_path), find_chat_template(run_path)
    weights = read_weights(checkpoint)
    saved = load_config(checkpoint / "config.json")
    config = saved.model
    embedding = weights.get("wte.weight", torch.empty(0))
    config = config.model_copy(update={"vocab_size": len(embedding)})
    n_weights = sum(tensor.numel() for tensor in weights.values())
    if config.n_parameters != n_weights:  # before the model is allocated
        raise UserError(
            f"{checkpoint}: config.json describes a model of {format_count(config.n_parameters)} parameters, but the "
            f"weights have {format_count(n_weights)}; use a checkpoint as it was saved"
        )
    used_device, notes = choose_device(device, saved.model, saved.data.cache_dir)
    for note in notes:
        log.warning("%s", note)
    model = GPT.build_empty(config, torch.device(used_device))
    load_model_tensors(model, weights)
    used = next(model.parameters()).device
    machine = detect_machine(used.type, world_size=1)
    if dtype == "auto":
        dtype = "bfloat16" if machine.has_bfloat16 else "float32"
    require_right_arithmetic(used, machine.device_name, dtype, model.config, config.block_size, saved.data.cache_dir)
    if dtype == "bfloat16":
        round_weights_to_bfloat16(model)
    return LanguageModel(model.eval(), tokenizer, getattr(torch, dtype), chat_template)
