"""Writing files so that a reader never sees half of one: write beside, flush, rename over.

A full disk or Ctrl-C leaves the old file (or none) and no debris; the next run goes on from what is whole.  A full disk is told by the
name of the file that was to be written, which neither Python nor the libraries that write say by themselves.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def is_disk_full(error: BaseException) -> bool:
    """Python says so by number; libraries that write through other languages only in their text."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name `path` when the disk turns out to be full inside the block.

    Raises:
        OSError: ENOSPC, with the path as its filename.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same directory; it replaces `path` when the block ends without an error."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` in one step."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def write_json_atomic(path: Path, value: Any) -> None:
    """Write `value` as indented JSON in one step (NaN is refused: it is not JSON)."""
    write_text_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
