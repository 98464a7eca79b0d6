"""Answers for every token: heads, forwarding of pruned tokens, and every stage on questions and on tags."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from conftest import MODES, random_sequences, small_model
from safetensors.torch import load_file
from sentences import made_sentences
from test_cli import refused, run
from test_distributed import launch

from data import InputError, Settings, Source, Tokenizer, custom_task, find_task, pack
from model import Config, load_config, load_model, save_model, sum_by_sequence, threshold_ladder
from train import (
    Predictor,
    Process,
    PruningOptions,
    as_choices,
    backward,
    bench_checkpoint,
    evaluate_checkpoint,
    load_sets,
    run_stage,
    task_loss,
)

# ---- heads ----

SIZES = dict(
    vocab_size=83, hidden_size=30, num_hidden_layers=3, num_attention_heads=3, intermediate_size=47, num_labels=4
)


@pytest.mark.parametrize("kind", ["Roberta", "Bert"])
@pytest.mark.parametrize("head, architecture", [("token", "TokenClassification"), ("span", "QuestionAnswering")])
def test_logits_of_every_token_equal_transformers_both_ways(kind, head, architecture, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    sizes = SIZES | {"num_labels": 2 if head == "span" else 4, "initializer_range": 0.15}
    config = getattr(transformers, f"{kind}Config")(**sizes, max_position_embeddings=140)
    theirs = getattr(transformers, f"{kind}For{architecture}")(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    sequences = random_sequences(5, longest=50)

    def logits_of(model):
        with torch.inference_mode():
            outputs = [model(input_ids=torch.tensor([ids])) for ids in sequences]
        if head == "span":
            return torch.cat([torch.stack([o.start_logits[0], o.end_logits[0]], 1) for o in outputs])
        return torch.cat([o.logits[0] for o in outputs])

    ours = load_model(tmp_path / "theirs").model
    ours.thresholds.data.zero_()
    assert ours.config.head == head
    expected = logits_of(theirs)
    assert expected.std() > 0.1
    for mode in ("none", "hard"):  # with all thresholds at 0 nothing is pruned
        with torch.inference_mode():
            torch.testing.assert_close(ours(*pack(sequences), pruning=mode).logits, expected, atol=1e-4, rtol=0)
    ours.config = replace(ours.config, prune_mode="absolute_threshold")
    save_model(tmp_path / "ours", ours)
    again, report = getattr(transformers, f"AutoModelFor{architecture}").from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"] and set(report["unexpected_keys"]) <= {"ltp.thresholds"}
    torch.testing.assert_close(logits_of(again.eval()), expected, atol=1e-4, rtol=0)


def test_another_kind_of_head_is_new_where_asked_for_and_an_error_elsewhere(tmp_path):
    save_model(tmp_path, small_model())
    with pytest.raises(InputError, match="the token head .* is missing; fine-tune"):
        load_model(tmp_path, ("O", "B-X", "I-X"), head="token")
    for head, labels in (("token", ("O", "B-X", "I-X")), ("span", ("start", "end"))):
        loaded = load_model(tmp_path, labels, new_head=True, head=head)
        assert f"the {head} head is new" in loaded.notes[0]
        assert loaded.model(*pack([[5, 6, 7]])).logits.shape == (3, len(labels))
        save_model(tmp_path / head, loaded.model)
        assert load_config(tmp_path / head).head == head and load_config(tmp_path / head).labels == labels
    # A model of questions from elsewhere says nothing of a length: windows have 384 tokens then, or all it has positions for.
    raw = json.loads((tmp_path / "span" / "config.json").read_text())
    del raw["max_seq_length"]
    assert Config.from_dict(raw).max_seq_length == Config.from_dict(raw).max_tokens < 384
    assert Config.from_dict(raw | {"max_position_embeddings": 514}).max_seq_length == 384


# ---- pruned tokens ----


def token_model(**changes):
    model = small_model(head="token", token_keep_rate=0.3, **changes)
    model.thresholds.data = threshold_ladder(0.01, 5)
    return model


@pytest.mark.parametrize("mode", MODES)
def test_every_token_has_an_answer_whatever_the_batch(mode):
    model, sequences = token_model(), random_sequences(7)
    with torch.inference_mode():
        together = model(*pack(sequences), pruning=mode, **MODES[mode])
        alone = [model(*pack([s]), pruning=mode, **MODES[mode]).logits for s in sequences]
    assert together.logits.shape == (sum(map(len, sequences)), 3)
    torch.testing.assert_close(together.logits, torch.cat(alone), atol=1e-5, rtol=0)
    if mode in ("hard", "topk"):
        assert together.kept[-1].sum() < 0.5 * together.kept[0].new_tensor([len(s) for s in sequences]).sum()


@pytest.mark.parametrize("mode", MODES)
def test_pruned_tokens_answer_as_in_a_masked_padded_forward(mode):
    model, sequences = token_model(), random_sequences(7)
    with torch.inference_mode():
        output = model(*pack(sequences), pruning=mode, **MODES[mode])
        logits, kept, _ = reference.forward(model, sequences, mode, **MODES[mode])
    torch.testing.assert_close(output.logits, logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.kept.float(), kept.float(), atol=1e-3, rtol=0)


def test_masks_on_attention_forward_states_as_in_a_masked_padded_forward():
    model, sequences = token_model(), random_sequences(7)
    soft = {"temperature": 1e-3, "mask_attention": True}
    with torch.inference_mode():
        output = model(*pack(sequences), pruning="soft", **soft)
        logits, kept, _ = reference.forward(model, sequences, "soft", **soft)
        on_output = model(*pack(sequences), pruning="soft", temperature=1e-3)
    torch.testing.assert_close(output.logits, logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.kept, kept, atol=1e-3, rtol=0)
    assert (on_output.logits - logits).abs().max() > 0.01


@pytest.mark.parametrize("head", ["token", "span"])
@pytest.mark.parametrize("mode", MODES)
def test_bf16(mode, head):
    model = small_model(head=head, labels=("a", "b"), token_keep_rate=0.3)
    model.thresholds.data = threshold_ladder(0.01, 5)
    batch = pack(random_sequences(7))
    exact = model(*batch, pruning=mode, **MODES[mode]).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.train()(*batch, pruning=mode, **MODES[mode]).logits
        logits.float().square().sum().backward()
    logits, exact = logits.detach(), exact.detach()
    assert float((logits - exact).abs().median()) < 0.05 * float(exact.std())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_sharp_soft_mask_that_drops_forwards_what_hard_pruning_does():
    model, batch = token_model(), pack(random_sequences(7))
    with torch.inference_mode():
        hard = model(*batch, pruning="hard")
        soft = model(*batch, pruning="soft", temperature=1e-9, mask_floor=0.01)
    assert int(hard.kept[-1].sum()) < len(batch.token_ids)
    torch.testing.assert_close(soft.logits, hard.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(soft.kept, hard.kept.float())


def test_a_token_that_half_leaves_is_forwarded_in_halves():
    model, batch = token_model(), pack(random_sequences(5))
    with torch.inference_mode():
        plain = model(*batch, pruning="soft", temperature=1e-3)
        floored = model(*batch, pruning="soft", temperature=1e-3, mask_floor=1e-30)
    torch.testing.assert_close(floored.logits, plain.logits, atol=1e-5, rtol=0)
    # The gradient of a token that is nearly gone still reaches the thresholds.
    model.thresholds.requires_grad_(True)
    model(*batch, pruning="soft", temperature=1e-3).logits.sum().backward()
    assert (model.thresholds.grad != 0).all()


@pytest.mark.parametrize("mode", ["soft", "hard", "topk"])
def test_a_protected_question_is_never_pruned(mode):
    sequences = random_sequences(6)
    segments = [[0] * (1 + len(s) // 3) + [1] * (len(s) - 1 - len(s) // 3) for s in sequences]
    asked = torch.tensor([s.count(0) for s in segments])
    for protect in (True, False):
        model = small_model(
            head="span", labels=("start", "end"), type_vocab_size=1, protect_question=protect, token_keep_rate=-2.0
        )
        model.thresholds.data = threshold_ladder(0.05, 5)
        batch = pack(sequences, segments)
        with torch.inference_mode():
            output = model(*batch, pruning=mode, **MODES[mode], trace=True)
            alone = [model(*pack([s], [g]), pruning=mode, **MODES[mode]).logits for s, g in zip(sequences, segments)]
        torch.testing.assert_close(output.logits, torch.cat(alone), atol=1e-5, rtol=0)
        if mode != "soft":
            last = output.trace[-1]
            left = sum_by_sequence(
                torch.zeros(len(batch.token_ids)).index_fill(0, last.tokens[last.keep], 1).long()
                * (batch.segment_ids == 0),
                batch.lengths,
            )
            assert torch.equal(left, asked) == protect
        else:
            assert (output.kept[-1] >= asked - 1e-3).all() == protect


# ---- losses ----


def test_the_span_loss_by_hand():
    # Two sequences of 2 and 3 tokens; start and end are two choices among the tokens of a sequence.
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 3.0]])
    targets = torch.tensor([[1, 0], [0, 2]])
    rows = [([0, 2], 1), ([1, 0], 0), ([1, 0, 0], 0), ([1, 0, 3], 2)]
    wanted = sum(float(torch.tensor(row, dtype=torch.float).logsumexp(0)) - row[i] for row, i in rows)
    choices = as_choices("span", logits, torch.tensor([2, 3]))
    assert choices.shape == (4, 3)
    assert float(task_loss(choices, targets.flatten())) == pytest.approx(wanted, abs=1e-5)


# ---- every stage, on small data of our own ----

NAMES = "Anna Boris Clara David Elena Felix Greta Hugo".split()
TOWNS = "Malden Norwick Orleton Pernau Quimby Rosental".split()


def squad_file(path: Path, count: int, seed: int, unanswerable: bool) -> None:
    """Who lives where? Contexts of a few sentences, in the layout of SQuAD's files."""
    generator = np.random.default_rng(seed)
    paragraphs = []
    for number in range(count):
        people = generator.permutation(NAMES)[:4]
        context = " ".join(f"{name} lives in {generator.choice(TOWNS)}." for name in people[:3])
        asked = people[3] if unanswerable and number % 4 == 0 else people[number % 3]
        answers = []
        if asked in people[:3]:
            start = context.index(f"{asked} lives in ") + len(f"{asked} lives in ")
            answers = [{"text": context[start:].split(".")[0], "answer_start": start}]
        question = {"id": f"{seed}-{number}", "question": f"Where does {asked} live?", "answers": answers}
        paragraphs.append({"context": context, "qas": [question]})
    path.write_text(json.dumps({"version": "1", "data": [{"title": "t", "paragraphs": paragraphs}]}))


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Source:
    folder = tmp_path_factory.mktemp("questions")
    squad_file(folder / "train-v2.0.json", 96, 0, True)
    squad_file(folder / "dev-v2.0.json", 30, 1, True)
    return Source(find_task("squad2"), folder)


