"""The processes that a process started, on Linux."""

from pathlib import Path

PROC = Path("/proc")


def list_descendants(ancestor: int) -> list[int]:
    """Return the ids of all processes that `ancestor` started, directly or indirectly; none on other systems."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir() if PROC.is_dir() else ():
        if entry.name.isdigit() and (stat := read_stat(int(entry.name))) is not None:
            children.setdefault(int(stat[1]), []).append(int(entry.name))
    descendants, pending = list[int](), [ancestor]
    while pending:
        own_children = children.get(pending.pop(), [])
        descendants += own_children
        pending += own_children
    return descendants


def read_stat(pid: int) -> list[str] | None:
    """Return state, parent id and the later fields of /proc/PID/stat (see proc(5)), or None if there is no process."""
    try:
        return (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
