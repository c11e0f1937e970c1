"""Names of other trainers for what this one has: nanoGPT, Hugging Face's Trainer, litgpt, torchtitan, Megatron."""

FLAG_SYNONYMS = {
    # Length of a run
    "max-steps": "max-iters iters iterations num-iterations max-iterations steps n-steps num-steps total-steps "
    "training-steps train-iters max-train-steps num-train-steps num-training-steps",
    "max-tokens": "tokens total-tokens num-tokens train-tokens max-train-tokens token-budget",
    "epochs": "epoch num-epochs n-epochs max-epochs num-train-epochs train-epochs",
    # Batch
    "micro-batch-size": "batch-size batch bs mbs micro-batch train-batch-size per-device-train-batch-size "
    "per-device-batch-size device-batch-size local-batch-size train-micro-batch-size-per-gpu",
    "tokens-per-step": "total-batch-size tokens-per-batch tokens-per-update batch-size-tokens batch-tokens",
    # Model
    "model.n-layer": "n-layers num-layers layers num-hidden-layers depth n-blocks num-blocks",
    "model.n-head": "n-heads num-heads heads num-attention-heads",
    "model.n-kv-head": "n-kv-heads num-kv-heads num-key-value-heads n-query-groups num-query-groups",
    "model.n-embd": "hidden-size d-model dim n-embed embed-dim embedding-dim embd-dim emb-dim model-dim width",
    "model.intermediate-size": "d-ff ffn-dim ffn-hidden-size mlp-hidden-size n-inner mlp-dim feedforward-dim",
    "model.block-size": "context-length context-size context ctx-len n-ctx n-positions seq-len seq-length "
    "sequence-length max-seq-len max-seq-length max-length max-position-embeddings",
    "model.dropout": "dropout-rate attention-dropout hidden-dropout attn-pdrop resid-pdrop embd-pdrop",
    "model.position": "pos-emb positional-encoding position-embedding-type",
    "model.position rotary": "rope use-rope",
    "model.rope-theta": "rope-base rotary-base",
    "model.norm": "norm-type normalization norm-class-name",
    "model.norm-eps": "layer-norm-eps layer-norm-epsilon layernorm-epsilon rms-norm-eps",
    "model.mlp": "activation hidden-act activation-function activation-fn",
    "model.tie-embeddings": "tie-word-embeddings weight-tying tie-weights",
    # Optimizer and learning rate
    "lr.max-lr": "lr learning-rate peak-lr base-lr max-learning-rate adam-lr",
    "lr.min-lr": "min-learning-rate final-lr end-lr lr-min",
    "lr.warmup-steps": "warmup warmup-iters num-warmup-steps lr-warmup-iters lr-warmup-steps",
    "lr.decay-steps": "decay-iters lr-decay-iters lr-decay-steps cooldown-steps",
    "lr.schedule": "scheduler lr-scheduler lr-scheduler-type lr-decay-style lr-schedule",
    "lr.schedule constant": "no-decay-lr",
    "optimizer.name": "optim optimizer optimizer-type optimizer-name",
    "optimizer.weight-decay": "wd",
    "optimizer.beta1": "adam-beta1 betas",
    "optimizer.beta2": "adam-beta2 betas",
    "grad-clip": "clip clip-grad clip-gradient clip-grad-norm max-norm max-grad-norm max-gradient-norm "
    "gradient-clip-val gradient-clipping",
    # Data
    "data.source": "data dataset dataset-name dataset-path data-path data-dir data-file train-data train-file "
    "train-files train-data-path train-data-dir input input-file corpus text file",
    "data.val-source": "val-data valid-data validation-data eval-data val-file validation-file eval-file",
    "data.val-fraction": "val-split validation-split val-ratio test-size validation-split-percentage",
    "data.text-field": "text-column text-column-name text-key dataset-text-field json-key json-keys",
    "data.tokenizer": "tokenizer-name tokenizer-path tokenizer-type tokenizer-dir tokenizer-model tokenizer-file",
    "data.workers": "num-workers num-proc n-workers preprocessing-num-workers dataloader-num-workers",
    # Run, checkpoints and reports
    "run-dir": "out output out-dir output-dir log-dir logdir save-dir save results-dir dump-folder checkpoint-dir "
    "ckpt-dir exp-dir run-name",
    "seed": "random-seed manual-seed rng-seed",
    "config": "config-file config-path cfg",
    "resume": "resume-from resume-from-checkpoint load load-checkpoint ckpt ckpt-path",
    "init-from": "pretrained from-pretrained model-name-or-path finetune load-weights init-weights weights "
    "initial-checkpoint-dir",
    "log.interval": "logging-steps log-every log-every-n-steps log-freq print-every print-freq",
    "eval.interval": "eval-steps eval-every val-every val-interval val-check-interval val-loss-every eval-freq",
    "eval.batches": "eval-iters max-eval-iters limit-val-batches val-batches",
    "checkpoint.interval": "save-steps save-interval save-every save-freq checkpoint-every ckpt-interval "
    "checkpointing-steps always-save-checkpoint",
    "checkpoint.keep": "save-total-limit keep-last keep-last-n keep-latest-k max-checkpoints",
    "checkpoint.keep-best": "save-best load-best-model-at-end",
    "checkpoint.asynchronous": "async async-save async-mode async-checkpointing",
    "parallel.activation-checkpointing": "activation-checkpoint gradient-checkpointing grad-checkpointing recompute",
    "profile.steps": "profile profiler",
    # Machine
    "device": "accelerator device-type",
    "device cuda": "gpu cuda use-cuda use-gpu",
    "device cpu": "cpu use-cpu no-cuda",
    "dtype": "precision mixed-precision torch-dtype compute-dtype amp",
    "dtype float16": "fp16 float16 half",
    "dtype bfloat16": "bf16 bfloat16",
    "dtype float32": "fp32 float32",
    "compile": "torch-compile use-compile compile-model",
    "runtime.threads": "num-threads n-threads omp-num-threads",
    # gpt sample, gpt prepare and the tools
    "sample.prompts": "prompt start",
    "prompt": "start text input prompts",
    "max-new-tokens": "max-tokens max-length length n-tokens num-tokens n-predict",
    "temperature": "temp",
    "temperature 0": "greedy no-do-sample",
    "out": "output output-dir out-dir output-prefix",
    "val-source": "val-data validation-data val-file validation-file",
    "text-field": "text-column text-key json-key json-keys",
    "tokenizer": "tokenizer-name tokenizer-path tokenizer-type tokenizer-model",
    "workers": "num-workers num-proc n-workers",
    "step": "iter iteration",
    "kills": "n num-kills times",
    "dry-run": "dry check plan",
}
"""Field here, perhaps with a value -> its names in other trainers, with hyphens."""

