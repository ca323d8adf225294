"""Reading a user's small text file, with one clear error for each way it can be wrong. No torch."""

from __future__ import annotations

from pathlib import Path

MAX_BYTES = 10_000_000


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """The UTF-8 text of `path`, a byte-order mark dropped.

    Raises:
        ValueError: no such file, a directory or device, too large (nothing is read then), unreadable, or not UTF-8.
    """
    if path.is_dir():
        raise ValueError(f"{path}: is a directory; a file is needed")
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: is not a regular file")
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ValueError(f"{path}: {size:,} bytes; at most {max_bytes:,} are read")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
