"""Writing files whole, and facts about files."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

from support.errors import DISK_FULL, InputError

DISK_FULL_TEXT = os.strerror(errno.ENOSPC)  # in messages of libraries


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a temporary file with `write(temporary)` and renames it: `path` is always the old file or the new one.

    A link is followed: the file that it names is replaced. A device or a pipe is written directly.
    Raises: InputError if the file cannot be written, or if it is the one that the program's output goes to.
    """
    _refuse_own_output(path)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            write(path)
            return
        target = path.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise not_written(path, error) from None
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        umask = os.umask(0)  # the only way to read it is to set it
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes a private file
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # the rename must not reach the disk before the content
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:  # a full disk, most of the time
        raise not_written(path, error, "; the file that was there is untouched") from None
    finally:
        temporary.unlink(missing_ok=True)


def not_written(path: Path, error: Exception, more: str = "") -> InputError:
    """The error for a file that could not be written."""
    full = isinstance(error, OSError) and error.errno in DISK_FULL or DISK_FULL_TEXT in str(error)
    remedy = "; free some space there" if full else ""
    return InputError(f"{path}: could not be written ({error}){more}{remedy}")


def _refuse_own_output(path: Path) -> None:
    """Raises InputError if standard output or error goes to this file, as to /dev/stdout: the rename would lose it."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # no such file, or a closed descriptor
            if path.is_file() and os.path.samestat(path.stat(), os.fstat(descriptor)):
                raise InputError(f"{path}: is the file that this program's output goes to; choose another file")


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """Opens a file, or a pipe, of UTF-8 text, with or without a byte-order mark, plain or packed with gzip.

    Raises: OSError.
    """
    file = open(path, "rb")
    packed = file.peek(2)[:2] == b"\x1f\x8b"
    content = gzip.GzipFile(fileobj=file) if packed else file
    return io.TextIOWrapper(content, encoding="utf-8-sig", newline=newline)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text with `write_file`."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Writes a value as indented JSON with `write_file`. `options` go to json.dumps."""
    write_text(path, json.dumps(value, **{"indent": 2} | options) + "\n")


def json_line(value: Any, stream: TextIO) -> str:
    """A value as a line of JSON that stays valid in the stream's encoding: where it is not UTF-8, all is escaped."""
    line = json.dumps(value, ensure_ascii=False)
    unicode = (stream.encoding or "utf-8").lower().replace("-", "") == "utf8"
    return (line if unicode and is_utf8(line) else json.dumps(value)) + "\n"


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can hold a string. JSON can spell others, with half a surrogate pair."""
    try:
        return text.encode() is not None
    except UnicodeEncodeError:
        return False


def short_names(paths: list[Path]) -> list[str]:
    """The end of each path, as short as keeps different paths different.

    >>> short_names([Path("runs/a/hard"), Path("runs/b/hard")])
    ['a/hard', 'b/hard']
    """
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    names = [os.path.join(*path) for path in parts]
    for count in range(1, max(map(len, parts), default=1)):
        short = [os.path.join(*path[-count:]) for path in parts]
        if len(set(short)) == len(set(names)):
            return short
    return names


def file_digest(path: Path) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def cached_name(folder: Path) -> str | None:
    """The hub's name of the model in a folder of the hub's cache; None for other folders.

    >>> cached_name(Path("/cache/models--owner--name/snapshots/0123"))
    'owner/name'
    """
    match = re.search(r"models--([^/]+)/snapshots/", f"{folder.absolute()}/")
    return match and match[1].replace("--", "/")
