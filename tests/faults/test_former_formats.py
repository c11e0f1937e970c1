"""Runs that former versions of this program wrote: they resume bit-exactly.

Each test takes a run of today, cuts it back to its first checkpoint, and rewrites its files as a former version wrote
them: the manifests' format, the fields of config.json, and the keys of lineage.jsonl and progress.json.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt.checkpoint.manifest import CHECKPOINT_MANIFEST, CONFIG, PROGRESS, read_checkpoint_manifest
from gpt.checkpoint.run_folder import RunFolder
from gpt.configs.train_config import TrainConfig
from gpt.pipeline import build_trainer
from gpt.run import open_run
from gpt.verification.compare import compare

pytestmark = pytest.mark.faults

Configure = Callable[..., TrainConfig]
FIELDS_OF_VERSION_1 = {
    "": "run_dir seed max_steps max_tokens epochs micro_batch_size tokens_per_step device dtype compile grad_clip "
    "resume init_from",
    "model": "n_layer n_head n_kv_head n_embd block_size vocab_size dropout bias position norm mlp qk_norm "
    "logit_softcap",
    "data": "val_source val_fraction text_field on_error deduplicate tokenizer vocab_size workers source weights "
    "packing document_mask cache_dir",
    "lr": "schedule max_lr min_lr warmup_steps decay_steps",
    "optimizer": "name muon_lr muon_momentum weight_decay beta1 beta2",
    "parallel": "activation_checkpointing",
    "runtime": "threads keep_freed_memory flush_denormals",
    "log": "interval",
    "eval": "interval batches",
    "checkpoint": "interval keep",
    "sample": "max_new_tokens temperature top_k top_p prompts",
    "profile": "start steps",
}
"""Section of config.json -> the fields that it had with format version 1 of checkpoints; "": the top level."""
FIELDS_OF_VERSION_2 = FIELDS_OF_VERSION_1 | {
    "": FIELDS_OF_VERSION_1[""] + " compile_mode",
    "parallel": "activation_checkpointing reproducible check_replicas step_timeout",
    "runtime": "threads keep_freed_memory flush_denormals fused_attention",
    "checkpoint": "interval every_minutes keep keep_best asynchronous",
    "spike": "max_skips window threshold least_rise rollback max_rollbacks journal",
}


@pytest.fixture
def first_half(finished_run: Path, tmp_path: Path) -> RunFolder:
    """Return a copy of the finished run of eight steps, cut back to its checkpoint of step 4."""
    folder = RunFolder(Path(shutil.copytree(finished_run, tmp_path / "run")))
    shutil.rmtree(folder.checkpoint_path(8))
    for path in (folder.metrics, folder.samples):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= 4))
    return folder


def change_json(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text())), indent=2))


def keep_fields(config: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    """Return a saved configuration without the fields that a former version did not have."""
    former: dict[str, Any] = {name: config[name] for name in fields[""].split()} | {"compile": False}
    for section in fields.keys() - {""}:
        former[section] = {name: config[section][name] for name in fields[section].split()}
    return former


def describe_files(checkpoint: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name in manifest["files"]
        for content in [(checkpoint / name).read_bytes()]
    }


def write_version_1(folder: RunFolder) -> None:
    """Rewrite a run as the first version did: a manifest of digests alone, no lineage, no state of observers."""
    checkpoint = folder.checkpoint_path(4)
    for path in (folder.config, checkpoint / CONFIG):
        change_json(path, lambda config: keep_fields(config, FIELDS_OF_VERSION_1))
    change_json(checkpoint / PROGRESS, lambda progress: progress | {"observers": {}})
    change_json(
        checkpoint / CHECKPOINT_MANIFEST,
        lambda manifest: {"format_version": 1, "files": describe_files(checkpoint, manifest)},
    )
    folder.lineage.unlink()


def write_version_2(folder: RunFolder) -> None:
    """Rewrite a run as the second version did: the manifest's digest was taken with zeros in the digest's place."""
    checkpoint = folder.checkpoint_path(4)
    for path in (folder.config, checkpoint / CONFIG):
        change_json(path, lambda config: keep_fields(config, FIELDS_OF_VERSION_2))

    def sign(manifest: dict[str, Any]) -> dict[str, Any]:
        names = ("environment", "identity", "metrics")
        former = {"format_version": 2, "files": describe_files(checkpoint, manifest)}
        former |= {name: manifest[name] for name in names}
        blank = json.dumps(former | {"manifest_sha256": "0" * 64}, indent=2)
        return former | {"manifest_sha256": hashlib.sha256(blank.encode()).hexdigest()}

    change_json(checkpoint / CHECKPOINT_MANIFEST, sign)
    (start,) = (json.loads(line) for line in folder.lineage.read_text().splitlines())
    start["set_aside"] = start.pop("moved_aside")
    folder.lineage.write_text(json.dumps(start) + "\n")


@pytest.mark.parametrize(("version", "write"), [(1, write_version_1), (2, write_version_2)])
def test_run_of_a_former_format_resumes_bit_exactly(
    version: int, write: Callable[[RunFolder], None], first_half: RunFolder, finished_run: Path, tiny: Configure
) -> None:
    write(first_half)
    assert read_checkpoint_manifest(first_half.checkpoint_path(4)).format_version == version
    with open_run(tiny(first_half.path, checkpoint={"interval": 4})) as run:
        assert run.start.checkpoint == first_half.checkpoint_path(4)
        build_trainer(run).train()
    comparison = compare(RunFolder(finished_run), first_half)
    assert (comparison.n_losses, comparison.n_evaluations, comparison.n_samples) == (8, 2, 2)
    locations = {difference.location for difference in comparison.differences}
    observer_state = "step_00000008/progress.json: observers.spike_guard.window"
    assert locations == ({observer_state} if version == 1 else set())  # version 1 saved no losses for the spike guard


def test_weights_of_a_former_format_start_a_new_run(first_half: RunFolder, tiny: Configure, tmp_path: Path) -> None:
    write_version_1(first_half)
    with open_run(tiny(tmp_path / "new", init_from=first_half.path, max_steps=1)) as run:
        build_trainer(run).train()
    assert RunFolder(tmp_path / "new").list_checkpoints()
