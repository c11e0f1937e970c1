"""The resume rule of every field, pinned: a rule that changes by accident breaks saved runs."""

from typing import Annotated

import pytest
from pydantic import Field

from gpt.configs.base import Config
from gpt.configs.cli import parse
from gpt.configs.resume_rule import SAFE, ResumeRule, get_resume_rules
from gpt.configs.train_config import TrainConfig

FIELDS = {
    ResumeRule.SAFE: """
        run_dir compile_mode resume resume_with_changes data.cache_dir data.workers
        parallel.activation_checkpointing parallel.check_replicas parallel.start_timeout parallel.step_timeout
        runtime.threads runtime.keep_freed_memory runtime.flush_denormals runtime.fused_attention log.interval
        eval.interval eval.batches checkpoint.interval checkpoint.every_minutes checkpoint.keep checkpoint.keep_best
        checkpoint.asynchronous spike.max_skips spike.window spike.threshold spike.least_rise spike.rollback
        spike.max_rollbacks spike.journal sample.max_new_tokens sample.temperature sample.top_k sample.top_p
        sample.min_p sample.repetition_penalty sample.stop sample.stop_tokens sample.prompts
        profile.start profile.steps log.grad_norms log.sink_timeout runtime.sleep_when_busy
    """,
    ResumeRule.SAFE_IF_LR_UNCHANGED: """
        max_steps max_tokens epochs lr.decay_steps
    """,
    ResumeRule.SAFE_WITHOUT_DROPOUT: """
        micro_batch_size device compile
    """,
    ResumeRule.SAFE_IF_SAME_CONTENT: """
        data.source data.val_source data.tokenizer
    """,
    ResumeRule.NEEDS_FLAG: """
        lr.schedule lr.max_lr lr.min_lr lr.warmup_steps optimizer.muon_lr optimizer.muon_momentum
        optimizer.weight_decay optimizer.beta1 optimizer.beta2 grad_clip parallel.reproducible dtype residual_dtype
        model.dropout
    """,
    ResumeRule.FORBIDDEN: """
        model.n_layer model.n_head model.n_kv_head model.n_embd model.block_size model.vocab_size model.bias
        model.position model.norm model.mlp model.qk_norm model.logit_softcap model.head_dim
        model.intermediate_size model.norm_eps model.rope_theta model.tie_embeddings model.qkv_bias
        model.attn_out_bias model.mlp_bias model.rope_scaling model.rope_factor model.rope_low_freq_factor
        model.rope_high_freq_factor model.rope_original_block_size model.sliding_window model.init model.init_std
        optimizer.name
        data.weights data.val_fraction data.text_field data.on_error data.deduplicate
        data.end_of_text data.vocab_size data.packing data.document_mask seed tokens_per_step init_from
    """,
}


def test_every_field_has_its_rule() -> None:
    expected = {name: rule for rule, names in FIELDS.items() for name in names.split()}
    rules = get_resume_rules(TrainConfig)
    assert rules.keys() - expected.keys() == set(), "new fields: decide their rule and list them in FIELDS"
    assert expected.keys() - rules.keys() == set(), "fields that no longer exist: take them out of FIELDS"
    assert rules == expected


class Section(Config):
    """A section."""

    size: Annotated[int, SAFE] = Field(3, ge=1)
    """Size."""


class Example(Config):
    """A configuration."""

    section: Section = Section()
    name: str = "a"
    """Name."""


def test_field_without_a_rule_is_forbidden_and_section_prefixes_its_name() -> None:
    assert get_resume_rules(Example) == {"section.size": ResumeRule.SAFE, "name": ResumeRule.FORBIDDEN}


def test_rule_changes_neither_parsing_nor_bounds() -> None:
    assert parse(Example, ["--section.size", "4"], prog="x").section.size == 4
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        Section(size=0)
