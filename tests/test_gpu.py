"""On a GPU: the CPU's answers, steps, resumed runs, waits and errors. Skipped where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import MODES, make_pruner, pruning_model, random_sequences
from stages import read_records

from model import Dense, Hard, Model, TopK, pack
from support.cuda import FlatAttention, find_kernels
from support.devices import for_inference, for_training
from support.process import Process
from support.settings import Settings
from tasks.tokenizer import Tokenizer
from train import Trainer

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
ROOT = Path(__file__).parent.parent
GPU = Process(device=torch.device("cuda"))
HALF = Process(device=torch.device("cuda"), precision="bf16")
WIDE = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256}  # heads that the kernel takes
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
    model = pruning_model(**WIDE, token_keep_rate=-1.0)
    there = for_inference(copy_of(model), HALF)
    assert isinstance(there.layers[0].attention, FlatAttention)
    assert there.layers[0].output.weight.dtype == torch.bfloat16 and there.thresholds.dtype == torch.float32
    batch = pack(random_sequences(40))
    pruners = {"dense": Dense(), "hard": Hard(model.thresholds), "topk": TopK([1.0, 0.8, 0.6, 0.5, 0.3])}
    there_pruners = pruners | {"hard": Hard(there.thresholds)}
    with torch.inference_mode():
        expected = model(batch, pruners[mode])
        with HALF.autocast(there):
            output = there(batch.to("cuda"), there_pruners[mode])
    same = (output.kept.cpu() == expected.kept).all(0)
    assert same.double().mean() > 0.2 and (mode == "hard" or same.all())
    if mode == "hard":  # in the first layer, only tokens near the threshold may change sides
        one, other = expected.steps[0], output.steps[0]
        torch.testing.assert_close(other.scores.cpu(), one.scores, rtol=0.05, atol=0)
        changed = one.decision.keep != other.decision.keep.cpu()
        assert ((one.scores / model.thresholds[0] - 1).abs()[changed] < 0.05).all()
    error = (output.logits.float().cpu() - expected.logits)[same].abs().max()
    assert error < BF16 * expected.logits.abs().max()


def test_the_fused_sum_and_norm_is_torchs():
    norm, (x, update) = torch.nn.LayerNorm(768), torch.randn(2, 500, 768).bfloat16().float()
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    with torch.no_grad():
        fused = find_kernels().add_norm(x.cuda().bfloat16(), update.cuda().bfloat16(), norm.cuda().bfloat16())
        torch.testing.assert_close(fused.float(), norm.float()(x.cuda() + update.cuda()), rtol=1e-2, atol=1e-2)


def attend_on_grids(model: Model) -> None:
    for layer in model.layers:
        layer.attention.__class__ = FlatAttention.__base__


def test_scores_without_a_grid_are_those_on_grids():
    model = for_training(pruning_model(**WIDE), HALF)
    assert isinstance(model.layers[0].attention, FlatAttention)
    batch, scores = pack(random_sequences(20)).to("cuda"), []
    pruner = Hard(torch.full((5,), 1e-30, device="cuda"))
    for _ in range(2):
        with torch.inference_mode(), HALF.autocast(model):
            scores.append(model(batch, pruner).steps[0].scores)
        attend_on_grids(model)
    torch.testing.assert_close(*scores, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("mode", ["hard", "soft", "soft_attention"])
@pytest.mark.parametrize("head", ["sequence", "token"])
def test_gradients_without_a_grid_are_those_on_grids(mode, head):
    model = for_training(pruning_model(**WIDE, head=head), HALF).requires_grad_(True)
    assert isinstance(model.layers[0].attention, FlatAttention)
    batch, gradients = pack(random_sequences(20)).to("cuda"), []
    for _ in range(2):
        model.zero_grad()
        with HALF.autocast(model):
            output = model(batch, make_pruner(model, mode, 1e-3))
        (output.logits.float().square().sum() + output.kept.double().sum() / 100).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        attend_on_grids(model)
    # In bf16 each of both is up to 0.05 away from float32's. Without the gradient of the scores they differ by 0.2.
    assert (gradients[0] - gradients[1]).norm() < 0.08 * gradients[1].norm()


def test_dropout_on_attention_without_a_grid():
    model = for_training(pruning_model(**WIDE, attention_probs_dropout_prob=0.5), HALF)
    batch, logits = pack(random_sequences(20)).to("cuda"), []
    for seed, training in ((0, True), (0, True), (1, True), (1, False)):
        torch.manual_seed(seed)
        with torch.inference_mode(), HALF.autocast(model):
            logits.append(model.train(training)(batch, Dense()).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2]) and not torch.equal(logits[2], logits[3])


@pytest.mark.parametrize("process, tolerance", [(GPU, 1e-3), (HALF, 3e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["finetune", "soft", "hard", "topk", "manual"])
def test_a_step_of_each_stage_is_the_cpus(name, process, tolerance, demo, source):
    losses = []
    examples = source.load("train", Tokenizer(demo / "model"), 60)[0][""]
    for process in (Process(), process):
        torch.manual_seed(0)
        model = for_training(pruning_model(**WIDE, labels=("n", "p"), vocab_size=600, max_seq_length=60), process)
        # At the usual temperature soft masks are so steep that bf16 alone moves the third loss by 0.04.
        settings = Settings(learning_rate=1e-4, epochs=1.0, batch_size=16, temperature=2e-3)
        trainer = Trainer(model, stage=name, task=source.task, train_set=examples, settings=settings, process=process)
        losses.append([trainer.step(indices)[0] for _, indices in zip(range(3), trainer.batches())])
    assert losses[0] == pytest.approx(losses[1], abs=tolerance)


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
    code = (
        "import sys, torch, ltp\n"
        "memory = torch.cuda.get_device_properties(0).total_memory\n"
        "torch.cuda.set_per_process_memory_fraction(4e6 / memory)\n"
        "sys.argv[0] = 'ltp.py'\n"
        "ltp.main()\n"
    )
    arguments = ["finetune", "--restore", demo / "model", "--data", demo / "data", "--device", "cuda"]
    arguments += ["--output", tmp_path / "run"]
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1 and "the GPU's memory is full" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("process", [GPU, HALF], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode, waits", [("dense", 1), ("hard", 7), ("topk", 6)])
def test_waits_by_torchs_own_count(mode, waits, process, recwarn):
    model = for_inference(pruning_model(**WIDE, token_keep_rate=-1.0), process)
    pruner = {"dense": Dense(), "hard": Hard(model.thresholds), "topk": TopK([1.0, 0.8, 0.6, 0.5, 0.3])}[mode]
    batch = pack(random_sequences(8)).to("cuda")
    with torch.inference_mode(), process.autocast(model):
        model(batch, pruner)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            recwarn.clear()
            model(batch, pruner)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(warning.message) for warning in recwarn) <= waits
