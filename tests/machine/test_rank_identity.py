from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt.configs.train_config import TrainConfig
from gpt.machine import rank_identity
from gpt.machine.rank_identity import describe_rank
from gpt.utils.rendezvous import describe_difference


def test_every_flag_is_compared_but_that_of_threads(tiny: Callable[..., TrainConfig], tmp_path: Path) -> None:
    base = describe_rank(tiny(tmp_path))
    assert describe_difference(1, describe_rank(tiny(tmp_path, runtime={"threads": 2})), base) == ""
    for changes, difference in (
        ({"seed": 2}, "--seed is 2 on rank 1 and 1337 on rank 0; start every rank with the same flags"),
        (
            {"model": {"n_head": 4}},
            "--model.n-head is 4 on rank 1 and 2 on rank 0; start every rank with the same flags",
        ),
        ({"parallel": {"start_timeout": 5}}, "--parallel.start-timeout is 5.0 on rank 1 and 300.0 on rank 0; start"),
    ):
        assert describe_difference(1, describe_rank(tiny(tmp_path, **changes)), base).startswith(difference)


def test_another_torch_is_named(
    tiny: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = describe_rank(tiny(tmp_path))
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    difference = describe_difference(2, describe_rank(tiny(tmp_path)), base)
    assert difference.startswith("the version of torch is 2.9.1+cu128 on rank 2 and ")
    assert difference.endswith(" on rank 0; install the same versions on every machine")


def test_another_file_of_the_package_is_named(
    tiny: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.py").write_text("one")
    monkeypatch.setattr(rank_identity, "PACKAGE", tmp_path)
    base = describe_rank(tiny(tmp_path))
    (tmp_path / "run.py").write_text("two")
    difference = describe_difference(1, describe_rank(tiny(tmp_path)), base)
    assert difference.startswith("the SHA-256 of gpt/run.py is 3fc4ccfe7458 on rank 1 and 7692c3ad3540 on rank 0; ")
