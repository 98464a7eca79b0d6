"""How the command line fails: bad input makes one line and exit code 2, other errors keep their traceback."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import traceback
from typing import Any

import click

from support.errors import InputError, Interrupted

# Messages of gloo, then of NCCL, in a process whose peer has ended.
LOST_PROCESS = re.compile(
    "connection (closed|reset) by peer|connection refused|remote process exited|communicator was aborted", re.IGNORECASE
)


OUT_OF_MEMORY = (
    "the GPU's memory is full: pass a smaller --batch-size; in training --accumulate N, the same batch in N parts; in "
    "eval and predict --max-tokens N"
)


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # no space left, or none of the user's quota


class Program(click.Group):
    """A group that lists its commands in the order of their definition, and reports errors."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
        except InputError as error:
            raise refusal(error) from None
        except OSError as error:
            if error.filename is None and error.errno not in DISK_FULL:  # not about a file
                raise
            raise refusal(error) from None
        except RuntimeError as error:
            if "torch" in sys.modules and isinstance(error, sys.modules["torch"].OutOfMemoryError):
                raise click.ClickException(f"{OUT_OF_MEMORY} ({str(error).split('. ')[0]})") from None
            if not (in_group() and LOST_PROCESS.search(str(error))):
                raise
            raise click.ClickException("stopped, because another process failed: see its error") from None
        except Interrupted as error:
            click.echo(str(error), err=True)
            ctx.exit(128 + error.number)
        leave_group()
        return result


def run(program: Program) -> None:
    """Runs a program as this process's work, and ends the process."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # closed ones
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # what a terminal's encoding cannot say is escaped
    # A process that is asked to end removes its temporary files first.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        program()
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:  # of click itself, such as --help to a full disk
            refusal(error).show()
            error = SystemExit(2)
        end_group(error)
        raise error


def refusal(error: Exception) -> click.ClickException:
    """The error as one line, with exit code 2."""
    failure = click.ClickException(str(error))
    failure.exit_code = 2
    return failure


def in_group() -> bool:
    """Whether this process is one of several. Does not import torch to find out."""
    return "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()


def leave_group() -> None:
    """Leaves the process group where there is one, when all processes have come to the end."""
    if in_group():
        # The process that keeps the group's store must not be the first to go.
        sys.modules["torch"].distributed.barrier()
        sys.modules["torch"].distributed.destroy_process_group()


def end_group(error: BaseException) -> None:
    """Ends one process of several at once: tidying up might wait for the others forever, or abort where they are gone.

    Where it failed, its peers see the connection closed, or are ended by torchrun.
    """
    if not in_group() and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    code = error.code if isinstance(error, SystemExit) else 1
    if not isinstance(error, SystemExit):
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def hyphens(name: str) -> str:
    """An option's name without underscores: the authors' --save_step is --save-step.

    >>> hyphens("--save_step")
    '--save-step'
    """
    return name.replace("_", "-")
