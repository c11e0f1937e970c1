"""`gpt serve RUN_DIR`: answer requests in the form of OpenAI's API, and a page to try the model on."""

import logging
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from types import FrameType
from typing import Annotated, Literal

from pydantic import Field

from gpt.configs.base import Config, FilePath
from gpt.configs.cli import parse
from gpt.configs.fields import POSITIONAL
from gpt.errors import UserError

log = logging.getLogger(__name__)


class ServeCommand(Config):
    """Serve a trained model over HTTP: OpenAI's /v1/completions and /v1/chat/completions, and a page at /."""

    run_dir: Annotated[FilePath, POSITIONAL]
    """Folder of a run, or of one of its checkpoints."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in, for which an API key is advisable."""
    port: int = Field(8000, ge=0, le=65_535)
    """Port to listen on; 0: any free one."""
    api_key: str = ""
    """Key that API requests must carry; empty: none."""
    model_name: str = ""
    """Name of the model in the API; empty: name of the folder."""
    max_batch: int = Field(16, ge=1, le=1024)
    """Completions that are generated at the same time; each reserves memory for a full context."""
    max_queue: int = Field(256, ge=0, le=100_000)
    """Completions that may wait for their turn; more are refused with status 429."""
    timeout: float = Field(300.0, gt=0)
    """Seconds after which a completion ends with an error, waiting included."""
    grace: float = Field(30.0, ge=0)
    """Seconds that running completions may still take after SIGTERM or Ctrl-C."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to run the model on; auto: cuda, else mps where it computes as the CPU does, else cpu."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of weights and matmuls; auto: bfloat16 if the hardware has it, else float32."""


def run(argv: Sequence[str]) -> int:
    """Parse the flags, load the model, and serve until SIGTERM or Ctrl-C."""
    command = parse(ServeCommand, argv, prog="gpt serve")
    missing = [name for name in ("fastapi", "jinja2", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UserError(f"gpt serve needs {', '.join(missing)}: pip install 'gpt-training-pipeline[serve]'")
    with open_socket(command.host, command.port) as listener:
        return _serve(command, listener)


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens, so that a port in use is noticed before the model is loaded.

    Raises:
        UserError: the address cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]  # Python appends the address
        raise UserError(f"--host {host} --port {port}: {reason}; choose another port, or 0 for any free one") from error


def _serve(command: ServeCommand, listener: socket.socket) -> int:
    import uvicorn

    from gpt.inference.load import load_for_inference
    from gpt.serving.api import build_app
    from gpt.serving.engine import Engine
    from gpt.serving.metrics import Metrics

    class Server(uvicorn.Server):
        """A server that ends with status 0 after SIGTERM, and not by raising the signal again."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            def handle(signum: int, frame: FrameType | None) -> None:
                self.handle_exit(signum, frame)

            before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    model = load_for_inference(command.run_dir, command.device, command.dtype)
    engine = Engine(
        model,
        max_batch=command.max_batch,
        max_queue=command.max_queue,
        timeout=command.timeout,
        metrics=Metrics(),
    )
    app = build_app(engine, command.model_name or command.run_dir.resolve().name, api_key=command.api_key)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=max(1, round(command.grace))
    )
    host, port = listener.getsockname()[:2]
    engine.start()
    log.info("serving on http://%s:%d/ (API: http://%s:%d/v1); Ctrl-C stops", host, port, host, port)
    try:
        Server(config).run(sockets=[listener])
    finally:
        engine.stop(grace_seconds=0)
    log.info("stopped")
    return 0
