"""`gpt serve` as a program: port in use, SIGTERM, missing extra."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gpt.commands.serve import open_socket, run
from gpt.errors import UserError

pytest.importorskip("fastapi", reason="needs the extra serve")

import httpx


def test_sigterm_lets_a_stream_finish_and_ends_with_status_0(finished_run: Path) -> None:
    command = [sys.executable, "-m", "gpt.main", "serve", str(finished_run), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.stdout is not None
        match = None
        while match is None:
            line = process.stdout.readline()
            assert line, "the server ended"
            match = re.search(r"serving on (http://127\.0\.0\.1:\d+)/", line)
        body = {"prompt": "the", "max_tokens": 12, "stream": True, "seed": 1, "stop_token_ids": []}
        with httpx.stream("POST", f"{match[1]}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            assert [*lines][-2] == "data: [DONE]"
        assert process.stdout.read().endswith("stopped\n")
        assert process.wait(timeout=60) == 0


def test_port_in_use_is_noticed_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"--host 127\.0\.0\.1 --port {port}: Address already in use; choose another"
        ):
            run(["/no/such/run", "--port", str(port)])


def test_address_of_another_machine_is_refused() -> None:
    with pytest.raises(UserError, match=r"--host 192\.0\.2\.1 --port 0: "):
        open_socket("192.0.2.1", 0)


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt.commands.serve.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"gpt serve needs fastapi, jinja2, uvicorn: pip install 'gpt-training-pipeline\[serve\]'"
    ):
        run(["runs/x"])


def test_help_loads_neither_torch_nor_fastapi() -> None:
    script = (
        "import sys\nfrom gpt.commands.serve import run\n"
        "try:\n    run(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'fastapi', 'jinja2', 'uvicorn'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert "--max-queue" in done.stdout
