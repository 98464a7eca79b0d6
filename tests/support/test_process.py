"""Processes: device, precision, collectives, signals."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from small_models import random_sequences, small_model

from model import Dense, Sequences, pack
from support.devices import for_inference
from support.errors import InputError
from support.process import Process, choose_device, start_process, stop_signals, usual_precision

ROOT = Path(__file__).parents[2]


def test_one_process_is_all_processes():
    process = Process()
    assert process.main and not Process(rank=1, world=2).main
    assert process.sum(torch.tensor([2.0])).tolist() == [2.0]
    assert process.broadcast("x") == "x" and process.gather(3) == [3]


def test_start_seeds_and_flushes_denormal_numbers():
    threads = torch.get_num_threads()
    torch.set_flush_denormal(False)
    try:
        process = start_process("cpu", threads=1, seed=7)
        first = torch.rand(3)
        assert torch.get_num_threads() == 1
        assert torch.equal(first, torch.rand(3, generator=torch.Generator().manual_seed(7)))
        flushed = not torch.full((64,), 1e-38).mul(1e-3).any()
        assert flushed == torch.set_flush_denormal(True)  # which says whether the processor can
        assert process == Process(0, 1, torch.device("cpu"), "fp32")
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_usual_where_a_gpu_multiplies_it_natively(native, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert usual_precision(torch.device("cuda", 0)) == ("bf16" if native else "fp32")
    assert usual_precision(torch.device("cpu")) == "fp32"


def test_precision_acts_on_matrix_products():
    batch = pack(random_sequences(3))
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model, process = small_model(), Process(precision=precision)
        with torch.inference_mode(), process.autocast(model):
            expected = model(batch, Dense()).logits
        model = for_inference(model, process)
        with torch.inference_mode(), process.autocast(model):
            logits = model(batch, Dense()).logits
        assert expected.dtype == logits.dtype == dtype and model.thresholds.dtype == torch.float32
        alone = Sequences(torch.ones(2, dtype=torch.long))
        assert model.layers[0].attention(torch.ones(2, 30, dtype=dtype), alone, score=True)[1].dtype == torch.float32
        torch.testing.assert_close(logits, expected, atol=0.02 if precision == "bf16" else 1e-5, rtol=0)


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, message in (
        ("gpu7", "--device gpu7: unknown"),
        ("meta", "--device meta: not supported"),
        ("cuda:3", "--device cuda:3: this machine has 1 CUDA device$"),
    ):
        with pytest.raises(InputError, match=message):
            choose_device(name)


@pytest.mark.parametrize("name, local_rank, index", [("cuda", 0, 0), ("cuda", 2, 2), ("cuda:1", 2, 3), (None, 1, 1)])
def test_each_process_of_a_node_has_a_gpu_of_its_own(name, local_rank, index, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert choose_device(name) == torch.device("cuda", index)
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="4 CUDA devices, and 3 processes need one each"):
        choose_device(f"cuda:{4 - local_rank}")


SCRIPT = """
import json, sys, torch
from support.process import start_process
process = start_process("cpu", threads=1, seed=5)
values = torch.tensor([1.0 + process.rank])
record = {
    "sum": process.sum(values).item(), "broadcast": process.broadcast({"rank": process.rank}),
    "gather": process.gather(process.rank), "random": process.gather(torch.rand(1).item()),
}
open(f"{sys.argv[1]}/{process.rank}", "w").write(json.dumps(record))
torch.distributed.destroy_process_group()
"""


def test_two_processes_share_values(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [sys.executable, "-m", *torchrun, str(tmp_path / "script.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    zero, one = (json.loads((tmp_path / name).read_text()) for name in "01")
    assert zero == one
    assert zero["sum"] == 3.0 and zero["broadcast"] == {"rank": 0} and zero["gather"] == [0, 1]
    assert zero["random"][0] != zero["random"][1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_caught_and_the_second_acts(number):
    before = signal.getsignal(number)
    signal.signal(number, signal.default_int_handler)  # raises KeyboardInterrupt
    try:
        with pytest.raises(KeyboardInterrupt), stop_signals() as caught:
            assert caught == []
            os.kill(os.getpid(), number)
            assert caught == [number]
            os.kill(os.getpid(), number)
        with contextlib.suppress(ZeroDivisionError), stop_signals():
            raise ZeroDivisionError
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_a_signal_while_signals_begin_to_be_caught_is_caught(monkeypatch):
    set_handler, before = signal.signal, signal.getsignal(signal.SIGINT)

    def set_and_send(number, handler):
        set_handler(number, handler)
        if number == signal.SIGINT and handler is not before:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(signal, "signal", set_and_send)
    with stop_signals() as caught:
        assert caught == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_catches_no_signals():
    results = []

    def work():
        with stop_signals() as caught:
            results.append(caught)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [[]]
