"""Files that are there whole or not at all."""

from __future__ import annotations

import pathlib


def write_whole(path: pathlib.Path, content: str | bytes) -> None:
    """Writes under a temporary name in the same folder, then renames over `path`."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
