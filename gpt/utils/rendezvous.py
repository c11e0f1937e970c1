"""The meeting of the ranks: reach the store at MASTER_ADDR, wait for every rank, and compare what they run.

Each rank writes an entry. Rank 0 reads all entries and writes the verdict: the run starts, or one line says why not.
Every wait ends at `--parallel.start-timeout`.
"""

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from gpt.errors import OwnError, ReportedError, UserError
from gpt.utils import launch
from gpt.utils.helper import first_line, format_ranks
from gpt.utils.network import find_interface, find_local_address, is_loopback

MIN_POLL_SECONDS, MAX_POLL_SECONDS = 0.02, 0.5
"""Seconds between two looks at the store; they grow, because a thousand ranks share it."""
CONNECT_SECONDS = 5.0
"""Time of one attempt to connect."""
VERDICT_GRACE_SECONDS = 10.0
"""Time that rank 0 has, after the last rank could have come, to write its verdict."""
READ_SECONDS = 2.0
"""Time that the other ranks have to read the verdict before rank 0 ends."""
LOCALHOST = "127.0.0.1"
IDENTITY_KEY, VERDICT_KEY = "identity", "start verdict"
_n_meetings = itertools.count()
"""Number of meetings that this process took part in; Python code may train several runs, one after the other."""


@dataclass(frozen=True)
class RankIdentity:
    """Flags, versions and code of a rank, which must be the same on every rank; each maps names to JSON values."""

    flags: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    """Version of each library that the results depend on."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Digest of each file of the package."""


@dataclass(frozen=True)
class Meeting:
    """The result of a meeting."""

    store: Any
    """The torch.distributed store of this attempt to train."""
    interface: str
    """Network interface that reaches the other ranks; empty if it could not be found."""


def meet(rank: int, world_size: int, identity: RankIdentity, *, gpu: str, timeout: float) -> Meeting:
    """Meet the other ranks and return once all have come and run the same.

    Args:
        rank: this process's rank.
        world_size: number of ranks.
        identity: compared with that of rank 0.
        gpu: an identifier of this rank's GPU that no other GPU has; empty if it has none.
        timeout: seconds to wait for the other ranks.

    Raises:
        UserError: a rank is missing or differs, or rank 0 cannot be reached.
    """
    host, port = launch.store_address()
    deadline = time.monotonic() + timeout
    roll_call = RollCall(rank, world_size, f"MASTER_ADDR {host}, port {port}", timeout)
    store = _open_store(roll_call, host, port, deadline)
    if store.add(f"taken/{rank}", 1) > 1:
        raise OwnError(f"two processes have RANK {rank} at {roll_call.place}; give each process a rank of its own")
    address = find_local_address(host, port)
    entry = Entry(address=address, gpu=gpu)
    if rank == 0:
        peer_address = roll_call.judge_entries(store, identity, entry, deadline)
    else:
        peer_address = roll_call.write_entry(store, identity, entry, deadline)
    if is_loopback(address) and peer_address:  # this machine holds rank 0, and MASTER_ADDR is its local name
        address = find_local_address(peer_address, port)
    return Meeting(store, find_interface(address))


@dataclass(frozen=True)
class Entry:
    """Facts about one rank for rank 0."""

    address: str
    """The rank's address on the route to rank 0."""
    gpu: str = ""
    difference: str = ""
    """First difference between this rank and rank 0, for people; empty if there is none."""


