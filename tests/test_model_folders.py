"""The model against transformers' and the authors' values, its folders, and model.py alone."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folders import KINDS_AND_ACTIVATIONS, SIZES, expect_equal_both_ways, hugging_face, open_saved, their_logits
from safetensors.torch import load_file
from small_models import all_states, pruning_model, random_sequences

from model import Config, Dense, Hard, Model, Soft, TopK, macs, pack, topk_rates

ROOT = Path(__file__).parent.parent

# ---- the authors' values ----

CASES = [Path(__file__).parent / "golden" / "case1"]
if "LTP_GOLDEN" in os.environ:
    CASES += sorted(folder.parent for folder in Path(os.environ["LTP_GOLDEN"]).glob("*/expected.safetensors"))


class Golden:
    """A golden case: the model, its batch, and the values of the authors' code."""

    def __init__(self, folder: Path):
        self.model = Model.load(folder)
        self.expected = load_file(folder / "expected.safetensors")
        inputs = load_file(folder / "inputs.safetensors")
        self.temperature = json.loads((folder / "meta.json").read_text())["temperature"]
        self.real = inputs["attention_mask"].bool()
        self.batch = pack([ids[mask].tolist() for ids, mask in zip(inputs["input_ids"], self.real)])

    def spread(self, step, values: torch.Tensor) -> torch.Tensor:
        """Values of a step's tokens as values of all the batch's tokens, 0 elsewhere."""
        return values.new_zeros(len(self.batch.token_ids)).index_put((step.tokens,), values)

    def expect(self, actual: torch.Tensor, name: str, l: int | None = None) -> None:
        expected = self.expected[name] if l is None else self.expected[name][l][self.real]
        torch.testing.assert_close(actual, expected, atol=1e-4 if actual.is_floating_point() else 0, rtol=0)