@pytest.fixture(scope="module")
def tags(tmp_path_factory) -> Source:
    folder = tmp_path_factory.mktemp("tags")
    for name, count, seed in (("train.conll", 96, 0), ("dev.conll", 30, 1)):
        blocks = ("\n".join(f"{w} {t}" for w, t in zip(s.words, s.labels)) for s in made_sentences(count, seed))
        (folder / name).write_text("\n\n".join(blocks) + "\n")
    return Source(custom_task(None, None, None, False, True), folder)


@pytest.fixture(scope="module", params=["questions", "tags"])
def trained(request, demo, tmp_path_factory) -> tuple[Source, Path]:
    """A task and a model fine-tuned on it for a moment."""
    source = request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp(request.param) / "dense"
    settings = Settings(epochs=4, learning_rate=3e-3, batch_size=16)
    run_stage("finetune", demo / "model", source, settings, PruningOptions(max_seq_length=60), folder)
    return source, folder


@pytest.mark.parametrize("stage", ["soft", "hard", "manual", "topk"])
def test_every_stage_runs_and_eval_repeats_its_result(trained, stage, tmp_path):
    source, dense = trained
    settings = Settings(
        epochs=1, learning_rate=1e-3, batch_size=16, accumulate=2, target_flops=0.6 if stage != "topk" else 0.95
    )
    restore = dense
    if stage == "hard":
        restore, _ = run_stage("soft", dense, source, replace(settings, load_best=False), output=tmp_path / "soft")
    options = PruningOptions(final_token_threshold=0.02 if stage in ("soft", "manual") else None)
    folder, result = run_stage(stage, restore, source, settings, options, tmp_path / stage, distill=dense)
    assert result.best["relative_flops"] < 0.98
    again = evaluate_checkpoint(folder, source, Process(), batch_size=5)
    assert again.metrics == pytest.approx(result.best["metrics"], abs=1e-4) and again.loss == pytest.approx(
        result.best["loss"], abs=1e-4
    )
    assert again.kept == pytest.approx(result.best["kept"])
    budget = evaluate_checkpoint(folder, source, Process(), max_tokens=70)
    assert budget.metrics == pytest.approx(again.metrics, abs=1e-4) and budget.relative_flops == pytest.approx(
        again.relative_flops
    )


