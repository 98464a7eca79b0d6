"""How the command line fails: bad input makes one line and exit code 2, other errors keep their traceback."""

from __future__ import annotations

import errno
import re
import sys
from typing import Any

import click

from support.errors import InputError, Interrupted

# Messages of gloo, then of NCCL, in a process whose peer has ended.
LOST_PROCESS = re.compile(
    "connection (closed|reset) by peer|connection refused|remote process exited|communicator was aborted", re.IGNORECASE
)


class Program(click.Group):
    """A group that lists its commands in the order of their definition, and reports errors."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # what a terminal's encoding cannot say is escaped
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
        except InputError as error:
            raise refusal(error) from None
        except OSError as error:
            if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):  # not about a file
                raise
            raise refusal(error) from None
        except RuntimeError as error:
            if not (in_group() and LOST_PROCESS.search(str(error))):
                raise
            raise click.ClickException("stopped, because another process failed: see its error") from None
        except Interrupted as error:
            leave_group()  # all processes stop after the same step
            click.echo(str(error), err=True)
            ctx.exit(128 + error.number)
        # After other errors the group stays until the process ends: destroying it may wait for a process that waits for
        # this one.
        leave_group()
        return result


def refusal(error: Exception) -> click.ClickException:
    """The error as one line, with exit code 2."""
    failure = click.ClickException(str(error))
    failure.exit_code = 2
    return failure


def in_group() -> bool:
    """Whether this process is one of several. Does not import torch to find out."""
    return "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()


def leave_group() -> None:
    """Destroys the process group where there is one. The other processes must come to do the same."""
    if in_group():
        sys.modules["torch"].distributed.destroy_process_group()


def hyphens(name: str) -> str:
    """An option's name without underscores: the authors' --save_step is --save-step.

    >>> hyphens("--save_step")
    '--save-step'
    """
    return name.replace("_", "-")
