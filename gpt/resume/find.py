"""Where a run begins: afresh, from the newest of its own checkpoints that is whole, or from another run's."""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from gpt.checkpoint.manifest import PROGRESS, verify
from gpt.checkpoint.newest import find_newest_valid
from gpt.checkpoint.run_folder import RunFolder, locate_checkpoint
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.load import load_config
from gpt.configs.resume_rule import FLAG
from gpt.configs.run_plan import DTYPE_KEY
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError
from gpt.resume.compatibility import Difference, differences, require_allowed
from gpt.utils.atomic_io import read_json

WEIGHT_INDEPENDENT = frozenset({"vocab_size", "dropout"})
"""Fields of a model that trained weights do not depend on; the vocabulary is compared as the tokenizer's."""
PER_LAUNCH = frozenset({"run_dir", "resume", "resume_with_changes"})
"""Fields that say where and how a run is continued: told elsewhere, and no news as differences."""


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    checkpoint: Path | None
    """None: afresh."""
    damaged: tuple[tuple[Path, str], ...] = ()
    """Newer checkpoints that are damaged, newest first, each with the reason."""


def find_start(folder: RunFolder, config: TrainConfig) -> Start:
    """Where a run of `config` in `folder` begins; the checkpoint is verified, and the configuration may continue it.

    Raises:
        UserError: the folder holds a run that `config` may not continue, `--resume` names no checkpoint that is whole,
            or there are checkpoints and none is.
    """
    if not folder.config.exists():
        if folder.steps() or folder.metrics.exists():
            raise UserError(f"--run-dir {folder.path} holds a run without its config.json; name another --run-dir")
        return Start(_fork(config, config.resume))
    if config.resume == "never":
        raise UserError(f"--run-dir {folder.path} holds a run; --resume auto continues it, or name another --run-dir")
    began = load_config(folder.config)
    if _names_own(folder, config):
        start = Start(_named(folder, config))
    elif _names_a_checkpoint(config) and not _is_start_of(config.resume, began.resume):
        raise UserError(
            f"--run-dir {folder.path} holds a run that did not start from {config.resume}; name another --run-dir"
        )
    else:
        start = _own(folder) if folder.steps() else Start(_fork(config, began.resume))
    _require_continuable(folder, config, began, start)
    return start


def changes(config: TrainConfig, checkpoint: Path) -> list[Difference]:
    """What `config` has otherwise than the run that saved `checkpoint`, as far as it is news."""
    saved = load_config(checkpoint / "config.json")
    return [change for change in differences(saved, config) if change.name not in PER_LAUNCH | {"init_from"}]


def require_same_architecture(config: TrainConfig, checkpoint: Path) -> None:
    """Compare `--init-from`'s model with the configuration's, in all that decides what its weights mean.

    Raises:
        UserError: names the first that differs.
    """
    saved = load_config(checkpoint / "config.json").model
    for name in GPTConfig.model_fields:
        there, here = getattr(saved, name), getattr(config.model, name)
        if there != here and name not in WEIGHT_INDEPENDENT:
            flag = f"--model.{name.replace('_', '-')}"
            raise UserError(
                f"--init-from {checkpoint} is of another architecture: {flag} is {there} there and {here} here"
            )


def require_same_identity(identity: Mapping[str, str | int], checkpoint: Path, names: Set[str]) -> None:
    """Compare what a checkpoint's run resolved from its corpus and machine with what this one did.

    Raises:
        UserError: names the first of `names` that differs.
    """
    saved = read_json(checkpoint / PROGRESS).get("identity", {})
    for name in identity:
        if name in names and saved.get(name, identity[name]) != identity[name]:
            remedy = f"or say {FLAG}" if name == DTYPE_KEY else "or name another --run-dir"
            raise UserError(
                f"{checkpoint} cannot be continued: {name} is {saved.get(name)} there and {identity[name]} here; "
                f"restore what was changed, {remedy}"
            )


def _own(folder: RunFolder) -> Start:
    """The newest of the run's own that is whole; there are some.

    Raises:
        UserError: none is whole.
    """
    found = find_newest_valid(folder.steps())
    start = Start(found.checkpoint, found.skipped)
    if start.checkpoint is None:
        listed = "; ".join(reason for _, reason in start.damaged)
        raise UserError(
            f"--run-dir {folder.path} holds checkpoints and none is whole: {listed}; bring one back from a copy, or "
            "name another --run-dir to start afresh"
        )
    return start


def _names_own(folder: RunFolder, config: TrainConfig) -> bool:
    """Whether `--resume` names this very run: its folder, or one of its checkpoints."""
    own = folder.path.resolve()
    return _names_a_checkpoint(config) and own in (named := Path(config.resume).resolve(), *named.parents)


def _named(folder: RunFolder, config: TrainConfig) -> Path:
    """The newest checkpoint of its own, where `--resume` names it: a run never goes back over its own steps."""
    checkpoint = locate_checkpoint(Path(config.resume), "--resume")
    newest = folder.steps()[-1]
    if Path(config.resume).resolve() not in (folder.path.resolve(), newest.resolve()):
        raise UserError(
            f"--resume {checkpoint} is not the newest checkpoint of its run, which --resume auto continues; to train "
            "on from an earlier one, name another --run-dir"
        )
    verify(newest)
    return newest


def _fork(config: TrainConfig, resume: str) -> Path | None:
    """The checkpoint of another run that this one starts from."""
    if resume in ("auto", "never"):
        return None
    checkpoint = locate_checkpoint(Path(resume), "--resume")
    verify(checkpoint)
    saved = load_config(checkpoint / "config.json").model_copy(update={"init_from": config.init_from})
    _require_allowed(config, saved, f"--resume {checkpoint}")
    return checkpoint


def _require_continuable(folder: RunFolder, config: TrainConfig, began: TrainConfig, start: Start) -> None:
    """Compare with what the state was trained with; before the first checkpoint, with what the folder was made for."""
    own = start.checkpoint is not None and start.checkpoint in folder.steps()
    if start.checkpoint is not None and not own:
        return  # another run's, which `_fork` has compared
    saved = load_config(start.checkpoint / "config.json") if start.checkpoint else began
    # Where a run took its first weights need not be told again once it has a checkpoint of its own.
    told = began.init_from if own and config.init_from is None else config.init_from
    _require_allowed(
        config.model_copy(update={"init_from": told}),
        saved.model_copy(update={"init_from": began.init_from}),
        f"--run-dir {folder.path}",
    )


def _require_allowed(config: TrainConfig, saved: TrainConfig, place: str) -> None:
    require_allowed(differences(saved, config), place, with_changes=config.resume_with_changes)


def _names_a_checkpoint(config: TrainConfig) -> bool:
    return config.resume not in ("auto", "never")


def _is_start_of(given: str, saved: str) -> bool:
    """Whether the checkpoint `saved` is what `given` names: itself, or a run's folder that it lies in."""
    return Path(given).resolve() in (Path(saved), *Path(saved).parents)
