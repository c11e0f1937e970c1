import pytest

from gpt.errors import UserError
from gpt.utils.distributed import DistContext


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
