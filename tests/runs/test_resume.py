"""Interrupted runs: whatever stops one, going on gives the weights of a run that was never stopped, bit for bit."""

import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from stages import read_records, reviews

from runs.folder import STATES, save_state
from runs.stage import StageRequest, run_stage
from support.checkpoint import load_model
from support.errors import InputError, Interrupted
from support.settings import Settings
from tasks import own_task
from tasks.base import Source

ROOT = Path(__file__).parent.parent.parent
STEPS = 20


@pytest.fixture(scope="module")
def start(demo, tmp_path_factory) -> Path:
    """The demo's model with dropout, so that the random state matters, and with a head."""
    folder = tmp_path_factory.mktemp("resume") / "start"
    shutil.copytree(demo / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "classifier_dropout": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def train(
    demo: Path, start: Path, output: Path, progress=lambda **state: None, show=lambda line: None, resume=True, **changes
):
    settings = Settings(**{"learning_rate": 1e-3, "epochs": 2.0, "batch_size": 15, "save_steps": 3} | changes)
    torch.manual_seed(settings.seed)
    request = StageRequest("soft", start, reviews(demo), settings, output=output, resume=resume)
    return run_stage(request, progress=progress, show=show)


@pytest.fixture(scope="module")
def straight(demo, start, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("straight")
    train(demo, start, output)
    return output


def evaluations(folder: Path) -> list[dict]:
    timed = ("seconds", "examples_per_second", "elapsed")
    records = [record for record in read_records(folder) if record["event"] == "evaluation"]
    return [{name: value for name, value in record.items() if name not in timed} for record in records]


def same(a: Path, b: Path) -> None:
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert evaluations(a) == evaluations(b)
    assert {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()}  # nothing left over


def stop_after(last: int, number: int = signal.SIGTERM):
    """A `progress` that sends this process a signal in time to make step `last` its last one."""
    return lambda step, **state: os.kill(os.getpid(), number) if step == last - 1 else None


def stopped(demo: Path, start: Path, output: Path, last: int, number: int = signal.SIGTERM, **changes) -> None:
    with pytest.raises(Interrupted, match=f"^stopped after step {last} of {STEPS}$") as caught:
        train(demo, start, output, stop_after(last, number), **changes)
    assert caught.value.number == number


def saved_steps(folder: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in sorted((folder / STATES).glob("step-*.pt"))]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(demo, start, straight, tmp_path, number):
    before = signal.getsignal(number)
    for last in (5, 11):
        stopped(demo, start, tmp_path, last, number)
    lines = []
    train(demo, start, tmp_path, show=lines.append)
    assert "resuming after step 11" in lines and signal.getsignal(number) is before
    same(tmp_path, straight)
    lines.clear()
    _, result = train(demo, start, tmp_path, show=lines.append)
    assert lines == ["this run has come to its end: nothing to resume"]
    assert result.best == read_records(straight)[-1]["best"] | {
        name: result.best[name] for name in ("seconds", "examples_per_second", "elapsed")
    }
    same(tmp_path, straight)


def test_a_step_has_one_state_also_where_a_signal_meets_an_evaluation(demo, start, straight, tmp_path):
    stopped(demo, start, tmp_path, 6)
    assert saved_steps(tmp_path) == [3, 6]
    train(demo, start, tmp_path)
    same(tmp_path, straight)


def test_the_way_to_a_budget_goes_on_where_it_was(demo, start, tmp_path):
    target = {"target_flops": 0.5, "temperature_end": 1e-4, "threshold_learning_rate": 1e-3, "mask_attention": True}
    train(demo, start, tmp_path / "straight", **target)
    stopped(demo, start, tmp_path / "stopped", 11, **target)
    train(demo, start, tmp_path / "stopped", **target)
    same(tmp_path / "stopped", tmp_path / "straight")
    lambdas = [record["lambda"] for record in evaluations(tmp_path / "straight")]
    assert len(set(lambdas)) > 1  # steered


def test_time_and_best_checkpoint_go_on(demo, start, tmp_path):
    stopped(demo, start, tmp_path, 8)
    before = read_records(tmp_path)[-1]["elapsed"]
    train(demo, start, tmp_path)
    elapsed = [record["elapsed"] for record in read_records(tmp_path)[1:-1]]
    assert elapsed == sorted(elapsed) and elapsed[2] > before


def test_a_damaged_state_is_passed_over(demo, start, straight, tmp_path):
    stopped(demo, start, tmp_path, 8)
    assert saved_steps(tmp_path) == [6, 8]
    states = sorted((tmp_path / STATES).glob("step-*.pt"))
    content = bytearray(states[1].read_bytes())
    content[len(content) // 2] ^= 1
    states[1].write_bytes(content)
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"event": "eval')  # killed while writing
    other = tmp_path.parent / "copy"
    shutil.copytree(tmp_path, other)
    lines = []
    train(demo, start, tmp_path, show=lines.append)
    assert any("is damaged; trying the one before" in line for line in lines) and "resuming after step 6" in lines
    same(tmp_path, straight)

    for path in (other / STATES).glob("step-*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    weights = (other / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="holds a trained checkpoint, and no whole state in resume/"):
        train(demo, start, other)
    shutil.rmtree(other / STATES)
    with pytest.raises(InputError, match="holds a trained checkpoint, and no whole state in resume/"):
        train(demo, start, other)
    assert (other / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("line", ["garbage", "[]", '{"event": "evaluation"}'])
@pytest.mark.parametrize("ended", [False, True])
def test_a_damaged_log_costs_no_checkpoint(demo, start, straight, tmp_path, ended, line):
    if ended:
        shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    else:
        stopped(demo, start, tmp_path, 8)
    first, _, *others = (tmp_path / "log.jsonl").read_text().splitlines()
    (tmp_path / "log.jsonl").write_text("\n".join([first, line, *others]) + "\n")
    weights = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="log.jsonl: damaged; pass --overwrite to start again, or choose another"):
        train(demo, start, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == weights


def test_states_without_a_log_are_not_gone_on_with(demo, start, straight, tmp_path):
    stopped(demo, start, tmp_path, 2)  # no checkpoint yet
    for path in [path for path in tmp_path.iterdir() if path.is_file()]:
        path.unlink()
    lines = []
    train(demo, start, tmp_path, show=lines.append)
    assert "no earlier run to go on with: starting from the beginning" in lines
    same(tmp_path, straight)


def test_another_number_of_processes_is_noted(demo, start, tmp_path):
    stopped(demo, start, tmp_path, 8)
    (path,) = (tmp_path / STATES).glob("step-000000008-*.pt")
    state = torch.load(path, weights_only=True)
    path.unlink()
    save_state(tmp_path / STATES, state | {"random": state["random"] * 2})
    lines = []
    train(demo, start, tmp_path, show=lines.append)
    assert "note: 1 process instead of 2: the same data order, other dropout" in lines
    assert [record["step"] for record in evaluations(tmp_path)] == [3, 6, 9, 12, 15, 18, 20]


def test_a_resumed_run_holds_no_second_copy_of_the_model(demo, start, tmp_path):
    """The word embeddings, their gradient and Adam's two moments: as many large tensors as without a state."""

    def count_embeddings(step, **state):
        gc.collect()
        kinds = (torch.Tensor, torch.nn.Parameter)
        tensors = (x for x in gc.get_objects() if type(x) in kinds and x.shape == (600, 32))
        counts.append(len({tensor.data_ptr() for tensor in tensors}))

    counts: list[int] = []
    stopped(demo, start, tmp_path, 8)
    train(demo, start, tmp_path / "straight", count_embeddings)
    usual = set(counts)
    counts.clear()
    train(demo, start, tmp_path, count_embeddings)
    assert len(counts) == STEPS - 8 and max(counts) <= max(usual)


def test_what_a_kill_left_half_written_is_removed(demo, start, straight, tmp_path):
    """Killed while it wrote a checkpoint and a state, and another time between its last line and its clearing up."""
    stopped(demo, start, tmp_path, 8)
    for half in (".model.safetensors.a1b2c3d4", f"{STATES}/.step.new.a1b2c3d4", f"{STATES}/step.new"):
        (tmp_path / half).write_bytes(b"half")
    train(demo, start, tmp_path)
    same(tmp_path, straight)

    (tmp_path / STATES).mkdir()
    for late in (f"{STATES}/step-000000018-0123456789abcdef.pt", ".README.md.a1b2c3d4"):
        (tmp_path / late).write_bytes(b"late")
    train(demo, start, tmp_path)
    same(tmp_path, straight)
    (tmp_path / STATES).mkdir()
    (tmp_path / STATES / "notes.txt").write_text("the user's own")
    assert train(demo, start, tmp_path)[1].steps == STEPS
    assert (tmp_path / STATES / "notes.txt").exists()


def test_resuming_with_other_settings_is_refused(demo, start, straight, tmp_path):
    stopped(demo, start, tmp_path, 5)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="was started with learning_rate = 0.001, not 0.002; use the same options"):
        train(demo, start, tmp_path, learning_rate=2e-3)
    with pytest.raises(InputError, match="--resume to go on with it"):
        train(demo, start, tmp_path, resume=False)
    log = tmp_path / "log.jsonl"
    text = log.read_text()
    log.write_text(text.replace('"settings": {', '"settings": {"mask_floor": 0.02, ', 1))
    with pytest.raises(InputError, match="started by another version, with mask_floor = 0.02"):
        train(demo, start, tmp_path)
    log.write_text(text)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    # A finished run is not handed out for another one either.
    with pytest.raises(InputError, match="was started with learning_rate = 0.001, not 0.002"):
        train(demo, start, straight, learning_rate=2e-3)
    scores = Source(own_task(None, None, None, regression=True), demo / "data")
    with pytest.raises(InputError, match="was started with regression = False, not True"):
        run_stage(StageRequest("soft", start, scores, Settings(), output=straight, resume=True))


def test_a_model_that_is_no_run_is_not_resumed(demo, start, tmp_path):
    shutil.copytree(start, tmp_path / "own")
    with pytest.raises(InputError, match="holds config.json and is no run to resume"):
        train(demo, start, tmp_path / "own")
    own = {path.name: path.read_bytes() for path in (tmp_path / "own").iterdir()}
    assert own == {path.name: path.read_bytes() for path in start.iterdir()}


# ---- as separate processes ----


def command(demo: Path, start: Path, output: Path, *launcher: str) -> list[str]:
    return [
        *launcher,
        str(ROOT / "ltp.py"),
        "soft",
        "--data",
        str(demo / "data"),
        "--restore",
        str(start),
        "--output",
        str(output),
        "--lr",
        "1e-3",
        "--epochs",
        "2",
        "--bs",
        "15",
        "--save-steps",
        "3",
        "--load-best",
        "--threads",
        "1",
        "--resume",
    ]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def finish(arguments: list[str], code: int = 0) -> str:
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert result.returncode == code, result.stderr
    return result.stderr


def kill_at_random_moments(demo, start, tmp_path, kills: int) -> None:
    generator = random.Random(kills)
    alone = command(demo, start, tmp_path / "straight", sys.executable)
    finish(alone)
    broken = command(demo, start, tmp_path / "killed", sys.executable)
    for _ in range(kills):
        process = subprocess.Popen(broken, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
        log = tmp_path / "killed" / "log.jsonl"
        before = log.stat().st_mtime_ns if log.exists() else 0
        deadline = time.time() + 60  # wait until training has begun, then a random moment
        while (
            process.poll() is None and time.time() < deadline and (not log.exists() or log.stat().st_mtime_ns == before)
        ):
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.6))
        process.kill()
        process.wait()
    finish(broken)
    same(tmp_path / "killed", tmp_path / "straight")


def test_a_stopped_command_tells_how_it_goes_on(demo, start, tmp_path):
    long = [*command(demo, start, tmp_path, sys.executable), "--epochs", "1000"]
    process = subprocess.Popen(long, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    while process.poll() is None and not list((tmp_path / STATES).glob("step-*.pt")):
        time.sleep(0.01)
    process.terminate()
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert re.search("stopped after step [0-9]+ of [0-9]+; the same command with --resume goes on$", errors.strip())


def test_killed_at_random_moments(demo, start, tmp_path):
    kill_at_random_moments(demo, start, tmp_path, 2)


@pytest.mark.slow
def test_killed_ten_times(demo, start, tmp_path):
    kill_at_random_moments(demo, start, tmp_path, 10)


def torchrun(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *options]


@pytest.mark.slow
def test_a_killed_worker_is_restarted_and_the_result_is_the_same(demo, start, tmp_path):
    two = torchrun("--standalone", "--nproc-per-node", "2")
    finish(command(demo, start, tmp_path / "straight", *two))
    process = subprocess.Popen(
        command(demo, start, tmp_path / "killed", *two, "--max-restarts", "1"),
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    states = tmp_path / "killed" / STATES
    while process.poll() is None and not list(states.glob("step-*.pt")):
        time.sleep(0.01)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and "resuming after step" in errors, errors
    same(tmp_path / "killed", tmp_path / "straight")


@pytest.mark.slow
def test_two_nodes_agree_with_one(demo, start, tmp_path):
    finish(command(demo, start, tmp_path / "one", *torchrun("--standalone", "--nproc-per-node", "2")))
    nodes = []
    for rank in range(2):
        node = torchrun(
            "--nnodes",
            "2",
            "--nproc-per-node",
            "1",
            "--node-rank",
            str(rank),
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "localhost:29531",
            "--rdzv-id",
            "test",
        )
        nodes.append(
            subprocess.Popen(
                command(demo, start, tmp_path / "two", *node), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
            )
        )
    for node in nodes:
        _, errors = node.communicate(timeout=300)
        assert node.returncode == 0, errors
    same(tmp_path / "two", tmp_path / "one")


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small disk needs root")
def test_a_full_disk_is_said_and_costs_nothing(demo, start, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1600k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        stderr = finish(command(demo, start, disk / "run", sys.executable), code=2)
        assert "Error: " in stderr and "could not be written" in stderr and "Traceback" not in stderr
        assert str(disk) in stderr and "No space left on device" in stderr and "free some space there" in stderr
        load_model(disk / "run")  # the checkpoint of the first evaluation is whole
        assert not list((disk / "run").rglob("*.new")) and not list((disk / "run").rglob(".*"))
        # The main process of two meets the full disk; the other stops with it, without a traceback of its own.
        two = torchrun("--standalone", "--nproc-per-node", "2")
        stderr = finish(command(demo, start, disk / "two", *two), code=1)
        assert "could not be written" in stderr and "another process failed" in stderr and "[rank" not in stderr
    finally:
        subprocess.run(["umount", str(disk)])
