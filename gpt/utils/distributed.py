"""The processes that train together: starting them, and the few things that they tell each other."""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from gpt.errors import UserError
from gpt.utils import launch

START_TIMEOUT = timedelta(hours=2)
"""Rank 0 may prepare a large corpus while the others wait."""


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

    def __init__(self, device: str):
        """Join the processes that torchrun started, if it did; `device` is cpu, cuda or mps."""
        self.world_size, self.rank, local_rank = launch.world_size(), launch.rank(), launch.local_rank()
        self.device = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
        self._last_started: Any = None
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
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=START_TIMEOUT)

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

    def first_on_each_machine(self, work: Callable[[], Any]) -> Any:
        """Do `work` on one process of each machine while the others wait; every rank gets rank 0's JSON-like result.

        A UserError is raised where it happens; the launcher ends the others.
        """
        result = work() if launch.local_rank() == 0 else None
        self.sum_on_host([0.0])  # until every machine is done
        return self.broadcast(result)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over the processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def sum_on_host(self, values: list[float]) -> list[float]:
        """Element-wise sum of host numbers over the processes, in float64."""
        if self.world_size == 1:
            return values
        return [float(total) for total in self.sum(torch.tensor(values, dtype=torch.float64))]

    def start_max(self, value: int) -> PendingFlag:
        """Begin to find the largest value over the processes, without waiting for it."""
        if self.world_size == 1:
            return _KnownFlag(value)
        flag = torch.tensor([value])
        self._last_started = dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)
        return _ReducedFlag(flag, self._last_started)

    def least(self, value: int) -> int:
        """The smallest value that any process gives."""
        return -self.start_max(-value).read()

    def close(self) -> None:
        """Leave the group; call it on a clean end only, for a dead peer would be waited for."""
        if self.world_size > 1:
            if self._last_started is not None:  # nobody may read the last flag, and no thread may still be at it
                self._last_started.wait()
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
