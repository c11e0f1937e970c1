"""`--data.source shakespeare`: tinyshakespeare, downloaded once, verified and kept in the cache."""

import hashlib
import http.client
import logging
import urllib.error
import urllib.request
from pathlib import Path

from gpt.configs.data_config import SHAKESPEARE
from gpt.errors import UserError
from gpt.utils.atomic_io import require_writable, write_text
from gpt.utils.helper import sha256_of_file

log = logging.getLogger(__name__)

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FILE_NAME = "tinyshakespeare.txt"
MAX_BYTES = 2**21
"""Upper bound of a download; the text has 1,115,394 bytes."""
TIMEOUT_SECONDS = 20.0


def fetch_shakespeare(flag: str, cache_dir: Path) -> Path:
    """Return tinyshakespeare.txt of the current folder, else of the cache, which gets it from the network.

    Args:
        flag: option that names the source, for messages.
        cache_dir: folder to keep it in.

    Raises:
        UserError: it cannot be downloaded, or the download is another text.
    """
    if Path(FILE_NAME).is_file():
        return Path(FILE_NAME)
    cached = cache_dir / FILE_NAME
    if not cached.is_file() or sha256_of_file(cached) != SHA256:
        require_writable(cache_dir, "--data.cache-dir")
        log.info("downloading %s to %s", URL, cached)
        write_text(cached, _download(flag).decode("ascii"))
    return cached


def _download(flag: str) -> bytes:
    remedy = f"save the text as {FILE_NAME} in this folder, or name another text"
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT_SECONDS) as response:
            content: bytes = response.read(MAX_BYTES)
    except (OSError, http.client.HTTPException) as error:  # URLError and HTTPError are OSErrors
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{flag} {SHAKESPEARE}: {URL} cannot be downloaded: {reason}; {remedy}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise UserError(
            f"{flag} {SHAKESPEARE}: {URL} is another text here: its SHA-256 is {digest}, not {SHA256}; {remedy}"
        )
    return content
