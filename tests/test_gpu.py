"""On a GPU: the CPU's answers, steps, resumed runs, waits and errors. Skipped where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import MODES, make_pruner, pruning_model, random_sequences
from stages import read_records

from model import Dense, Hard, Model, TopK, pack
from support.cuda import FlatAttention
from support.devices import for_inference, for_training
from support.process import Process
from support.settings import Settings
from tasks.tokenizer import Tokenizer
from train import Trainer

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
ROOT = Path(__file__).parent.parent
GPU = Process(device=torch.device("cuda"))
BF16 = 0.05  # of the largest logit: bf16 has 8 bits, and six layers add up


def copy_of(model: Model) -> Model:
    other = Model(model.config)
    other.load_state_dict(model.state_dict())
    return other.eval()


@pytest.mark.parametrize("head", ["sequence", "token", "span"])
@pytest.mark.parametrize("mode", MODES)
def test_fp32_answers_are_the_cpus(mode, head):
    labels = ("start", "end") if head == "span" else ("a", "b", "c")
    model = pruning_model(head=head, labels=labels, token_keep_rate=-1.0)
    batch, there = pack(random_sequences(12)), copy_of(model).cuda()
    with torch.inference_mode():
        expected = model(batch, make_pruner(model, mode))
        output = there(batch.to("cuda"), make_pruner(there, mode))
    torch.testing.assert_close(output.logits.cpu(), expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.kept.cpu(), expected.kept, atol=1e-3, rtol=0)


@pytest.mark.parametrize("mode", ["dense", "hard", "topk"])
def test_bf16_without_a_grid_is_near_the_cpus_fp32(mode):
    model = pruning_model(hidden_size=128, num_attention_heads=2, intermediate_size=256, token_keep_rate=-1.0)
    there = for_inference(copy_of(model), GPU)
    assert isinstance(there.layers[0].attention, FlatAttention)
    batch = pack(random_sequences(40))
    pruners = {"dense": Dense(), "hard": Hard(model.thresholds), "topk": TopK([1.0, 0.8, 0.6, 0.5, 0.3])}
    there_pruners = pruners | {"hard": Hard(there.thresholds)}
    with torch.inference_mode():
        expected = model(batch, pruners[mode])
        with torch.autocast("cuda", torch.bfloat16):
            output = there(batch.to("cuda"), there_pruners[mode])
    same = (output.kept.cpu() == expected.kept).all(0)
    assert same.double().mean() > 0.7 and (mode == "hard" or same.all())
    error = (output.logits.float().cpu() - expected.logits)[same].abs().max()
    assert error < BF16 * expected.logits.abs().max()


def test_scores_without_a_grid_are_those_on_grids():
    model = for_inference(pruning_model(hidden_size=128, num_attention_heads=2, intermediate_size=256), GPU)
    batch, scores = pack(random_sequences(20)).to("cuda"), []
    for flat in (True, False):
        for layer in model.layers:
            layer.attention.dropout.p = 0.0
            layer.attention.__class__ = FlatAttention if flat else FlatAttention.__base__
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            scores.append(model(batch, Hard(torch.full((5,), 1e-30, device="cuda"))).steps[0].scores)
    torch.testing.assert_close(*scores, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["finetune", "soft", "hard", "topk", "manual"])
def test_a_step_of_each_stage_is_the_cpus(name, demo, source):
    losses = []
    examples = source.load("train", Tokenizer(demo / "model"), 60)[0][""]
    for process in (Process(), GPU):
        torch.manual_seed(0)
        model = for_training(pruning_model(labels=("n", "p"), vocab_size=600, max_seq_length=60), process, name)
        settings = Settings(learning_rate=1e-3, epochs=1.0, batch_size=16)
        trainer = Trainer(model, stage=name, task=source.task, train_set=examples, settings=settings, process=process)
        losses.append([trainer.step(indices).loss for _, indices in zip(range(3), trainer.batches())])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def program(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "ltp.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment, timeout=300)


def test_a_run_is_resumed_bit_for_bit(demo, tmp_path):
    common = [
        "--restore",
        demo / "model",
        "--data",
        demo / "data",
        "--epochs",
        2,
        "--batch-size",
        32,
        "--device",
        "cuda",
    ]
    assert program("finetune", *common, "--output", tmp_path / "straight").returncode == 0
    code = (
        "import sys, ltp, runs.folder as f\n"
        "old = f.RunFolder.note\n"
        "def note(self, trainer, *rest):\n"
        "    old(self, trainer, *rest)\n"
        "    if trainer.completed == 4: self.signals.append(15)\n"
        "f.RunFolder.note = note\n"
        "sys.argv[0] = 'ltp.py'\n"
        "ltp.main()\n"
    )
    arguments = ["finetune", *common, "--output", tmp_path / "resumed"]
    stopped = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert stopped.returncode == 143, stopped.stderr
    assert program(*arguments, "--resume").returncode == 0
    one, other = (read_records(tmp_path / name) for name in ("straight", "resumed"))
    assert [r["train_loss"] for r in one[1:-1]] == [r["train_loss"] for r in other[1:-1]]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "resumed")]
    assert weights[0] == weights[1]


def test_an_nccl_group_of_one(demo, tmp_path):
    group = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    code = (
        "import torch, torch.distributed as dist\n"
        "from support.process import Process, choose_device\n"
        "torch.cuda.set_device(0)\n"
        "dist.init_process_group('nccl')\n"
        "process = Process(0, 2, torch.device('cuda', 0))\n"  # the collectives, though there is one process
        "assert process.sum(torch.ones(2, device='cuda')).tolist() == [1, 1]\n"
        "assert process.broadcast({'a': 1}) == {'a': 1}\n"
        "dist.destroy_process_group()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | group, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_a_full_memory_is_one_clear_line(demo, tmp_path):
    lines = "".join(json.dumps({"text": "a film " * 60}) + "\n" for _ in range(64))
    (tmp_path / "in.jsonl").write_text(lines)
    code = (
        "import sys, torch, ltp\n"
        "torch.cuda.set_per_process_memory_fraction(0.0005)\n"
        "sys.argv[0] = 'ltp.py'\n"
        "ltp.main()\n"
    )
    arguments = ["eval", "--restore", demo / "model", "--data", demo / "data", "--device", "cuda", "--batch-size", 4096]
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1 and "the GPU's memory is full" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("mode, waits", [("dense", 1), ("hard", 7), ("topk", 6)])
def test_waits_by_torchs_own_count(mode, waits, recwarn):
    model = for_inference(pruning_model(token_keep_rate=-1.0), GPU)
    pruner = {"dense": Dense(), "hard": Hard(model.thresholds), "topk": TopK([1.0, 0.8, 0.6, 0.5, 0.3])}[mode]
    batch = pack(random_sequences(8)).to("cuda")
    with torch.inference_mode():
        model(batch, pruner)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            recwarn.clear()
            model(batch, pruner)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(warning.message) for warning in recwarn) <= waits
