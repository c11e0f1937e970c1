"""The meeting of the ranks, its ranks as threads of one process."""

import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch.distributed as dist

from gpt.errors import OwnError, ReportedError, UserError
from gpt.utils import rendezvous
from gpt.utils.rendezvous import Entry, RankIdentity, RollCall, describe_difference, meet

SAME = RankIdentity(flags={"--seed": 1}, versions={"torch": "2"}, files={"a.py": "0a"})


def call_roll(
    *ranks: int,
    identities: Sequence[RankIdentity] = (SAME, SAME, SAME),
    entries: Sequence[Entry] = (Entry("10.0.0.1"), Entry("10.0.0.2"), Entry("10.0.0.3")),
    timeout: float = 10.0,
) -> list[Future[str]]:
    """Let some of three ranks meet, and return what each of them gets."""
    store, deadline = dist.HashStore(), time.monotonic() + timeout

    def take_part(rank: int) -> str:
        roll_call = RollCall(rank, 3, "MASTER_ADDR host, port 1", timeout)
        answer = roll_call.judge_entries if rank == 0 else roll_call.write_entry
        return answer(store, identities[rank], entries[rank], deadline)

    with ThreadPoolExecutor() as pool:
        return [pool.submit(take_part, rank) for rank in ranks]


def assert_rejected(results: Sequence[Future[str]], message: str) -> None:
    """Assert that rank 0 reports the message, and that the other ranks leave it to rank 0."""
    with pytest.raises(UserError, match=message):
        results[0].result()
    for result in results[1:]:
        with pytest.raises(ReportedError, match=message):
            result.result()


def test_equal_ranks_meet() -> None:
    assert {result.result() for result in call_roll(0, 1, 2)} == {"10.0.0.1"}


def test_rank_0_under_a_local_name_gets_the_address_of_another_machine() -> None:
    entries = (Entry("127.0.0.1"), Entry("127.0.0.1"), Entry("10.0.0.3"))
    assert {result.result() for result in call_roll(0, 1, 2, entries=entries)} == {"10.0.0.3"}


def test_missing_ranks_are_named() -> None:
    message = r"^rank 2 did not come to MASTER_ADDR host, port 1, in 0.5 s \(--parallel.start-timeout\); start"
    assert_rejected(call_roll(0, 1, timeout=0.5), message)


def test_missing_rank_0_is_named_at_once_by_another_rank() -> None:
    for result in call_roll(1, 2, timeout=0.5):
        with pytest.raises(OwnError, match=r"^rank 0 did not come to MASTER_ADDR host, port 1, in 0.5 s"):
            result.result()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (RankIdentity({"--seed": 2}, SAME.versions, SAME.files), "--seed is 2 on rank 2 and 1 on rank 0; start every"),
        (
            RankIdentity(SAME.flags, {"torch": "3"}, SAME.files),
            "torch is 3 on rank 2 and 2 on rank 0; install the same",
        ),
        (
            RankIdentity(SAME.flags, SAME.versions, {}),
            "a.py is missing on rank 2 and 0a on rank 0; install the same code on every machine",
        ),
    ],
)
def test_different_ranks_are_rejected_with_the_field(other: RankIdentity, message: str) -> None:
    assert_rejected(call_roll(0, 1, 2, identities=(SAME, SAME, other)), f"^{message}")


def test_null_is_a_value_like_others() -> None:
    without, with_value = RankIdentity({"--model.n-kv-head": None}), RankIdentity({"--model.n-kv-head": 2})
    assert describe_difference(1, without, without) == ""
    assert describe_difference(1, with_value, without).startswith(
        "--model.n-kv-head is 2 on rank 1 and missing on rank 0"
    )


def test_ranks_with_the_same_gpu_are_rejected() -> None:
    entries = (Entry("10.0.0.1", "GPU-a"), Entry("10.0.0.1", "GPU-b"), Entry("10.0.0.1", "GPU-a"))
    assert_rejected(call_roll(0, 1, 2, entries=entries), "rank 0 and rank 2 have the same GPU; lower --nproc-per-node")


def find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """Set the launcher's variables of rank 1 for a store that nobody has opened."""
    port = find_free_port()
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 1, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return port


def test_address_without_a_listener_is_one_line_at_the_timeout(port: int, capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    message = (
        rf"^rank 1 cannot reach rank 0 at MASTER_ADDR 127.0.0.1, port {port}, in 2 s \(--parallel.start-timeout\): "
        "Connection refused; set MASTER_ADDR"
    )
    with pytest.raises(OwnError, match=message):
        meet(1, 2, SAME, gpu="", timeout=2.0)
    assert 1.6 <= time.monotonic() - began <= 2.4
    assert capfd.readouterr() == ("", "")


def test_foreign_server_at_the_address_is_named_at_the_timeout(port: int) -> None:
    message = r"what listens there is no torch\.distributed store"
    with socket.create_server(("127.0.0.1", port)), pytest.raises(UserError, match=message):
        meet(1, 2, SAME, gpu="", timeout=1.0)


def test_taken_port_is_named(port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(rendezvous, "_n_meetings", iter([0]))
    message = rf"^MASTER_PORT {port}: rank 0 cannot listen there: Address already in use"
    with socket.create_server(("", port)), pytest.raises(UserError, match=message):
        meet(0, 2, SAME, gpu="", timeout=5.0)
    assert capfd.readouterr() == ("", "")


def test_second_process_of_a_rank_is_rejected(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    server = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(rendezvous, "_n_meetings", iter([7]))
    server.add("attempt0/7/taken/1", 1)
    with pytest.raises(OwnError, match=r"^two processes have RANK 1 at MASTER_ADDR"):
        meet(1, 2, SAME, gpu="", timeout=5.0)
    assert "GLOO_SOCKET_IFNAME" not in os.environ
