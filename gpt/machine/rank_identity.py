"""Flags, versions and code of this process, for the comparison of the ranks."""

import hashlib
import platform

import torch

import gpt
from gpt.configs.fields import format_flag, walk_fields
from gpt.configs.train_config import TrainConfig
from gpt.machine.environment import PACKAGE
from gpt.utils.rendezvous import RankIdentity

PER_MACHINE = frozenset({"runtime.threads"})
"""Fields that may differ between machines: they change numbers by rounding at most."""
CODE_SUFFIXES = (".py", ".c")


def describe_rank(config: TrainConfig) -> RankIdentity:
    """Return the flags, versions and code that this process runs with.

    Paths are compared as they were given: machines may have the same files in different folders.
    """
    values = config.model_dump(mode="json")
    return RankIdentity(
        flags={
            format_flag(name): _find_value(values, name)
            for name, _ in walk_fields(TrainConfig)
            if name not in PER_MACHINE
        },
        versions={
            "the version of gpt-training-pipeline": gpt.__version__,
            "the version of torch": torch.__version__,
            "the version of Python": ".".join(platform.python_version_tuple()[:2]),
        },
        files={
            f"the SHA-256 of gpt/{path.relative_to(PACKAGE).as_posix()}": hashlib.sha256(path.read_bytes()).hexdigest()[
                :12
            ]
            for path in sorted(PACKAGE.rglob("*"))
            if path.suffix in CODE_SUFFIXES
        },
    )


def _find_value(tree: object, path: str) -> object:
    for name in path.split("."):
        assert isinstance(tree, dict)
        tree = tree[name]
    return tree
