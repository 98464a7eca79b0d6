"""Writing files whole, and facts about files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from support.errors import InputError


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
        raise InputError(f"{path}: could not be written ({error})") from None
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
        raise InputError(f"{path}: could not be written ({error}); the file that was there is untouched") from None
    finally:
        temporary.unlink(missing_ok=True)


def _refuse_own_output(path: Path) -> None:
    """Raises InputError if standard output or error goes to this file, as to /dev/stdout: the rename would lose it."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # no such file, or a closed descriptor
            if path.is_file() and os.path.samestat(path.stat(), os.fstat(descriptor)):
                raise InputError(f"{path}: is the file that this program's output goes to; choose another file")


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text with `write_file`."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Writes a value as indented JSON with `write_file`. `options` go to json.dumps."""
    write_text(path, json.dumps(value, **{"indent": 2} | options) + "\n")


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
