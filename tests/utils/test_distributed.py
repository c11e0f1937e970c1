import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from gpt.errors import OwnError, ReportedError, UserError
from gpt.utils import distributed
from gpt.utils.distributed import DistContext, find_rank_device
from gpt.utils.lost_connection import is_lost_connection
from gpt.utils.rendezvous import Meeting


class FakeHeartbeat:
    """Heartbeat of two ranks of which rank 0 may be silent."""

    def __init__(self, *, verdict: str = "", rank_0_is_silent: bool = False):
        self.verdict, self._rank_0_is_silent = verdict, rank_0_is_silent

    def report_failure(self) -> None:
        pass

    def is_silent(self, rank: int) -> bool:
        return rank == 0 and self._rank_0_is_silent


def test_collectives_of_one_rank_are_the_identity() -> None:
    dist = DistContext("cpu")
    assert (dist.rank, dist.world_size, dist.is_main) == (0, 1, True)
    assert dist.broadcast({"a": [1]}) == {"a": [1]}
    assert dist.on_main(lambda: 5) == 5
    assert dist.sum_on_host([1.5, 2.0]) == [1.5, 2.0]
    assert dist.gather(7) == [7]
    assert dist.all_reduce_max_async(3).read() == 3
    assert dist.min(4) == 4
    dist.close()


def test_an_unrelated_error_is_not_replaced() -> None:
    with pytest.raises(RuntimeError, match="shapes"), DistContext("cpu").report_lost_ranks():
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("Timed out waiting 2000ms for recv operation to complete", "rank 1 took no part in a step for 2 s"),
        ("Application timeout caused pair closure", "rank 1 took no part in a step for 2 s"),
        ("Connection closed by peer [127.0.0.1]:4242", "rank 1 ended; the same command"),
    ],
)
def test_a_lost_rank_is_named(error: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dist = DistContext("cpu", step_timeout=2)
    dist.world_size, dist.heartbeat = 2, FakeHeartbeat()  # type: ignore[assignment]
    monkeypatch.setattr(dist, "_find_lost_ranks", lambda: [1])
    with pytest.raises(UserError, match=message), dist.report_lost_ranks():
        raise RuntimeError(error)


def test_a_missing_store_address_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2, but MASTER_ADDR .*; start the ranks with torchrun$"):
        DistContext("cpu")


def test_a_user_error_on_rank_0_is_raised() -> None:
    def fail() -> None:
        raise UserError("no such file")

    with pytest.raises(UserError, match="no such file"):
        DistContext("cpu").on_main(fail)


@pytest.mark.parametrize("silent", [False, True])
def test_rank_1_reports_at_once_only_where_rank_0_is_silent(silent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dist = DistContext("cpu", step_timeout=2)
    dist.world_size, dist.rank = 2, 1
    dist.heartbeat = FakeHeartbeat(rank_0_is_silent=silent)  # type: ignore[assignment]
    monkeypatch.setattr(dist, "_find_lost_ranks", lambda: [0])
    with pytest.raises(UserError, match="rank 0 took no part in a step") as raised, dist.report_lost_ranks():
        raise RuntimeError("Timed out waiting 2000ms for recv operation to complete")
    assert isinstance(raised.value, OwnError) is silent


def test_rank_stays_silent_where_heartbeats_have_reported_a_hang() -> None:
    dist = DistContext("cpu")
    dist.world_size, dist.heartbeat = 2, FakeHeartbeat(verdict="rank 1 hangs")  # type: ignore[assignment]
    with pytest.raises(ReportedError, match="rank 1 hangs"), dist.report_lost_ranks():
        raise RuntimeError("Connection closed by peer")


@pytest.mark.parametrize(
    "message",
    [
        "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited\nncclRemoteError: A call failed",
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3, OpType=ALLREDUCE) ran for 20 s",
        "NCCL communicator was aborted on rank 0.",
    ],
)
def test_nccl_error_is_one_line(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_lost_connection(RuntimeError(message))
    dist = DistContext("cpu", step_timeout=2)
    dist.world_size, dist.heartbeat = 2, FakeHeartbeat()  # type: ignore[assignment]
    monkeypatch.setattr(dist, "_find_lost_ranks", list)
    with pytest.raises(UserError) as raised, dist.report_lost_ranks():
        raise RuntimeError(message)
    assert "\n" not in str(raised.value)
    assert message.splitlines()[0] in str(raised.value)


@pytest.mark.parametrize(("n_gpus", "local_rank", "index"), [(1, 3, 0), (8, 3, 3), (1, 0, 0)])
def test_rank_uses_the_gpu_of_its_local_rank_or_the_only_visible_one(
    n_gpus: int, local_rank: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(device_count=lambda: n_gpus))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert find_rank_device("cuda") == torch.device("cuda", index)


def test_local_rank_without_a_gpu_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(device_count=lambda: 2))
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"^torchrun started local rank 3, but this machine has 2 GPUs; lower"):
        find_rank_device("cuda")


def test_ranks_on_gpus_compare_them_and_record_collectives_before_nccl_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def meet(*arguments: Any, gpu: str, timeout: float) -> Meeting:
        calls.append((gpu, timeout))
        return Meeting(HashStore(), "")

    def new_group(backend: str, timeout: Any) -> None:
        calls.append((backend, timeout.total_seconds(), os.environ["TORCH_FR_DUMP_TEMP_FILE"]))

    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "find_rank_device", lambda kind: torch.device(kind, 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setattr(distributed, "meet", meet)
    monkeypatch.setattr(DistContext, "_connect_hosts", lambda self: None)
    monkeypatch.setattr(distributed.dist, "new_group", new_group)
    dist = DistContext("cuda", 10, start_timeout=20, record_folder=tmp_path)
    assert dist.heartbeat is not None
    dist.heartbeat.stop()
    assert calls == [("GPU-1", 20), ("nccl", 20.0, str(tmp_path / "flight_recorder_rank_"))]
    monkeypatch.setattr(dist, "_find_lost_ranks", lambda: [1])
    files = f"{tmp_path}/flight_recorder_rank_"
    with (
        pytest.raises(UserError, match=rf"; {files}\* hold the last collectives of each rank$"),
        dist.report_lost_ranks(),
    ):
        raise RuntimeError("NCCL error in: ProcessGroupNCCL.cpp")
    assert Path(f"{files}0").exists()
