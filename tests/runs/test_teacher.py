"""The teacher of --distill: its answers, when it is asked, and which teachers are refused."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from stages import stage

import runs.teacher
from model import Dense
from runs.teacher import ask_teacher
from support.checkpoint import load_config, load_model, save_model
from support.errors import InputError
from support.process import Process
from support.settings import PruningOptions
from tasks.tokenizer import Tokenizer


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
