"""How the command line looks and fails: help in sections, bad input as one line with exit code 2.

Other errors keep their traceback.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Iterable
from typing import Any

import click

from support.errors import DISK_FULL, InputError, Interrupted

# Messages of gloo, then of NCCL, in a process whose peer has ended.
LOST_PROCESS = re.compile(
    "connection (closed|reset) by peer|connection refused|remote process exited|communicator was aborted", re.IGNORECASE
)

OUT_OF_MEMORY = (
    "the GPU's memory is full: pass a smaller --batch-size; in training --accumulate N, the same batch in N parts; in "
    "eval and predict --max-tokens N"
)


def write_sections(formatter: click.HelpFormatter, rows: Iterable[tuple[str, tuple[str, str]]]) -> None:
    """Writes rows (section, (name, help)). Sections and rows keep their order, and all help starts in one column."""
    rows, sections = list(rows), {}
    width = min(30, max(len(name) for _, (name, _) in rows))  # a longer name has a line of its own
    for section, (name, help) in rows:
        sections.setdefault(section, []).append((f"{name:{width}}", help))
    for section, lines in sections.items():
        with formatter.section(section):
            formatter.write_dl(lines)


class Option(click.Option):
    """An option in a section of the help. Its help names a whole number N and another number X, without the range."""

    section: str  # which support/options.py sets

    def make_metavar(self, ctx: click.Context) -> str:
        words = super().make_metavar(ctx)
        return {"INTEGER": "N", "INTEGER RANGE": "N", "FLOAT": "X", "FLOAT RANGE": "X"}.get(words, words)

    def get_help_extra(self, ctx: click.Context) -> Any:
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        return extra


class Command(click.Command):
    """A command in a section of the program's help, with its options in sections."""

    def __init__(self, *args: Any, section: str = "Commands", **attributes: Any):
        super().__init__(*args, **attributes)
        self.section = section

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        rows = ((getattr(option, "section", "Help"), option.get_help_record(ctx)) for option in options)
        write_sections(formatter, rows)


class Program(click.Group):
    """A group that lists its commands by section in the order of their definition, and reports errors."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        room = formatter.width - 4 - max(map(len, self.commands))
        commands = self.commands.items()
        rows = ((command.section, (name, command.get_short_help_str(room))) for name, command in commands)
        write_sections(formatter, rows)

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
