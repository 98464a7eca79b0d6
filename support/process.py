"""Device and precision of this process, collectives between processes, and signals."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from support.cpu import keep_freed_memory
from support.errors import InputError, plural


@dataclass(frozen=True)
class Process:
    """Process `rank` of `world`, which computes on `device` in `precision` ("fp32" or "bf16")."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    precision: str = "fp32"

    @property
    def main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def autocast(self, model: nn.Module) -> contextlib.AbstractContextManager:
        """Matrix products of a float32 model in bf16, if the precision says so. Scores and masks stay in float32."""
        rounds = self.precision == "bf16" and all(x.dtype == torch.float32 for x in model.parameters())
        return torch.autocast(self.device.type, torch.bfloat16, enabled=rounds)

    def sum(self, values: Tensor) -> Tensor:
        """Sums a tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def broadcast(self, value: Any) -> Any:
        """The main process's value, on every process."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def gather(self, value: Any) -> list:
        """Every process's value, in rank order, on every process."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def random_state(self) -> dict[str, Tensor]:
        """The state of this process's random generators."""
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def set_random_state(self, state: dict[str, Tensor]) -> None:
        """Sets the random generators to a state that `random_state` returned."""
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)


def start_process(
    device: str | None = None, precision: str | None = None, threads: int | None = None, seed: int = 42
) -> Process:
    """Joins torchrun's process group where there is one, chooses the device, and seeds torch.

    device: CUDA by default, where there is any. precision: bf16 on CUDA and fp32 elsewhere by default.
    Raises: InputError for a device that this machine does not have.
    """
    keep_freed_memory()
    # Soft masks reach denormal numbers, which make a CPU several times slower. Torch's threads inherit the mode of this
    # thread when they start, so it is set first.
    torch.set_flush_denormal(True)
    if threads:
        torch.set_num_threads(threads)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world > 1 and not dist.is_initialized():
        join_group(rank, world, "nccl" if chosen.type == "cuda" else "gloo")
    torch.manual_seed(seed + rank)  # dropout differs from rank to rank
    precision = precision or usual_precision(chosen)
    # TF32 rounds the factors of fp32 products. Under autocast those are bf16 values, which lose nothing by it.
    torch.backends.cuda.matmul.allow_tf32 = precision == "bf16"
    return Process(rank, world, chosen, precision)


def choose_device(name: str | None) -> torch.device:
    """The device for this process: "cpu", or for "cuda" and "cuda:N" a GPU of its own.

    Under torchrun the processes of a node take GPUs N, N + 1, ... in the order of their local ranks.
    Raises: InputError for an unknown device, or one that this machine does not have.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise InputError(f"--device {name}: unknown; use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: not supported; use cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    index = (device.index or 0) + int(os.environ.get("LOCAL_RANK", 0))
    count = torch.cuda.device_count()
    if index >= count:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        need = f", and {processes} processes need one each" if processes > 1 else ""
        raise InputError(f"--device {name or 'cuda'}: this machine has {plural(count, 'CUDA device')}{need}")
    return torch.device("cuda", index)


def join_group(rank: int, world: int, backend: str) -> None:
    """Joins the process group that torchrun's environment variables describe."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend)
        return
    # torchrun's store survives a restart of the workers. A prefix for each attempt keeps out the keys of dead workers.
    port = int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], port, world, is_master=False)
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def usual_precision(device: torch.device) -> str:
    """The precision without --precision: "bf16" on a GPU that multiplies it natively, else "fp32"."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "fp32"


def synchronize(process: Process) -> None:
    """Waits until a GPU has finished its kernels, which run on after the call that started them."""
    if process.device.type == "cuda":
        torch.cuda.synchronize(process.device)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Catches the first Ctrl-C and the first SIGTERM; the list holds the numbers of the signals that came.

    A second signal of the same kind acts as usual. Outside the main thread nothing is caught.
    """
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:  # complete by now: a signal may come between two of these calls
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
