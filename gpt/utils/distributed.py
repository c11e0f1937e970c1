"""The processes that train together: starting them, and the few things that they tell each other."""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from gpt.errors import UserError
from gpt.utils import launch
from gpt.utils.helper import first_line
from gpt.utils.tree_sum import tree_sum

Number = TypeVar("Number", int, float)

START_TIMEOUT = timedelta(hours=2)
"""Rank 0 may prepare a large corpus while the others wait."""
STEP_TIMEOUT = 600.0
"""Seconds that a step waits for the slowest process, unless told otherwise."""
_joined = itertools.count()
"""How often this process has joined others: a run in Python code may follow another one."""
ROLL_CALL = 5.0
"""Seconds in which a process that has lost another one hears of all that are still there."""
TIMED_OUT = ("Timed out waiting", "Application timeout")
"""What gloo's errors say where another process does not answer in time: of a collective, and of those beside it."""
LOST = (*TIMED_OUT, "Connection closed", "Connection reset", "Broken pipe", "gloo")
"""What they say where one does not answer at all, too; they have no type of their own."""


class PendingFlag(Protocol):
    """A flag that is being reduced over the processes."""

    def read(self) -> int:
        """The largest value that any process gave."""
        ...


class DistContext:
    """Rank facts and collectives; with one process every collective is the identity.

    Host values travel as JSON or numbers over gloo, never as pickle and never through the GPU, which they would have to
    wait for; device tensors are reduced where they are.
    """

    def __init__(self, device: str, step_timeout: float = STEP_TIMEOUT):
        """Join the processes that torchrun started, if it did.

        Args:
            device: cpu, cuda or mps.
            step_timeout: seconds after which a process that does not take part in a step is given up; one that waits
                for another's work outside steps (`on_main`, `on_local_main`) waits for hours.
        """
        self.world_size, self.rank, local_rank = launch.world_size(), launch.rank(), launch.local_rank()
        self.device = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
        self._step_timeout = step_timeout
        self._started: list[Any] = []
        self._store: Any = None
        self.step_group: dist.ProcessGroup | None = None
        """What device tensors of a step travel in; None where there is one process."""
        self._host_step_group: dist.ProcessGroup | None = None
        if self.world_size > 1 and device == "mps":
            raise UserError("--device mps trains in one process only; use --device cpu under torchrun")
        if device == "cuda":
            if local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"torchrun started a process {local_rank} but this machine has "
                    f"{torch.cuda.device_count()} GPUs; lower --nproc-per-node"
                )
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            self._join()

    def _join(self) -> None:
        """Form the groups: of host values with a long and with a short timeout, and of what lies on GPUs."""
        self._store = _open_store(self.world_size, self.rank)
        dist.init_process_group(
            "gloo", store=self._store, rank=self.rank, world_size=self.world_size, timeout=START_TIMEOUT
        )
        timeout = timedelta(seconds=self._step_timeout)
        self._host_step_group = self.step_group = dist.new_group(backend="gloo", timeout=timeout)
        if self.device.type == "cuda":
            # NCCL ends the process when it gives up, so the host's flags, which name who is silent, are to be first.
            self.step_group = dist.new_group(backend="nccl", timeout=2 * timeout)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON-like value, on every rank."""
        if self.world_size == 1:
            return value
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        size = torch.tensor([len(payload)])
        dist.broadcast(size, src=0)
        if not self.is_main:
            payload = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(payload, src=0)
        return json.loads(bytes(payload.numpy()))

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Do `work` on rank 0 while the others wait; every rank gets its JSON-like result, or its UserError."""
        result: Any = None
        failure: str | None = None
        if self.is_main:
            try:
                result = work()
            except UserError as error:
                failure = str(error)
        result, failure = self.broadcast([result, failure])
        if failure is not None:
            raise UserError(failure)
        return result

    def on_every_rank(self, work: Callable[[], None]) -> None:
        """Run `work` on every rank, and fail on all of them if it fails on one.

        Raises:
            UserError: this rank's own, or one that names the first rank that failed.
        """
        failure: UserError | None = None
        try:
            work()
        except UserError as error:
            failure = error
        failed = self.gather(int(failure is not None))
        if failure is not None:
            raise failure
        if any(failed):
            raise UserError(f"rank {failed.index(1)} failed, and says why; all ranks must see the same files")

    def on_local_main(self, work: Callable[[], Any]) -> Any:
        """Do `work` on one process of each machine while the others wait; every rank gets rank 0's JSON-like result.

        A UserError is raised where it happens; the launcher ends the others.
        """
        result = work() if launch.local_rank() == 0 else None
        self.min(0)  # until every machine is done
        return self.broadcast(result)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum of a few numbers over the processes, in the order of a tree."""
        if self.world_size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        on_host = values.device.type == "cpu"
        dist.all_gather(parts, values, group=self._host_step_group if on_host else self.step_group)
        return tree_sum(parts)

    def tree_sum_(self, values: torch.Tensor) -> None:
        """Element-wise sum of many numbers over the processes, in place, in the order of a tree.

        Each process adds up a part, for all of them: every number is sent twice, however many processes there are.

        Args:
            values: on the device; as many as can be divided by the processes.
        """
        if self.world_size == 1:
            return
        ours = torch.empty_like(values)  # our part of the values, of every process
        dist.all_to_all_single(ours, values, group=self.step_group)
        parts = list(values.chunk(self.world_size))
        dist.all_gather(parts, tree_sum(ours.chunk(self.world_size)), group=self.step_group)

    def sum_on_host(self, values: list[float]) -> list[float]:
        """Element-wise sum of host numbers over the processes, in float64."""
        if self.world_size == 1:
            return values
        return [float(total) for total in self.sum(torch.tensor(values, dtype=torch.float64))]

    def gather(self, value: Number) -> list[Number]:
        """The numbers of all processes, in the order of their ranks; integers of up to 64 bits, or floats."""
        if self.world_size == 1:
            return [value]
        mine = torch.tensor([value], dtype=torch.float64 if isinstance(value, float) else torch.int64)
        parts = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(parts, mine, group=self._host_step_group)
        numbers: list[Number] = torch.cat(parts).tolist()
        return numbers

    def all_reduce_max_async(self, value: int) -> PendingFlag:
        """Begin to find the largest value over the processes, without waiting for it; several may be under way."""
        if self.world_size == 1:
            return _KnownFlag(value)
        flag = torch.tensor([value])
        work: Any = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._host_step_group, async_op=True)
        self._started = [earlier for earlier in self._started if not earlier.is_completed()] + [work]
        return _ReducedFlag(flag, work)

    def max(self, value: int) -> int:
        """The largest value that any process gives."""
        return -self.min(-value)

    def min(self, value: int) -> int:
        """The smallest value that any process gives; before the first step, for it is waited for long."""
        if self.world_size == 1:
            return value
        smallest = torch.tensor([value])
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        return int(smallest)

    @contextmanager
    def report_lost_ranks(self) -> Iterator[None]:
        """Turn the error of a collective that another process did not take part in into one that names it.

        Raises:
            UserError: instead of such an error.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or not any(words in str(error) for words in LOST):
                raise
            raise UserError(
                f"{self._what_was_lost(error)}; the same command goes on from the last checkpoint"
            ) from error

    def _what_was_lost(self, error: RuntimeError) -> str:
        ranks = " and ".join(f"rank {rank}" for rank in self._absent())
        if not ranks:
            return f"the connection between the processes broke ({first_line(error)})"
        if any(words in str(error) for words in TIMED_OUT):
            return f"{ranks} took no part in a step for {self._step_timeout:g} s (--parallel.step-timeout)"
        return f"{ranks} ended"

    def _absent(self) -> list[int]:
        """Call the roll: all that are still there have lost somebody, too, and answer; none where that is unknown."""
        absent = set(range(self.world_size)) - {self.rank}
        deadline = time.monotonic() + ROLL_CALL
        try:
            self._store.set(f"present/{self.rank}", "")
            while absent and time.monotonic() < deadline:
                absent = {rank for rank in absent if not self._store.check([f"present/{rank}"])}
                time.sleep(0.05)
        except RuntimeError:  # the store was on a machine that is gone
            return []
        return sorted(absent)

    def close(self) -> None:
        """Leave the group; call it on a clean end only, for a dead peer would be waited for."""
        if self.world_size > 1:
            for work in self._started:  # nobody may have read these flags, and no thread may still be at them
                work.wait()
            dist.destroy_process_group()


class _KnownFlag:
    def __init__(self, value: int):
        self._value = value

    def read(self) -> int:
        return self._value


class _ReducedFlag:
    def __init__(self, flag: torch.Tensor, work: Any):
        self._flag, self._work = flag, work

    def read(self) -> int:
        self._work.wait()
        return int(self._flag)


def _open_store(world_size: int, rank: int) -> Any:
    """Where the processes meet; under torchrun it outlives them, and nothing of a former group may be read there.

    Raises:
        UserError: there is none.
    """
    host, port = launch.store_address()
    is_master = rank == 0 and not launch.keeps_store()
    try:
        store = TCPStore(host, port, world_size, is_master, START_TIMEOUT, multi_tenant=True)
    except dist.DistError as error:
        raise UserError(f"rank {rank} finds nobody at MASTER_ADDR {host}, port {port}: {first_line(error)}") from error
    return PrefixStore(f"attempt{launch.restarts()}/{next(_joined)}", store)