@pytest.fixture(params=CASES, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def golden(request) -> Golden:
    return Golden(request.param)


@torch.inference_mode()
def test_golden_dense(golden):
    output = golden.model(golden.batch, Dense())
    golden.expect(output.logits, "dense_logits")
    golden.expect(macs(golden.model.config, golden.batch.lengths, output.kept), "baseline_macs_general")


@torch.inference_mode()
def test_golden_hard(golden):
    pruner = Hard(golden.expected["thresholds"])
    output = golden.model(golden.batch, pruner)
    golden.expect(output.logits, "hard_logits")
    golden.expect(output.kept, "hard_kept_ffn")
    golden.expect(macs(golden.model.config, golden.batch.lengths, output.kept), "macs_general")
    # The authors' first threshold may be 0. Ours then scores nothing there, so a smallest positive one stands in.
    thresholds = golden.expected["thresholds"].clamp(min=1e-30)
    for l, step in enumerate(golden.model(golden.batch, Hard(thresholds)).steps):
        golden.expect(golden.spread(step, step.scores), "hard_scores", l)
        golden.expect(golden.spread(step, step.decision.keep), "hard_keep_mask", l)


@torch.inference_mode()
def test_golden_topk(golden):
    config = golden.model.config
    rates = topk_rates(config.token_keep_rate, config.num_hidden_layers)
    assert rates == pytest.approx(golden.expected["topk_keep_rates"].tolist())
    output = golden.model(golden.batch, TopK(rates))
    golden.expect(output.logits, "topk_logits")
    golden.expect(output.kept, "topk_kept_ffn")
    for l, step in enumerate(all_states(golden.model)(golden.batch, TopK(rates)).steps):
        keep = torch.ones_like(step.tokens, dtype=torch.bool) if step.decision.keep is None else step.decision.keep
        golden.expect(golden.spread(step, keep), "topk_keep_mask", l)


@torch.inference_mode()
def test_golden_soft(golden):
    output = golden.model(golden.batch, Soft(golden.expected["thresholds"], golden.temperature))
    golden.expect(output.logits, "soft_logits_cls_kept")
    for l, step in enumerate(output.steps):
        golden.expect(step.decision.mask, "soft_mask_cls_kept", l)


# ---- transformers ----


def load(folder: Path) -> Model:
    """Model.load; I-BERT's own names are read by the strict loader alone."""
    if json.loads((folder / "config.json").read_text())["model_type"] != "ibert":
        return Model.load(folder)
    from support.checkpoint import load_model

    return load_model(folder).model


@pytest.mark.parametrize("kind, act", KINDS_AND_ACTIVATIONS)
def test_dense_logits_equal_transformers_both_ways(kind, act, tmp_path):
    expect_equal_both_ways(kind, tmp_path, "sequence", load, Model.save, hidden_act=act)


@pytest.mark.parametrize("kind", ["roberta", "bert"])
@pytest.mark.parametrize("head", ["token", "span"])
def test_logits_of_every_token_equal_transformers_both_ways(kind, head, tmp_path):
    outputs = 2 if head == "span" else 4
    expect_equal_both_ways(kind, tmp_path, head, load, Model.save, num_labels=outputs)


def test_segments_and_regression(tmp_path):
    theirs = hugging_face("bert", tmp_path / "theirs", num_labels=1)
    ours, ids, segments = Model.load(tmp_path / "theirs"), [5, 6, 7, 8], [0, 0, 1, 1]
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids]), token_type_ids=torch.tensor([segments])).logits
        other = ours(pack([ids])).logits
        torch.testing.assert_close(ours(pack([ids], [segments])).logits, expected, atol=1e-4, rtol=0)
    assert (other - expected).abs().max() > 0.01
    ours.save(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["problem_type"] == "regression"


def test_one_kind_of_segment_means_none():
    model = pruning_model(type_vocab_size=1)
    with torch.inference_mode():
        logits = [model(pack([[5, 6, 7]], segments)).logits for segments in (None, [[0, 1, 1]])]
    assert torch.equal(*logits)


# ---- folders ----


@pytest.mark.parametrize("head", ["sequence", "token", "span"])
@pytest.mark.parametrize("model_type, pad", [("roberta", 1), ("bert", 0)])
def test_saving_gives_back_everything(model_type, pad, head, tmp_path):
    model = pruning_model(
        model_type=model_type,
        pad_token_id=pad,
        head=head,
        labels=("start", "end") if head == "span" else ("x", "y", "z"),
        prune_mode="absolute_threshold",
        score_norm="length",
        other={"my_key": [1, 2]},
    )
    model.save(tmp_path / "new" / "folder")
    again = Model.load(tmp_path / "new" / "folder")
    assert replace(again.config, other={}) == replace(model.config, other={}) and not again.training
    assert model.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    written = json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    assert written["my_key"] == [1, 2] and written["prune_mode"] == "absolute_threshold"
    assert isinstance(again.pruner(), Hard)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_only_models_that_prune_by_thresholds_save_them(tmp_path):
    for prune_mode in (None, "topk", "absolute_threshold"):
        model = pruning_model(prune_mode=prune_mode, final_token_threshold=0.07)
        assert ("ltp.thresholds" in model.hub_tensors()) == (prune_mode == "absolute_threshold")
        model.save(tmp_path)
        final = float(Model.load(tmp_path).thresholds.detach()[-1])
        assert final == pytest.approx(0.01 if prune_mode == "absolute_threshold" else 0.07)


def test_a_config_without_the_projects_keys_gets_the_defaults():
    raw = {key: value for key, value in SIZES.items() if key != "num_labels"}
    config = Config.from_dict({"model_type": "bert", "id2label": {"0": "n", "1": "y"}, **raw})
    assert config.labels == ("n", "y") and config.pad_token_id == 0 and config.head == "sequence"
    assert config.prune_mode is None and config.max_tokens == 60
    assert Config.from_dict({"model_type": "roberta", **raw}).max_tokens == 58  # positions count from pad + 1


# ---- model.py alone ----

SCRIPT = '''
import json
import sys

import torch

from model import Decision, Dense, Pruner, Hard, Model, pack


class AboveMean(Pruner):
    """Keeps the tokens that score at least their sequence's mean."""

    def needs_scores(self, l, seqs):
        return True

    def decide(self, l, scores, alive, seqs):
        means = seqs.sum(scores) / seqs.lengths
        keep = alive.protected | (scores >= means[seqs.ids])
        return Decision(seqs.sum(keep), keep)


sequences = json.loads(sys.argv[1])
model = Model.load("theirs")
answers = {}
with torch.inference_mode():
    for name, pruner in (("dense", Dense()), ("hard", Hard(torch.tensor([0.01, 0.02]))), ("mean", AboveMean())):
        output = model(pack(sequences), pruner)
        answers[name] = {"logits": output.logits.tolist(), "kept": output.kept.tolist()}
model.save("ours")
files = [module.__file__ for module in sys.modules.values() if getattr(module, "__file__", None)]
print(json.dumps(answers | {"files": files}))
'''


def run_alone(folder: Path, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_model_py_works_alone_in_a_folder(tmp_path):
    shutil.copy(ROOT / "model.py", tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    theirs, sequences = hugging_face("roberta", tmp_path / "theirs"), random_sequences(6, longest=50)
    answers = json.loads(run_alone(tmp_path, "script.py", json.dumps(sequences)))
    project = [name for name in answers["files"] if Path(name).is_relative_to(ROOT) and "site-packages" not in name]
    assert not project and str(tmp_path / "model.py") in answers["files"]
    expected = their_logits(theirs, sequences, 1)
    lengths = [len(s) for s in sequences]
    torch.testing.assert_close(torch.tensor(answers["dense"]["logits"]), expected, atol=1e-4, rtol=0)
    assert answers["dense"]["kept"] == [lengths] * 2
    with torch.inference_mode():
        hard = Model.load(tmp_path / "theirs")(pack(sequences), Hard(torch.tensor([0.01, 0.02])))
    torch.testing.assert_close(torch.tensor(answers["hard"]["logits"]), hard.logits, atol=1e-5, rtol=0)
    assert answers["hard"]["kept"] == hard.kept.tolist()
    for name in ("hard", "mean"):
        assert sum(answers[name]["kept"][0]) < 0.8 * sum(lengths) and min(answers[name]["kept"][0]) >= 1
    torch.testing.assert_close(their_logits(open_saved(tmp_path / "ours", "sequence"), sequences, 1), expected)


def test_the_docstrings_of_model_py_alone(tmp_path):
    shutil.copy(ROOT / "model.py", tmp_path)
    assert "0 failed" in run_alone(tmp_path, "-m", "doctest", "-v", "model.py")