@pytest.mark.parametrize("pruning", ["none", "soft", "hard", "topk"])
def test_parts_of_a_batch_add_up_to_the_whole(trained, pruning):
    source, dense = trained
    model = load_model(dense).model
    model.thresholds.data = threshold_ladder(0.01, 4)
    model.thresholds.requires_grad_(pruning == "soft")
    data, _ = load_sets(source, "train", Tokenizer(dense), 60, model.config.labels)
    found = []
    for parts in (1, 4):
        loss, _ = backward(model, data[""], np.arange(13), pruning, Settings(accumulate=parts), Process())
        found.append((loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, atol=1e-5, rtol=1e-4)


def test_finetuning_learns(trained):
    """Both tasks can be read off the words, so even a tiny model is soon better than saying nothing."""
    source, dense = trained
    log = [json.loads(line) for line in (dense / "log.jsonl").read_text().splitlines()][1:-1]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]


@pytest.mark.parametrize("trained", ["questions"], indirect=True)
def test_predictions_of_questions_agree_with_the_n_best_and_with_predict(trained, tmp_path):
    source, dense = trained
    from squad import read_squad

    kept = {}

    def collect(examples, logits):
        found = examples.find(logits)
        kept.update(texts=examples.texts(found), nbest=examples.nbest(found))

    evaluate_checkpoint(dense, source, Process(), collect=collect)
    questions = list(read_squad(source.path / "dev-v2.0.json"))
    assert list(kept["texts"]) == list(kept["nbest"]) == [q.id for q in questions]
    for question in questions:
        best = kept["nbest"][question.id]
        wanted = "" if best["no_answer_score"] > 0 else best["answers"][0]["text"]
        assert kept["texts"][question.id] == wanted
    predictor = Predictor(dense, Process(), 4, None, False, no_answer_threshold=0.0)
    # Blanks around a question are no part of it.
    records = [("line", {"question": f" {q.question} ", "context": q.context}) for q in questions]
    answers = predictor.answer(records)
    assert [a["answer"] for a in answers] == list(kept["texts"].values())
    for question, answer in zip(questions, answers):
        assert not answer["answer"] or question.context[answer["start"] : answer["end"]] == answer["answer"]
        assert len(answer["kept"]) == 4
    several = predictor.answer([("line", {"id": 7, "question": "Who?", "context": "Ada wrote it. " * 60})])[0]
    single = predictor.answer([("line", {"question": "Who?", "context": "Ada."})])[0]
    assert several["id"] == 7 and several["windows"] > 1 and single["windows"] == 1 and "id" not in single
    with pytest.raises(InputError, match='line: expected an object with "question" and "context"'):
        predictor.answer([("line", {"text": "where"})])