_ACCUMULATION = (
    "it is derived: tokens_per_step / (micro_batch_size * block_size * processes); set --tokens-per-step and "
    "--micro-batch-size"
)
_SEQUENCES = "--tokens-per-step sets the global batch in tokens: sequences * --model.block-size"
_WARMUP = "warmup is counted in steps: --lr.warmup-steps"
_PROCESSES = "torchrun --nproc-per-node N starts N processes; docs/distributed.md shows how"
_RECORDERS = "metrics are written to metrics.jsonl in --run-dir; docs/extending.md shows how to add another sink"
_OVERWRITE = "a run is never overwritten; name another --run-dir, or delete the folder"

ADVICE = {
    "gradient-accumulation-steps": _ACCUMULATION,
    "gradient-accumulation-iters": _ACCUMULATION,
    "grad-accum-steps": _ACCUMULATION,
    "grad-accum": _ACCUMULATION,
    "accumulation-steps": _ACCUMULATION,
    "accumulate-grad-batches": _ACCUMULATION,
    "global-batch-size": _SEQUENCES,
    "gbs": _SEQUENCES,
    "warmup-ratio": _WARMUP,
    "warmup-fraction": _WARMUP,
    "warmup-tokens": _WARMUP,
    "lr-warmup-fraction": _WARMUP,
    "decay-lr": "--lr.schedule names the shape of the decay; constant holds the learning rate",
    "mlp-ratio": "--model.intermediate-size sets the channels of the MLP's hidden layer",
    "ddp": _PROCESSES,
    "devices": _PROCESSES,
    "gpus": _PROCESSES,
    "num-gpus": _PROCESSES,
    "n-gpus": _PROCESSES,
    "nproc-per-node": _PROCESSES,
    "num-processes": _PROCESSES,
    "world-size": _PROCESSES,
    "wandb": _RECORDERS,
    "wandb-log": _RECORDERS,
    "wandb-project": _RECORDERS,
    "wandb-run-name": _RECORDERS,
    "report-to": _RECORDERS,
    "tensorboard": _RECORDERS,
    "logger-name": _RECORDERS,
    "overwrite": _OVERWRITE,
    "overwrite-output-dir": _OVERWRITE,
    "force": _OVERWRITE,
    "model": "a preset comes first and has no flag: gpt train PRESET; --model.n-layer and others change its model",
    "preset": "a preset comes first and has no flag: gpt train PRESET",
    "model-name": "a preset comes first and has no flag: gpt train PRESET",
    "model-type": "a preset comes first and has no flag: gpt train PRESET",
    "num-samples": "one command writes one sample; --seed sets another",
    "num-return-sequences": "one command writes one sample; --seed sets another",
}
"""Name in another trainer, with hyphens -> remedy for a setting that is no field here."""

