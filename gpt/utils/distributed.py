"""Ranks: joining them, and the few collectives that they need."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gpt.errors import OwnError, ReportedError, UserError
from gpt.utils import launch
from gpt.utils.flight_recorder import FlightRecorder
from gpt.utils.hang import Limits
from gpt.utils.heartbeat import RESUME_REMEDY, Heartbeat
from gpt.utils.helper import describe_mistake, format_ranks
from gpt.utils.lost_connection import describe_connection, has_timed_out, is_lost_connection
from gpt.utils.pending_flag import KnownFlag, PendingFlag, ReducedFlag
from gpt.utils.rendezvous import RankIdentity, meet
from gpt.utils.tree_sum import tree_sum

Number = TypeVar("Number", int, float)
T = TypeVar("T")

WORK_TIMEOUT = timedelta(days=7)
"""Long, because the other ranks wait while rank 0 prepares a large corpus; heartbeats show that it is alive."""
STEP_TIMEOUT_SECONDS = 600.0
"""Default time that a step waits for the slowest rank."""
START_TIMEOUT_SECONDS = 300.0
"""Default time that the ranks wait for each other at the start."""
ROLL_CALL_SECONDS = 5.0
"""Time in which all ranks that are still there report after one of them is lost."""
SUSPECT_SECONDS = 2.0
"""The same if those that have not reported had hung before, by their heartbeats."""


class DistContext:
    """Rank facts and collectives; with one rank every collective is the identity.

    Host values travel over gloo, as JSON or numbers: never as pickle, and never through the GPU, which would make the
    host wait for it. Device tensors are reduced on their device.
    """

    def __init__(
        self,
        device: str,
        step_timeout: float = STEP_TIMEOUT_SECONDS,
        *,
        start_timeout: float = START_TIMEOUT_SECONDS,
        describe: Callable[[], RankIdentity] = RankIdentity,
        record_folder: Path | None = None,
    ):
        """Join the processes that torchrun started, if it did.

        Args:
            device: cpu, cuda or mps.
            step_timeout: seconds after which a rank that takes no part in a step counts as lost. Outside steps
                (`on_main`, `on_local_main`, ...) ranks wait as long as heartbeats show that the others are alive.
            start_timeout: seconds to wait for the other ranks to come.
            describe: returns what this rank runs, if there are others; a difference to that of rank 0 is an error.
            record_folder: folder for NCCL's last collectives if the run hangs; None: that of temporary files.
        """
        self.world_size, self.rank = launch.world_size(), launch.rank()
        self.device = find_rank_device(device)
        self._step_timeout, self._start_timeout = step_timeout, start_timeout
        self._started: list[Any] = []
        self._store: Any = None
        self.heartbeat: Heartbeat | None = None
        """Finds ranks that hang; None if there is one rank."""
        self.interface = ""
        """Network interface over which gloo connects the ranks; empty if there is one rank, or gloo chooses."""
        self._recorder: FlightRecorder | None = None
        self.step_group: dist.ProcessGroup | None = None
        """Process group for the device tensors of a step; None if there is one rank."""
        self._host_step_group: dist.ProcessGroup | None = None
        if self.world_size > 1 and device == "mps":
            raise UserError("--device mps trains in one process only; use --device cpu under torchrun")
        if device == "cuda":
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            self._join(describe(), record_folder)

    def _join(self, identity: RankIdentity, record_folder: Path | None) -> None:
        """Meet the other ranks and form the groups: two for host values, and one for tensors on GPUs."""
        has_gpu = self.device.type == "cuda"
        gpu = str(torch.cuda.get_device_properties(self.device).uuid) if has_gpu else ""
        meeting = meet(self.rank, self.world_size, identity, gpu=gpu, timeout=self._start_timeout)
        self._store = meeting.store
        self.interface = launch.choose_gloo_interface(meeting.interface)
        self._connect_hosts()
        self._recorder = FlightRecorder(record_folder, self.rank) if has_gpu else None
        self.heartbeat = Heartbeat(
            self._store.clone(),
            self.rank,
            self.world_size,
            timeout=self._step_timeout,
            waits_idle=not has_gpu,
            recorder=self._recorder,
        )
        if has_gpu:
            # NCCL ends the process when it times out. The heartbeats must find the lost rank first, to name it.
            self.step_group = dist.new_group(backend="nccl", timeout=timedelta(seconds=2 * self._step_timeout))

    def _connect_hosts(self) -> None:
        """Form the groups for host values: one that waits for work of any length, and one for steps.

        Raises:
            UserError: a connection is refused or does not come about in time.
        """
        timeout, step_timeout = timedelta(seconds=self._start_timeout), timedelta(seconds=self._step_timeout)
        try:
            dist.init_process_group(
                "gloo", store=self._store, rank=self.rank, world_size=self.world_size, timeout=timeout
            )
            self._host_step_group = self.step_group = dist.new_group(backend="gloo", timeout=step_timeout)
        except RuntimeError as error:
            raise UserError(
                f"rank {self.rank} cannot connect to the other ranks over the network interface "
                f"{self.interface or 'that gloo chose'} within {self._start_timeout:g} s (--parallel.start-timeout): "
                f"{describe_connection(error)}; open the ports between the machines, or set GLOO_SOCKET_IFNAME"
            ) from error
        dist.distributed_c10d._set_pg_timeout(WORK_TIMEOUT, dist.group.WORLD)

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes files and talks to the user."""
        return self.rank == 0

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """Return the JSON-like value of rank `source` on every rank."""
        if self.world_size == 1:
            return value
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        size = torch.tensor([len(payload)])
        dist.broadcast(size, src=source)
        if self.rank != source:
            payload = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(payload, src=source)
        return json.loads(bytes(payload.numpy()))

    @torch.no_grad()
    def broadcast_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copy rank 0's tensors into those of all other ranks, in place.

        Args:
            tensors: on the device; equal in number, shapes and dtypes on every rank.
        """
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0, group=self.step_group)

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 while the others wait, and return its JSON-like result on every rank.

        Raises:
            UserError: on every rank, if `work` fails.
        """
        return self._run_together(work, works=self.is_main)

    def on_every_rank(self, work: Callable[[], None]) -> None:
        """Run `work` on every rank, and fail on all of them if it fails on one.

        Raises:
            UserError: on every rank, if `work` fails on one.
        """
        self._run_together(work, works=True)

    def on_local_main(self, work: Callable[[], Any]) -> Any:
        """Run `work` on one rank of each machine while the others wait; all return rank 0's JSON-like result.

        Raises:
            UserError: on every rank, if `work` fails on one.
        """
        return self._run_together(work, works=launch.local_rank() == 0)

    def local_main_first(self, work: Callable[[], T]) -> T:
        """Run `work` on one rank of each machine, then on the others, and return its result on each.

        The others find what the first has written to a cache.

        Raises:
            UserError: on every rank, if `work` fails on one.
        """
        is_first = launch.local_rank() == 0
        results: list[T] = []
        self._run_together(lambda: results.append(work()), works=is_first)
        if self.world_size > 1:
            self._run_together(lambda: results.append(work()), works=not is_first)
        return results[0]

    def _run_together(self, work: Callable[[], Any], *, works: bool) -> Any:
        """Run `work` on the ranks with `works`, and return rank 0's result on every rank once all are done.

        A mistake of a user on any rank is raised on all: rank 0 reports it, and the others end silently.
        """
        if self.heartbeat is None:
            return work()
        with self.heartbeat.watching(Limits.for_start(self._start_timeout)):
            return self._work_and_wait(work, works=works)

    def _work_and_wait(self, work: Callable[[], Any], *, works: bool) -> Any:
        result: Any = None
        failure: Exception | None = None
        try:
            if works:
                result = work()
        except Exception as error:
            failure = error
        failed = self.min(self.world_size if failure is None else self.rank)
        if failed == self.world_size:
            return self.broadcast(result)
        message = self.broadcast(None if failure is None else describe_mistake(failure), failed)
        if failure is not None and (self.is_main or message is None):
            raise failure  # without a message it is a fault of the program: this rank prints its traceback
        if message is None or not self.is_main:
            raise ReportedError(message or f"rank {failed} failed") from failure
        raise UserError(f"rank {failed}: {message}")

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a few numbers element-wise over the ranks, in the order of a tree."""
        if self.world_size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        on_host = values.device.type == "cpu"
        dist.all_gather(parts, values, group=self._host_step_group if on_host else self.step_group)
        return tree_sum(parts)

    def tree_sum_(self, values: torch.Tensor) -> None:
        """Sum many numbers element-wise over the ranks, in place, in the order of a tree.

        Each rank adds up its share of the numbers for all ranks. So every number is sent twice, at any world size.

        Args:
            values: tensor on the device; its length is a multiple of the world size.
        """
        if self.world_size == 1:
            return
        share = torch.empty_like(values)  # this rank's share of the numbers, as every rank has it
        dist.all_to_all_single(share, values, group=self.step_group)
        parts = list(values.chunk(self.world_size))
        dist.all_gather(parts, tree_sum(share.chunk(self.world_size)), group=self.step_group)

    def sum_on_host(self, values: list[float]) -> list[float]:
        """Sum host numbers element-wise over the ranks, in float64."""
        if self.world_size == 1:
            return values
        return [float(total) for total in self.sum(torch.tensor(values, dtype=torch.float64))]

    def gather(self, value: Number) -> list[Number]:
        """Return the numbers of all ranks, in the order of ranks: integers of up to 64 bits, or floats."""
        if self.world_size == 1:
            return [value]
        own = torch.tensor([value], dtype=torch.float64 if isinstance(value, float) else torch.int64)
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(parts, own, group=self._host_step_group)
        numbers: list[Number] = torch.cat(parts).tolist()
        return numbers

    def all_reduce_max_async(self, value: int) -> PendingFlag:
        """Start to find the largest value over the ranks, without waiting for it; several may be under way."""
        if self.world_size == 1:
            return KnownFlag(value)
        flag = torch.tensor([value])
        work: Any = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._host_step_group, async_op=True)
        self._started = [earlier for earlier in self._started if not earlier.is_completed()] + [work]
        return ReducedFlag(flag, work)

    def max(self, value: int) -> int:
        """Return the largest value of any rank; for use outside steps, because it waits for any work."""
        return -self.min(-value)

    def min(self, value: int) -> int:
        """Return the smallest value of any rank; for use outside steps, because it waits for any work."""
        if self.world_size == 1:
            return value
        smallest = torch.tensor([value])
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        return int(smallest)

    @contextmanager
    def report_lost_ranks(self) -> Iterator[None]:
        """Replace the error of a collective that a rank took no part in by one that names the rank.

        Raises:
            ReportedError: instead of such an error, if the lost rank reports why it ended.
            UserError: instead of such an error, if it does not.
        """
        try:
            yield
        except Exception as error:
            if self.heartbeat is None or isinstance(error, ReportedError):
                raise
            if self.heartbeat.verdict:  # another thread reports a hang, and is ending the ranks
                raise ReportedError(self.heartbeat.verdict) from error
            self.heartbeat.report_failure()
            if not (isinstance(error, RuntimeError) and is_lost_connection(error)):
                self._announce_failure()
                raise
            lost = self._find_lost_ranks()
            if self._has_announced(lost):
                raise ReportedError(str(error)) from error
            message = f"{self._describe_loss(lost, error)}; {RESUME_REMEDY}"
            if self._recorder is not None:
                self._recorder.write()
                message += self._recorder.note
            # Where rank 0 cannot report, the first rank that is left does; the others wait for it.
            is_first = self.rank == min(set(range(self.world_size)) - set(lost)) and self.heartbeat.is_silent(0)
            raise (OwnError if is_first else UserError)(message) from error

    def _announce_failure(self) -> None:
        """Let the other ranks know that this one ends with a message of its own."""
        with contextlib.suppress(RuntimeError):  # the store may be gone
            self._store.set(f"failed/{self.rank}", "")

    def _has_announced(self, ranks: list[int]) -> bool:
        """Return whether one of the ranks ended with a message of its own."""
        if self._store is None:
            return False
        try:
            return any(self._store.check([f"failed/{rank}"]) for rank in ranks)
        except RuntimeError:
            return False

    def _describe_loss(self, lost: list[int], error: RuntimeError) -> str:
        if not lost:
            return f"the connection between the ranks broke ({describe_connection(error)})"
        ranks = format_ranks(lost)
        if has_timed_out(error):
            return f"{ranks} took no part in a step for {self._step_timeout:g} s (--parallel.step-timeout)"
        return f"{ranks} ended"

    def _find_lost_ranks(self) -> list[int]:
        """Return the ranks that do not answer a roll call; empty if the store is gone.

        The others answer, because each of them has failed in a collective with the lost rank, too.
        """
        assert self.heartbeat is not None
        lost, began = set(range(self.world_size)) - {self.rank}, time.monotonic()
        try:
            self._store.set(f"present/{self.rank}", "")
            while lost and time.monotonic() < began + ROLL_CALL_SECONDS:
                lost = {rank for rank in lost if not self._store.check([f"present/{rank}"])}
                if time.monotonic() > began + SUSPECT_SECONDS and all(map(self.heartbeat.is_stuck, lost)):
                    break
                time.sleep(0.05)
        except RuntimeError:  # the store was on the lost machine
            return []
        return sorted(lost)

    def close(self) -> None:
        """Leave the group; call it on a clean end only, because it waits for all ranks."""
        if self.heartbeat is not None:
            self.heartbeat.stop()
            for work in self._started:  # a flag that nobody has read must not be in use by a thread any more
                work.wait()
            dist.destroy_process_group()


def find_rank_device(kind: str) -> torch.device:
    """Return the device of this rank: on GPUs that with its local rank, or the only one that the launcher shows it.

    Args:
        kind: cpu, cuda or mps.

    Raises:
        UserError: this machine has fewer GPUs than ranks.
    """
    if kind != "cuda":
        return torch.device(kind)
    local_rank, n_gpus = launch.local_rank(), torch.cuda.device_count()
    if n_gpus == 1:  # Slurm's --gpus-per-task=1 shows each task its own; ranks that share one are found when they meet
        return torch.device(kind, 0)
    if local_rank >= n_gpus:
        raise UserError(
            f"torchrun started local rank {local_rank}, but this machine has {n_gpus} GPUs; lower --nproc-per-node"
        )
    return torch.device(kind, local_rank)
