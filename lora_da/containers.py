"""What a container leaves of the machine's memory: Linux control groups, of both versions, one inside another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# By version: the limit, what is used of it, and in `memory.stat` the page cache that nobody has read of late, which is
# given up first.
FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def free_in_container(root: Path = Path("/")) -> int | None:
    """Bytes that every group this process is in still has room for; None where none of them has a limit.

    Args:
        root: of the file system.
    """
    found = (_free(folder, *FILES[version]) for version, folder in _groups(root))
    return min((free for free in found if free is not None), default=None)


def _groups(root: Path) -> Iterator[tuple[int, Path]]:
    """Version and folder of each group that counts memory: this process's own and all around it.

    Inside a container the folders may be its own alone, while the paths are still the machine's; then only the
    outermost folder is there.
    """
    mounted = root / "sys/fs/cgroup"
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        version, top = (2, mounted) if number == "0" else (1, mounted / "memory")
        folder = top / path.lstrip("/")
        for group in (folder, *folder.parents):
            yield version, group
            if group == top:
                break


def _free(folder: Path, limit: str, used: str, cache: str) -> int | None:
    """What one group has room for; None if there is no limit."""
    most, taken = _text(folder / limit), _text(folder / used)
    if most is None or taken is None or not most.strip().isdecimal():  # "max"
        return None
    counts = dict(line.split() for line in (_text(folder / "memory.stat") or "").splitlines() if len(line.split()) == 2)
    return max(0, int(most) - int(taken) + int(counts.get(cache, 0)))


def _text(path: Path) -> str | None:
    """A file's; None where it is not to be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None