@dataclass(frozen=True)
class RollCall:
    """The exchange of entries and of the verdict over a store."""

    rank: int
    world_size: int
    place: str
    """Address of the store, for messages."""
    timeout: float
    """Seconds to wait for the other ranks."""

    def judge_entries(self, store: Any, identity: RankIdentity, own: Entry, deadline: float) -> str:
        """Wait for the entries of all ranks, on rank 0, and write the verdict; return an address of another machine.

        Raises:
            UserError: ranks are missing or differ.
        """
        store.set(IDENTITY_KEY, json.dumps(asdict(identity) | {"world_size": self.world_size}))
        entries = {0: own} | self._read_entries(store, deadline)
        if missing := sorted(set(range(self.world_size)) - set(entries)):
            problem = (
                f"{format_ranks(missing)} did not come to {self.place}, in {self.timeout:g} s "
                "(--parallel.start-timeout); start every rank with the same MASTER_ADDR and MASTER_PORT"
            )
        else:
            differences = [entry.difference for entry in entries.values() if entry.difference]
            problem = differences[0] if differences else _find_shared_gpu(entries)
        address = next((entry.address for entry in entries.values() if not is_loopback(entry.address)), "")
        store.set(VERDICT_KEY, json.dumps({"error": problem, "address": address}))
        if problem:  # the store may end with this process, so the others read it first
            readers = [f"read/{rank}" for rank in entries if rank]
            _poll(lambda: not readers or store.check(readers), time.monotonic() + READ_SECONDS)
            raise UserError(problem)
        return address

    def _read_entries(self, store: Any, deadline: float) -> dict[int, Entry]:
        """Return the entries of the other ranks that come before the deadline."""
        missing, entries = set(range(1, self.world_size)), dict[int, Entry]()

        def have_all_come() -> bool:
            for rank in list(missing):
                if store.check([f"entry/{rank}"]):
                    entries[rank] = Entry(**json.loads(store.get(f"entry/{rank}")))
                    missing.discard(rank)
            return not missing

        _poll(have_all_come, deadline)
        return entries

    def write_entry(self, store: Any, identity: RankIdentity, entry: Entry, deadline: float) -> str:
        """Write this rank's entry, wait for the verdict of rank 0, and return an address of another machine.

        Raises:
            UserError: rank 0 does not come, or rejects the entries.
        """
        try:
            verdict = self._exchange(store, identity, entry, deadline)
        except RuntimeError as error:  # of the store
            raise self.own_error(f"rank 0 ended while the ranks met at {self.place}; see its output") from error
        if verdict["error"]:
            raise ReportedError(verdict["error"])
        return verdict["address"]

    def _exchange(self, store: Any, identity: RankIdentity, entry: Entry, deadline: float) -> dict[str, str]:
        if not _poll(lambda: store.check([IDENTITY_KEY]), deadline):
            raise self.own_error(
                f"rank 0 did not come to {self.place}, in {self.timeout:g} s (--parallel.start-timeout); start rank 0"
            )
        expected = json.loads(store.get(IDENTITY_KEY))
        if (size := expected.pop("world_size")) != self.world_size:
            raise OwnError(f"WORLD_SIZE is {self.world_size} on rank {self.rank} and {size} on rank 0; set one value")
        difference = describe_difference(self.rank, identity, RankIdentity(**expected))
        store.set(f"entry/{self.rank}", json.dumps(asdict(replace(entry, difference=difference))))
        patience = time.monotonic() + self.timeout + VERDICT_GRACE_SECONDS  # rank 0 may have come just now
        if not _poll(lambda: store.check([VERDICT_KEY]), patience):
            raise self.own_error(f"rank 0 came to {self.place}, but did not answer; see its output")
        verdict: dict[str, str] = json.loads(store.get(VERDICT_KEY))
        store.set(f"read/{self.rank}", "")
        return verdict

    def own_error(self, message: str) -> UserError:
        """Return an error that one rank of this machine reports at once, and the others later."""
        return OwnError(message) if launch.local_rank() == 0 else UserError(message)


def describe_difference(rank: int, own: RankIdentity, expected: RankIdentity) -> str:
    """Return the first difference between a rank and rank 0, with the remedy; empty if they run the same.

    >>> describe_difference(1, RankIdentity({"--seed": 2}), RankIdentity({"--seed": 1}))
    '--seed is 2 on rank 1 and 1 on rank 0; start every rank with the same flags'
    """
    same_version = "install the same versions on every machine"
    for here, there, remedy in (
        (own.versions, expected.versions, same_version),
        (own.files, expected.files, "install the same code on every machine"),
        (own.flags, expected.flags, "start every rank with the same flags"),
    ):
        for name in sorted({*here, *there}):
            if here.get(name) != there.get(name):
                value, expected_value = (_format_value(side.get(name)) for side in (here, there))
                return f"{name} is {value} on rank {rank} and {expected_value} on rank 0; {remedy}"
    return ""