@pytest.mark.parametrize("trained", ["tags"], indirect=True)
def test_tags_of_predict_are_those_of_eval(trained):
    source, dense = trained
    sentences = made_sentences(30, 1)
    predictor = Predictor(dense, Process(), 4, None, False)
    answers = predictor.answer([("line", {"words": s.words}) for s in sentences])
    evaluation = evaluate_checkpoint(dense, source, Process())
    right = [a == b for s, answer in zip(sentences, answers) for a, b in zip(s.labels, answer["labels"])]
    assert evaluation.metrics["accuracy"] == pytest.approx(sum(right) / len(right))
    assert predictor.answer([("line", {"text": " ".join(sentences[0].words)})]) == answers[:1]
    cut = Predictor(dense, Process(), 4, 10, False).answer([("line", {"words": sentences[0].words})])[0]
    read = sum(label is not None for label in cut["labels"])  # words that were cut off have no label
    assert cut["tokens"] == 10 and cut["labels"] == answers[0]["labels"][:read] + [None] * (len(cut["words"]) - read)
    with pytest.raises(InputError, match='line: expected an object with "words"'):
        predictor.answer([("line", {"words": []})])


def test_inspect_shows_the_answers_of_predict(trained, tmp_path):
    source, folder = trained
    shutil.copytree(folder, tmp_path / "hard")
    model = load_model(folder, prune_mode="absolute_threshold").model
    model.thresholds.data.fill_(0.012)
    save_model(tmp_path / "hard", model)
    text = (
        ("Who wrote it?", "--pair", "Ada Berg wrote it in 1912.") if source.task.head == "span" else ("Ada Berg wrote",)
    )
    found = json.loads(run("predict", "--restore", tmp_path / "hard", *text).stdout)
    label = (
        found["answer"]
        if "answer" in found
        else ", ".join(f"{w} {t}" for w, t in zip(found["words"], found["labels"]) if t != "O")
    )
    run("inspect", "--restore", tmp_path / "hard", *text, "--html", tmp_path / "p.html")
    data = re.search(r'id="data">(.*?)</script>', (tmp_path / "p.html").read_text(), re.DOTALL)[1]
    (example,) = json.loads(data)["examples"]
    assert example["pruned"]["label"] == (f"“{label}”" if "answer" in found else label or "no tags")
    assert [len(layer["alive"]) for layer in example["layers"]] == found["kept"] and found["kept"][-1] < found["tokens"]
    assert "relative FLOPs" in run("inspect", "--restore", tmp_path / "hard", *text).stdout
    assert "no token is dropped" in run("inspect", "--restore", folder, *text).stdout
    if source.task.head == "span":
        assert "asks for --pair" in refused("inspect", "--restore", folder, "Who?")
        assert "--pair: is empty" in refused("predict", "--restore", folder, "Who?", "--pair", " ")
        assert "--pair: is empty" in refused("inspect", "--restore", folder, "Who?", "--pair", "")
        assert "windows of 60 tokens" in refused(
            "inspect", "--restore", folder, "Who?", "--pair", "Ada wrote it. " * 60
        )


