import pytest

from gpt.errors import UserError
from gpt.utils.distributed import DistContext


def test_one_process_talks_to_itself() -> None:
    dist = DistContext("cpu")
    assert (dist.rank, dist.world_size, dist.is_main) == (0, 1, True)
    assert dist.broadcast({"a": [1]}) == {"a": [1]}
    assert dist.on_main(lambda: 5) == 5
    assert dist.sum_on_host([1.5, 2.0]) == [1.5, 2.0]
    assert dist.gather(7) == [7]
    assert dist.all_reduce_max_async(3).read() == 3
    assert dist.min(4) == 4
    dist.close()


def test_an_error_of_another_kind_goes_through() -> None:
    with pytest.raises(RuntimeError, match="shapes"), DistContext("cpu").report_lost_ranks():
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("Timed out waiting 2000ms for recv operation to complete", "rank 1 took no part in a step for 2 s"),
        ("Application timeout caused pair closure", "rank 1 took no part in a step for 2 s"),
        ("Connection closed by peer [127.0.0.1]:4242", "rank 1 ended; the same command"),
    ],
)
def test_who_is_lost_is_told(error: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dist = DistContext("cpu", step_timeout=2)
    dist.world_size = 2
    monkeypatch.setattr(dist, "_find_lost_ranks", lambda: [1])
    with pytest.raises(UserError, match=told), dist.report_lost_ranks():
        raise RuntimeError(error)


def test_without_an_address_the_processes_cannot_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2 but MASTER_ADDR .*; start them with torchrun$"):
        DistContext("cpu")


def test_a_users_mistake_on_main_is_raised() -> None:
    def fail() -> None:
        raise UserError("no such file")

    with pytest.raises(UserError, match="no such file"):
        DistContext("cpu").on_main(fail)
