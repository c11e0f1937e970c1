"""Loading of the libraries that the installation compiles from the C files of this package."""

import ctypes
import hashlib
from pathlib import Path


def load_library(source: Path, compiled: Path, prefix: str) -> ctypes.CDLL | None:
    """Return a compiled library; None where there is none, its source differs, or this CPU cannot run it.

    Args:
        source: the C file.
        compiled: its library.
        prefix: beginning of the names of its functions, such as PREFIX_supported.
    """
    try:
        ctypes.CDLL(_find_openmp_runtime(), ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(compiled))
        get_digest, is_supported = (library[f"{prefix}_{name}"] for name in ("source", "supported"))
        get_digest.restype = ctypes.c_char_p
        is_current = get_digest().decode() == hashlib.sha256(source.read_bytes()).hexdigest()
    except (OSError, AttributeError):
        return None
    return library if is_current and is_supported() else None


def _find_openmp_runtime() -> str | None:
    """Return the OpenMP runtime that torch uses: a second one would compete with its threads for the cores."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    mapped = {Path(name) for line in maps.splitlines() for name in line.split(maxsplit=5)[5:]}
    runtimes = [path for path in mapped if path.name.startswith(("libgomp", "libiomp5"))]
    # torch's is in its own folder or in torch.libs next to it.
    ranked = sorted(runtimes, key=lambda path: ({"torch", "torch.libs"}.isdisjoint(path.parts), str(path)))
    return str(ranked[0]) if ranked else None