@pytest.mark.parametrize("trained", ["tags"], indirect=True)
def test_unknown_tags_and_teachers_of_other_tags_are_refused(trained, tmp_path):
    source, dense = trained
    for name in ("train", "dev"):
        text = (source.path / f"{name}.conll").read_text().replace("PER", "WHO")
        (tmp_path / f"{name}.conll").write_text(text)
    other = replace(source, path=tmp_path)
    with pytest.raises(InputError, match="dev.conll, line [0-9]+: the label '[BI]-WHO' is none of the model's, O, B-"):
        evaluate_checkpoint(dense, other, Process())
    settings = Settings(epochs=1, batch_size=16)
    run_stage("finetune", dense, other, settings, output=tmp_path / "other")
    with pytest.raises(InputError, match="--distill .*: answers O, .*WHO"):
        run_stage("manual", dense, source, settings, output=tmp_path / "x", distill=tmp_path / "other")


def test_options_of_questions_are_refused_elsewhere(trained, tmp_path, demo):
    source, dense = trained
    if source.task.head == "span":
        assert "asks for --pair" in refused("predict", "--restore", dense, "Where?")
        return
    assert "omit --pair" in refused("predict", "--restore", dense, "a text", "--pair", "b")
    assert "--no-answer-threshold" in refused("predict", "--restore", dense, "a text", "--no-answer-threshold", 0)
    with pytest.raises(InputError, match="--protect-question"):
        run_stage("topk", dense, source, Settings(), PruningOptions(protect_question=True), tmp_path / "x")
    assert "--predictions" in refused(
        "eval", "--tagging", "--data", source.path, "--restore", dense, "--predictions", tmp_path / "p.json"
    )
    assert "run `finetune` on it first" in refused(
        "soft", "--tagging", "--data", source.path, "--restore", demo / "model", "--output", tmp_path / "y"
    )


