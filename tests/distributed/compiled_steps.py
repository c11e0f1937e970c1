"""Started by torchrun: one step under DDP in each activation checkpointing mode, compiled; prints facts as JSON."""

import json
import sys
from functools import partial

import torch
import torch._dynamo

from gpt.auto_batch import trial_loss
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.parallel_config import ParallelConfig
from gpt.models.gpt import GPT
from gpt.parallel.parallelize import build_gradient_sync, compile_or_fall_back, parallelize
from gpt.utils.distributed import DistContext

# Several of DDP's buckets of 25 MB.
CONFIG = GPTConfig(n_layer=3, n_head=4, n_embd=512, block_size=32, vocab_size=10_000)


def run_step(dist: DistContext, mode: str) -> dict[str, object]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = GPT(CONFIG, seed=0)
    parallel = ParallelConfig.model_validate({"activation_checkpointing": mode})
    ddp = parallelize(model, model.h, dist, parallel, compile_mode="default", others=[model.loss])
    trial = partial(
        trial_loss,
        n_sequences=1,
        block_size=32,
        masked=False,
        device=dist.device,
        autocast=partial(torch.autocast, "cpu", enabled=False),
    )
    is_compiled = compile_or_fall_back(model, ddp, trial, dist) == ""
    gradients = build_gradient_sync(ddp, dist, parallel)
    tokens = torch.randint(CONFIG.vocab_size, (2, 2, 33), generator=torch.Generator().manual_seed(0))
    with torch.compiler.set_stance("fail_on_recompile"):
        for index, row in enumerate(tokens[dist.rank].split(1)):
            with gradients.micro_batch(is_last=index == 1):
                (ddp(row[:, :-1].flatten()[None], row[:, 1:].flatten()[None]) * gradients.loss_factor).backward()
    gradients.finish()
    counters = torch._dynamo.utils.counters
    grad = model.h[1].mlp.c_fc.weight.grad
    assert grad is not None
    return {
        "is_compiled": is_compiled,
        "is_ddp": ddp is not model,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "grad_norm": grad.norm().item(),
    }


def main() -> None:
    torch.set_num_threads(1)
    dist = DistContext("cpu")
    facts = {mode: run_step(dist, mode) for mode in ("none", "block", "selective")}
    if dist.is_main:
        print(json.dumps(facts))
    dist.close()


main()
sys.stdout.flush()