VALUE_SYNONYMS: dict[str, tuple[str, ...]] = {
    "gpu": ("cuda",),
    "nvidia": ("cuda",),
    "rocm": ("cuda",),
    "metal": ("mps",),
    "apple": ("mps",),
    "fp16": ("float16",),
    "half": ("float16",),
    "16": ("float16",),
    "16-mixed": ("float16",),
    "bf16": ("bfloat16",),
    "bf16-mixed": ("bfloat16",),
    "fp32": ("float32",),
    "float": ("float32",),
    "32": ("float32",),
    "full": ("block", "float32"),
    "true": ("block",),
    "false": ("none",),
    "off": ("none",),
    "adam": ("adamw",),
    "adamw-torch": ("adamw",),
    "rope": ("rotary",),
    "absolute": ("learned",),
    "silu": ("swiglu",),
    "swish": ("swiglu",),
    "relu": ("relu2",),
    "warmup-stable-decay": ("wsd",),
    "trapezoidal": ("wsd",),
    "ignore": ("skip",),
    "warn": ("skip",),
    "error": ("raise",),
    "stop": ("raise",),
}
"""Value in another trainer, with hyphens -> values here, of which a field may have one."""

WORD_SYNONYMS = {
    "fit": "train",
    "pretrain": "train",
    "run": "train",
    "finetune": "train --init-from RUN",
    "resume": "train, which resumes the run in --run-dir",
    "generate": "sample",
    "chat": "sample",
    "inference": "sample",
    "tokenize": "prepare",
    "preprocess": "prepare",
    "inspect": "prepare --inspect",
    "benchmark": "bench",
    "profile": "bench",
    "check": "verify",
    "shakespeare": "shakespeare-char",
    "speedrun": "speedrun-char",
    "gpt2": "gpt2-124m",
    "gpt2-small": "gpt2-124m",
    "gpt2-medium": "gpt2-355m",
    "gpt2-large": "gpt2-774m",
    "gpt2-xl": "gpt2-1558m",
}
"""Word in place of a verb or preset -> verb or preset."""