@pytest.mark.parametrize("trained", ["questions"], indirect=True)
def test_protected_questions_keep_to_a_budget_and_bench_prunes(trained, tmp_path):
    source, dense = trained
    settings = Settings(epochs=1, batch_size=16, target_flops=0.97)
    options = PruningOptions(protect_question=True)
    folder, result = run_stage("topk", dense, source, settings, options, tmp_path / "topk")
    assert load_config(folder).protect_question and abs(result.best["relative_flops"] - 0.97) < 0.02
    settings = replace(settings, target_flops=0.7)
    folder, _ = run_stage("manual", dense, source, settings, options, tmp_path / "manual")
    found = bench_checkpoint(folder, None, [60], 8, [4], 1, Process())
    assert found["speeds"][0]["flops_reduction"] > 1.05
    card = (folder / "README.md").read_text()
    assert "question-answering" in card and "exact_match" in card and "type: best" not in card and "windows" in card


@pytest.mark.parametrize("trained", ["questions"], indirect=True)
def test_squad_1_reads_its_own_file_and_only_questions_with_answers(trained, tmp_path):
    source, dense = trained
    squad_file(tmp_path / "dev-v1.1.json", 8, 5, False)
    squad_file(tmp_path / "dev-v2.0.json", 8, 6, True)
    tokenizer = Tokenizer(dense)
    for name, prefix, count in (("SQuAD", "5-", 8), ("SQuAD2", "6-", 8)):
        sets, _ = load_sets(Source(find_task(name), tmp_path), "dev", tokenizer, 60, ("start", "end"))
        assert len(sets[""].questions) == count and all(q.id.startswith(prefix) for q in sets[""].questions)
    (tmp_path / "dev-v1.1.json").unlink()
    sets, _ = load_sets(Source(find_task("SQuAD"), tmp_path), "dev", tokenizer, 60, ("start", "end"))
    assert 0 < len(sets[""].questions) < 8 and all(q.answers for q in sets[""].questions)


def test_labels_that_differ_in_case_keep_their_rows(tmp_path):
    model = small_model(head="token", labels=("O", "b", "B"))
    save_model(tmp_path, model)
    for labels in (None, ("O", "b", "B")):
        assert load_model(tmp_path, labels).model.head.output.weight.equal(model.head.output.weight)
    assert load_model(tmp_path, ("B", "O", "b")).model.head.output.weight.equal(model.head.output.weight[[2, 0, 1]])


def test_another_kind_of_task_is_refused(trained, demo):
    source, dense = trained
    with pytest.raises(InputError, match="another kind of task than your own data"):
        evaluate_checkpoint(dense, Source(custom_task(None, None, None, False), demo / "data"), Process())


@pytest.mark.parametrize("kind", ["questions", pytest.param("tags", marks=pytest.mark.slow)])
def test_two_processes_train_and_answer_like_one(kind, request, demo, tmp_path):
    source = request.getfixturevalue(kind)
    words = ["--data", source.path, *(["--tagging"] if kind == "tags" else ["--task", "SQuAD2"])]
    for processes in (1, 2):
        options = ["--restore", demo / "model", "--max-length", 60, "--bs", 15, "--epochs", 1, "--lr", "5e-5"]
        launch(processes, "finetune", *words, *options, "--output", tmp_path / str(processes))
        record = tmp_path / f"{processes}.json"
        launch(processes, "eval", *words, "--restore", tmp_path / "1", "--json", record)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "12")
    for name in one:
        # A weight that hardly matters has a gradient of little but rounding, which Adam makes a step of.
        torch.testing.assert_close(one[name], two[name], atol=3e-5, rtol=0, msg=lambda m: f"{name}: {m}")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "12")
    for key in ("metrics", "score", "loss", "relative_flops", "kept"):
        assert one[key] == pytest.approx(two[key], abs=1e-4), key
