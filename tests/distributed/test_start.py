"""The start of a run on two machines: network namespaces stand for them, with one process in each."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gpt.configs.train_config import TrainConfig
from tests.distributed.test_torchrun import MAIN, read_metric

NAMES = ("gpt-test-a", "gpt-test-b")
ADDRESSES = ("10.123.45.1", "10.123.45.2")
HOSTS = (
    "127.0.0.1 localhost\n127.0.1.1 machine-a\n",
    f"127.0.0.1 localhost\n127.0.1.1 machine-b\n{ADDRESSES[0]} machine-a\n",
)
"""/etc/hosts of both machines: as Debian installs it, a machine's own name is 127.0.1.1."""
ENTER = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'


def configure_network(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[list[str]]]:
    """Join two network namespaces by a cable; return for each the command line that runs a program there."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("needs ip (iproute2) and unshare (util-linux)")
    with ExitStack() as stack:
        try:
            for name in NAMES:
                configure_network("netns", "add", name)
                stack.callback(configure_network, "netns", "del", name)
            configure_network(
                *("link", "add", "cable-a", "netns", NAMES[0], "type", "veth"),
                *("peer", "name", "cable-b", "netns", NAMES[1]),
            )
            for name, device, address in zip(NAMES, ("cable-a", "cable-b"), ADDRESSES, strict=True):
                configure_network("-n", name, "addr", "add", f"{address}/24", "dev", device)
                for interface in ("lo", device):
                    configure_network("-n", name, "link", "set", interface, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.decode().strip()}")
        commands = []
        for name, hosts in zip(NAMES, HOSTS, strict=True):
            (tmp_path / f"{name}.hosts").write_text(hosts)
            unshare = ["unshare", "--mount", "--uts", "sh", "-c", ENTER, "sh", str(tmp_path / f"{name}.hosts")]
            commands.append(["ip", "netns", "exec", name, *unshare, f"machine-{name[-1]}"])
        yield commands


def start_rank(
    rank: int, config: TrainConfig, *flags: str, enter: list[str] | None = None, **variables: str
) -> subprocess.Popen[str]:
    file = config.run_dir.with_suffix(f".{rank}.json")
    file.write_text(config.model_dump_json())
    launcher = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": "29517", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*(enter or []), sys.executable, str(MAIN), "train", "--config", str(file), *flags],
        env=os.environ | launcher | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_machines_whose_names_are_loopback_addresses_train(
    machines: list[list[str]], tiny: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """Let MASTER_ADDR be the name of rank 0's machine, which is 127.0.1.1 there and 10.123.45.1 on the other."""
    config = tiny(tmp_path / "run")
    ranks = [start_rank(rank, config, enter=machines[rank], MASTER_ADDR="machine-a") for rank in (0, 1)]
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs
    assert "the processes meet over cable-a (gloo)" in outputs[0]
    assert len(read_metric(tmp_path / "run", "train/loss")) == 8


def test_ranks_with_other_flags_end_before_any_work(tiny: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = tiny(tmp_path / "run")
    others = config.model_copy(update={"lr": config.lr.model_copy(update={"warmup_steps": 3})})
    ranks = [start_rank(rank, (config, others)[rank], MASTER_ADDR="127.0.0.1") for rank in (0, 1)]
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2]
    assert outputs == [
        "gpt: error: --lr.warmup-steps is 3 on rank 1 and 2 on rank 0; start every rank with the same flags\n",
        "",
    ]
    assert not (tmp_path / "run").exists()


def test_rank_that_never_comes_is_named_in_one_line(tiny: Callable[..., TrainConfig], tmp_path: Path) -> None:
    flags = ("--parallel.start-timeout", "3")
    process = start_rank(0, tiny(tmp_path / "run"), *flags, MASTER_ADDR="127.0.0.1")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert output == (
        "gpt: error: rank 1 did not come to MASTER_ADDR 127.0.0.1, port 29517, in 3 s (--parallel.start-timeout); "
        "start every rank with the same MASTER_ADDR and MASTER_PORT\n"
    )
