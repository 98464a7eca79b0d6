"""How the command line fails."""

import errno

import click
import pytest
import torch.distributed as dist
from click.testing import CliRunner

from support.errors import InputError, Interrupted
from support.program import Program


def failing(error: BaseException):
    """Runs a program whose one command fails."""

    @click.group(cls=Program)
    def program():
        pass

    @program.command()
    def fail():
        raise error

    return CliRunner().invoke(program, ["fail"])


def test_errors_of_the_user_are_one_line():
    for error in (InputError("no such thing"), FileNotFoundError(2, "no such thing", "the/file")):
        result = failing(error)
        assert result.exit_code == 2 and "no such thing" in result.stderr and result.stderr.startswith("Error: ")
    assert "the/file" in result.stderr
    result = failing(Interrupted("stopped", 15))
    assert result.exit_code == 143 and result.stderr == "stopped\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_line(number):
    """Standard output has no file name."""
    result = failing(OSError(number, "no room"))
    assert result.exit_code == 2 and result.stderr == f"Error: [Errno {number}] no room\n"


@pytest.mark.parametrize(
    "error", [OSError("internal"), OSError(12, "no memory"), RuntimeError("connection closed by peer"), KeyError("x")]
)
def test_errors_of_the_program_keep_their_traceback(error):
    assert failing(error).exception is error


@pytest.mark.parametrize(
    "message, hidden",
    [
        ("[gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:2468", True),
        ("[gloo/transport/tcp/pair.cc:547] Read error [127.0.0.1]:2468: Connection reset by peer", True),
        ("NCCL error: remote process exited or there was a network error, NCCL version 2.21.5", True),
        ("NCCL communicator was aborted on rank 1.", True),
        ("the computation was aborted", False),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_a_process_of_several_hides_the_failure_of_another_only(message, hidden, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    error = RuntimeError(message)
    result = failing(error)
    if hidden:
        assert result.exit_code == 1 and "another process failed" in result.stderr
    else:
        assert result.exception is error


@pytest.mark.parametrize("error", [Interrupted("stopped", 15), InputError("no such thing"), KeyError("x")])
def test_a_process_that_fails_does_not_wait_for_its_group(error, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        failing(error)
        assert dist.is_initialized()  # `run` ends the process as it is
    finally:
        dist.destroy_process_group()