def _format_value(value: Any) -> str:
    return "missing" if value is None else value if isinstance(value, str) else json.dumps(value)


def _find_shared_gpu(entries: Mapping[int, Entry]) -> str:
    """Return an error if two ranks have the same GPU, on which NCCL would refuse them; else an empty text."""
    owners: dict[str, int] = {}
    for rank, entry in entries.items():
        first = owners.setdefault(entry.gpu, rank) if entry.gpu else rank
        if first != rank:
            return f"rank {first} and rank {rank} have the same GPU; lower --nproc-per-node, or show each its own GPU"
    return ""


def _poll(condition: Callable[[], bool], deadline: float) -> bool:
    """Wait until a condition holds; return whether it did before the deadline."""
    pause = MIN_POLL_SECONDS
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause = min(2 * pause, MAX_POLL_SECONDS)
    return True


def _open_store(roll_call: RollCall, host: str, port: int, deadline: float) -> Any:
    """Connect to the store where the ranks meet; rank 0 opens it, unless the launcher has.

    Under torchrun it outlives the ranks, so each attempt has a prefix: no rank may read what a former group wrote.

    Raises:
        UserError: there is no store.
    """
    number = next(_n_meetings)
    timeout = timedelta(seconds=roll_call.timeout)
    is_master = roll_call.rank == 0 and not launch.keeps_store()
    if is_master:
        if number == 0:
            _require_free_port(port)
        server = TCPStore(LOCALHOST, port, is_master=True, timeout=timeout, wait_for_workers=False, multi_tenant=True)
    connection = _Connection(host, port, timeout)
    if not connection.wait(deadline):
        if is_master:
            raise UserError(
                f"rank 0 cannot reach itself at {roll_call.place}, in {roll_call.timeout:g} s "
                f"(--parallel.start-timeout): {connection.reason}; set MASTER_ADDR to an address of this machine"
            )
        raise roll_call.own_error(
            f"rank {roll_call.rank} cannot reach rank 0 at {roll_call.place}, in {roll_call.timeout:g} s "
            f"(--parallel.start-timeout): {connection.reason}; set MASTER_ADDR and MASTER_PORT to where rank 0 runs, "
            "and start it"
        )
    store = server if is_master else connection.store
    return PrefixStore(f"attempt{launch.restarts()}/{number}", store)


def _require_free_port(port: int) -> None:
    """Check that this process may listen at a port, where the store would log a page of stack frames.

    Raises:
        UserError: it may not.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
            server.listen()
        except OSError as error:
            raise UserError(f"MASTER_PORT {port}: rank 0 cannot listen there: {error.strerror}; set another") from error


class _Connection:
    """A thread that connects to the store; a foreign server at its address would block it for ever.

    It tries a plain socket first, because the store's client logs a page of stack frames for every failure.
    """

    def __init__(self, host: str, port: int, timeout: timedelta):
        self._host, self._port, self._timeout = host, port, timeout
        self._ended = threading.Event()
        self.store: Any = None
        self.reason = "no answer"
        """Reason of the last failure."""
        self._thread = threading.Thread(target=self._connect, name="rendezvous", daemon=True)
        self._thread.start()

    def wait(self, deadline: float) -> bool:
        """Return whether there is a connection before the deadline."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        self._ended.set()
        return self.store is not None

    def _connect(self) -> None:
        while not self._ended.is_set():
            try:
                socket.create_connection((self._host, self._port), CONNECT_SECONDS).close()
            except OSError as error:
                self.reason = error.strerror or str(error)
                self._ended.wait(MAX_POLL_SECONDS)
                continue
            self.reason = "what listens there is no torch.distributed store"
            try:
                self.store = TCPStore(self._host, self._port, timeout=self._timeout, wait_for_workers=False)
            except dist.DistError as error:
                self.reason = first_line(error)
                continue
            return
