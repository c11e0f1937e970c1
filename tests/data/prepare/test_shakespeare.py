import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from gpt.configs.presets import PRESETS
from gpt.data.prepare import shakespeare
from gpt.data.prepare.sources import find_source
from gpt.errors import UserError

TEXT = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"


class Server(HTTPServer):
    """Serves one text and counts the requests."""

    content = TEXT
    status = 200
    length: int | None = None
    n_requests = 0


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.n_requests += 1
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(self.server.length or len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with Server(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setattr(shakespeare, "URL", f"http://127.0.0.1:{server.server_port}/input.txt")
        monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(TEXT).hexdigest())
        monkeypatch.setattr(shakespeare, "TIMEOUT_SECONDS", 2.0)
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.delenv(name, raising=False)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def error_of(cache: Path) -> str:
    with pytest.raises(UserError) as error:
        find_source("shakespeare", cache_dir=cache)
    assert not (cache / "tinyshakespeare.txt").exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_text_is_downloaded_once_and_kept_in_the_cache(server: Server, tmp_path: Path) -> None:
    first = find_source("shakespeare", cache_dir=tmp_path / "cache")
    assert (first.name, [file.name for file in first.files]) == ("tinyshakespeare", ["tinyshakespeare.txt"])
    assert first.files[0].path.read_bytes() == TEXT
    assert find_source("shakespeare", cache_dir=tmp_path / "cache") == first
    assert server.n_requests == 1
    first.files[0].path.write_bytes(b"damaged")
    assert find_source("shakespeare", cache_dir=tmp_path / "cache") == first
    assert server.n_requests == 2


def test_files_of_the_user_come_first(server: Server, tmp_path: Path) -> None:
    Path("tinyshakespeare.txt").write_bytes(TEXT)
    given = find_source("shakespeare", cache_dir=tmp_path / "cache")
    assert given.files[0].path == Path("tinyshakespeare.txt")
    assert given == find_source("tinyshakespeare.txt")  # the same corpus as under its path
    Path("shakespeare").write_text("another text of this name")
    assert find_source("shakespeare").files[0].path == Path("shakespeare")
    assert server.n_requests == 0


def test_another_text_is_refused(server: Server, tmp_path: Path) -> None:
    server.content = b"<html>Sign in to this network</html>"
    error = error_of(tmp_path / "cache")
    assert f"its SHA-256 is {hashlib.sha256(server.content).hexdigest()}, not {shakespeare.SHA256}" in error
    assert "save the text as tinyshakespeare.txt in this folder" in error


def test_failed_download_is_one_line(server: Server, tmp_path: Path) -> None:
    server.status = 404
    error = error_of(tmp_path / "cache")
    assert error.startswith(f"--data.source shakespeare: {shakespeare.URL} cannot be downloaded: Not Found; save the ")
    server.status, server.content, server.length = 200, TEXT[:10], len(TEXT)  # the connection breaks
    assert error_of(tmp_path / "cache").startswith(f"--data.source shakespeare: {shakespeare.URL} ")


def test_without_a_network_the_error_says_where_the_text_is(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shakespeare, "URL", "http://127.0.0.1:9/input.txt")
    error = error_of(tmp_path / "cache")
    assert error.startswith("--data.source shakespeare: http://127.0.0.1:9/input.txt cannot be downloaded: ")
    assert "Connection refused" in error


def test_presets_of_shakespeare_name_it() -> None:
    assert [PRESETS[name]().data.source for name in ("shakespeare-char", "speedrun-char")] == [("shakespeare",)] * 2
