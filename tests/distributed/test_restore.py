"""Resuming with several ranks: one reads the checkpoint, and all hold its state."""

import json
from collections.abc import Callable
from pathlib import Path

from gpt.configs.train_config import TrainConfig
from gpt.pipeline import build_trainer
from gpt.run import open_run
from tests.distributed.test_torchrun import start_torchrun

SCRIPT = """
import json, sys
from pathlib import Path
from gpt import pipeline
from gpt.checkpoint import manifest, tensor_file
from gpt.configs.load import load_config
from gpt.pipeline import build_trainer
from gpt.run import open_run
from gpt.utils import launch

sizes, draws = [], []  # threads append to sizes

def count(read):
    def counting(path, *arguments, **options):
        sizes.append(Path(path).stat().st_size)
        return read(path, *arguments, **options)
    return counting

manifest.sha256_of_file = count(manifest.sha256_of_file)
tensor_file.load_file = count(tensor_file.load_file)
pipeline.init_weights = lambda *arguments: draws.append(arguments)
folder = Path(sys.argv[1])
with open_run(load_config(folder / "config.json").model_copy(update={"max_steps": 9})) as run:
    trainer = build_trainer(run)
state = trainer._state
tensors = state.model_tensors() | state.optimizer_tensors()
digest = {name: tensor.double().sum().item() for name, tensor in tensors.items()}
facts = {"bytes": sum(sizes), "draws": len(draws), "digest": digest, "progress": state.progress_json()}
(folder / f"rank{launch.rank()}.json").write_text(json.dumps(facts))
run.dist.close()
"""


def test_checkpoint_is_read_by_one_rank_and_held_by_all(tiny: Callable[..., TrainConfig], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with open_run(tiny(run_dir, max_steps=4, lr={"decay_steps": 4}, checkpoint={"interval": 4})) as run:
        build_trainer(run).train()
    (tmp_path / "script.py").write_text(SCRIPT)
    process = start_torchrun(str(run_dir), script=tmp_path / "script.py")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    first, second = (json.loads((run_dir / f"rank{rank}.json").read_text()) for rank in (0, 1))
    sizes = {path.name: path.stat().st_size for path in (run_dir / "checkpoints" / "step_00000004").iterdir()}
    tensors = sizes["model.safetensors"] + sizes["optimizer.safetensors"]
    verified = tensors + sizes["progress.json"] + sizes["config.json"]
    assert (first["bytes"], second["bytes"]) == (verified + tensors, 0)
    assert first["draws"] == second["draws"] == 0  # of weights that the checkpoint would overwrite
    assert first["progress"]["step"] == 4
    assert (first["digest"], first["progress"]) == (second["digest"], second["progress"])
