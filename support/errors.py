"""Errors that the command line reports in one line. Imports the standard library only."""

from __future__ import annotations

import errno

# No space left, none of the user's quota, or more than a file may have.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(Exception):
    """The user's input cannot be used. The message says in one line what is wrong, where, and what to do."""


class Interrupted(Exception):
    """A signal stopped training; the state is saved. `number` is the signal's number."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


def plural(count: int, noun: str) -> str:
    """Writes a count with its noun.

    >>> plural(1, "token"), plural(2000, "token")
    ('1 token', '2,000 tokens')
    """
    return f"{count:,} {noun}{'s' * (count != 1)}"
