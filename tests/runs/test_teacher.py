"""The teacher of --distill: its answers, when it is asked, and which teachers are refused."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from stages import read_records, stage

import runs.teacher
from data import Examples
from model import Dense
from runs.stage import StageRequest, run_stage
from runs.teacher import ask_teacher
from support.checkpoint import load_config, load_model, save_model
from support.errors import InputError
from support.process import Process
from support.settings import PruningOptions, Settings
from tasks.tokenizer import Tokenizer
from train import find_factor


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
    return folder


def ask(source, folder, process=Process(), max_length=128, student=None, batch_size=16, **calls):
    labels = load_config(folder).labels
    return ask_teacher(folder, source, labels, Tokenizer(student or folder), max_length, process, batch_size, **calls)


def test_answers_are_the_dense_models(source, finetuned):
    logits, model = ask(source, finetuned), load_model(finetuned).model
    examples = source.load("train", Tokenizer(finetuned), 128, model.config.labels)[0][""]
    assert logits.shape == (150, 2) and logits.dtype == torch.float32
    with torch.inference_mode():
        for i in (0, 77, 149):
            torch.testing.assert_close(logits[i], model(examples.batch([i]), Dense()).logits[0], atol=1e-5, rtol=1e-5)


def test_a_bar_moves_while_the_teacher_answers(source, finetuned):
    seen = []
    ask(source, finetuned, progress=lambda step, steps: seen.append((step, steps)))
    assert seen == [(batch, 10) for batch in range(10)]  # 150 examples, 16 a batch
    ask(source, finetuned, progress=lambda step, steps: seen.append((step, steps)))
    assert len(seen) == 10  # the second time the cache has the answers


def test_answers_for_each_token_lie_in_the_order_of_the_examples(tags):
    source, folder = tags
    logits, model = ask(source, folder, max_length=60), load_model(folder).model
    examples = source.load("train", Tokenizer(folder), 60, model.config.labels)[0][""]
    assert logits.shape == (examples.lengths.sum(), len(model.config.labels))
    with torch.inference_mode():
        for i in (0, 50, 95):
            expected = model(examples.batch([i]), Dense()).logits
            torch.testing.assert_close(logits[examples.rows(np.array([i]))], expected, atol=1e-5, rtol=1e-5)


def test_a_teacher_is_asked_once(source, finetuned, tmp_path, cache, monkeypatch):
    def answers():
        return sorted(cache.glob("answers-*.safetensors"))

    first = ask(source, finetuned)
    (file,) = answers()
    before = file.stat().st_mtime_ns
    assert torch.equal(ask(source, finetuned), first) and answers() == [file] and file.stat().st_mtime_ns == before
    # The same model elsewhere gives the same answers. Other precisions, weights and versions of the code do not.
    other = tmp_path / "other"
    model = load_model(shutil.copytree(finetuned, other)).model
    assert torch.equal(ask(source, other), first) and answers() == [file]
    ask(source, finetuned, Process(precision="bf16"))
    assert len(answers()) == 2
    model.head.output.bias.data += 1
    save_model(other, model)
    torch.testing.assert_close(ask(source, other), first + 1, atol=1e-5, rtol=0)
    assert len(answers()) == 3
    monkeypatch.setattr(runs.teacher, "CACHE_VERSION", -1)
    ask(source, finetuned)
    assert len(answers()) == 4


def test_with_the_teacher_alone_the_labels_do_not_matter(source, finetuned, tmp_path):
    weights = {}
    for labels in ("right", "wrong"):
        folder = tmp_path / labels / "data"
        folder.mkdir(parents=True)
        for split in ("train", "dev"):
            text = (source.path / f"{split}.jsonl").read_text()
            if labels == "wrong":
                swap = {'"positive"': '"negative"', '"negative"': '"positive"'}
                text = re.sub("|".join(swap), lambda match: swap[match[0]], text)
            (folder / f"{split}.jsonl").write_text(text)
        run, own = tmp_path / labels / "run", replace(source, path=folder)
        stage(own, "manual", finetuned, run, distill=finetuned, distill_weight=1.0, epochs=0.5)
        weights[labels] = load_model(run).model.head.output.weight
    assert torch.equal(weights["right"], weights["wrong"])


def write_texts(path, count):
    """A file of texts without labels, each of another number of words."""
    path.write_text("".join(json.dumps({"text": "food " * (i + 1)}) + "\n" for i in range(count)))
    return path


def test_texts_without_labels_are_learned_as_the_teacher_answers_them(source, finetuned, tmp_path):
    texts = write_texts(tmp_path / "more.jsonl", 10)
    labels = load_config(finetuned).labels
    train_set = source.load("train", Tokenizer(finetuned), 128, labels)[0][""]
    train_set.teacher = ask(source, finetuned)
    more = source.task.load_unlabelled(texts, Tokenizer(finetuned), 128)
    more.teacher = ask(source, finetuned, unlabelled=texts)
    model = load_model(finetuned).model
    with torch.inference_mode():
        answer = model(more.batch([9]), Dense()).logits
    torch.testing.assert_close(more.teacher[9:], answer, atol=1e-5, rtol=1e-5)
    both = train_set.extended(more)
    assert (len(both), both.unlabelled) == (160, 10)
    assert both.targets[:150].tolist() == train_set.targets.tolist() and both.targets[159] == answer.argmax()
    assert both.batch([159]).token_ids.tolist() == more.batch([9]).token_ids.tolist()
    assert torch.equal(both.teacher, torch.cat([train_set.teacher, more.teacher]))
    # They do not count where thresholds are scaled: those of the training data alone are scaled alike.
    model.thresholds.data.fill_(0.01)
    first = find_factor(model, train_set, 0.6, Process())
    model.thresholds.data.fill_(0.01)
    assert find_factor(model, both, 0.6, Process()) == first
    # A stage takes them, and an epoch is longer by them.
    shown = []
    run = tmp_path / "run"
    result = stage(
        source, "hard", soft_of(finetuned, tmp_path), run, show=shown.append, distill=finetuned, distill_data=texts
    )
    assert result.steps == 10 and any(
        "160 training examples" in line and "10 of them without" in line for line in shown
    )
    assert read_records(run)[0]["distill_data"] == str(texts)
    assert "150 training and 41 evaluation examples; 10 more texts without labels" in (run / "README.md").read_text()


def soft_of(finetuned, folder):
    """The model with thresholds, as `soft` leaves it."""
    model = load_model(finetuned, prune_mode="absolute_threshold").model
    model.thresholds.data.fill_(0.01)
    save_model(shutil.copytree(finetuned, folder / "soft"), model)
    return folder / "soft"


def test_a_score_is_the_teachers_first_output():
    def examples(targets, teacher):
        flat = np.zeros(2, np.int32)
        return Examples(flat, flat.astype(np.int8), np.ones(2, np.int64), targets, teacher=teacher)

    scored = examples(np.array([1.0, 2.0], np.float32), torch.zeros(2, 1))
    both = scored.extended(examples(np.empty(0), torch.tensor([[0.25], [4.5]])))
    assert both.targets.tolist() == [1.0, 2.0, 0.25, 4.5] and both.targets.dtype == np.float32


def test_texts_without_labels_that_nobody_can_answer_are_refused(source, finetuned, tags, tmp_path):
    texts = write_texts(tmp_path / "more.jsonl", 3)
    other = tmp_path / "other.jsonl"
    other.write_text('{"sentence": "food"}\n')
    run = tmp_path / "run"
    for message, changes in (
        ("goes with --distill", {"distill": None}),
        ("none.jsonl: no such file", {"distill_data": tmp_path / "none.jsonl"}),
        ("no column 'text' but 'sentence'", {"distill_data": other}),
    ):
        with pytest.raises(InputError, match=message):
            stage(source, "manual", finetuned, run, **{"distill": finetuned, "distill_data": texts} | changes)
    with pytest.raises(InputError, match="--distill-data is for classifiers"):
        stage(tags.source, "manual", tags.folder, run, distill=tags.folder, distill_data=texts)
    assert not run.exists()


def test_a_run_goes_on_with_the_same_texts_alone(source, finetuned, tmp_path):
    texts, run = write_texts(tmp_path / "more.jsonl", 3), tmp_path / "run"
    stage(source, "manual", finetuned, run, distill=finetuned, distill_data=texts, epochs=0.1)
    settings = Settings(**read_records(run)[0]["settings"])
    request = StageRequest(
        "manual", finetuned, source, settings, output=run, resume=True, distill=finetuned, distill_data=texts
    )
    assert run_stage(request)[0] == run
    with pytest.raises(InputError, match="started with texts of other content, --distill-data"):
        run_stage(replace(request, distill_data=write_texts(tmp_path / "others.jsonl", 4)))


def test_teachers_of_another_kind_are_refused(source, finetuned, questions, tags, tmp_path):
    with pytest.raises(InputError, match="classifies texts, which is another kind of task than SQuAD2"):
        ask(questions.source, finetuned)
    folder = shutil.copytree(tags.folder, tmp_path / "tokenizer")
    merges = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("\n".join(merges[:-20]) + "\n")
    with pytest.raises(InputError, match="--distill .*: has another tokenizer"):
        ask(tags.source, folder, student=tags.folder)
    named = load_model(finetuned, ("good", "bad")).model
    save_model(shutil.copytree(finetuned, tmp_path / "named"), named)
    with pytest.raises(InputError, match="--distill .*: answers good, bad, not negative, positive"):
        stage(source, "manual", finetuned, tmp_path / "x", distill=tmp_path / "named")
    assert not (tmp_path / "x").exists()


def test_teachers_of_other_tags_are_refused(tags, tmp_path):
    source, dense = tags
    for name in ("train", "dev"):
        text = (source.path / f"{name}.conll").read_text().replace("PER", "WHO")
        (tmp_path / f"{name}.conll").write_text(text)
    other = replace(source, path=tmp_path)
    stage(other, "finetune", dense, tmp_path / "other", PruningOptions(), epochs=0.2)
    with pytest.raises(InputError, match="--distill .*: answers O, .*WHO"):
        stage(source, "manual", dense, tmp_path / "x", distill=tmp_path / "other")
