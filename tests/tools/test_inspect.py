"""Which tokens survive: what the examples hold, the terminal's picture, and the page in a browser."""

import io
import json
import re
import shutil
from pathlib import Path

import browser as chromium
import pytest
import torch
from rich.console import Console

from model import Dense, TopK, macs, topk_rates
from support.checkpoint import load_model, save_model
from support.errors import InputError
from support.process import Process
from tasks.base import pack_encoded
from tools.inspect import describe_answer, examine, page, print_example, print_examples, relative_importance
from tools.predict import Predictor, pruning_name

NASTY = "</script><script>document.title='owned'</script><img src=x onerror=document.title='owned'> \"&'"
TEXT = "the street was over fresh"


def examine_texts(folder: Path, *texts: str) -> list[dict]:
    return examine(Predictor(folder, Process(), batch_size=1), [("line", {"text": text}) for text in texts])


def write_page(path: Path, folder: Path, *texts: str) -> list[dict]:
    examples = examine_texts(folder, *texts)
    name = pruning_name(load_model(folder).model.config)
    path.write_text(page(examples, {"name": str(folder), "pruning": name}), encoding="utf-8")
    return examples


# ---- examples ----


def test_examples_agree_with_the_model(hard):
    predictor = Predictor(hard, Process(), batch_size=1)
    records = [("a", {"text": "the road was not excellent at all."}), ("b", {"text": "one", "text_pair": "two"})]
    examples = examine(predictor, records)
    assert [example["text"] for example in examples] == ["the road was not excellent at all.", "one / two"]
    for example, encoded in zip(examples, predictor.prepare(records).encoded):
        batch, config = pack_encoded([encoded]), predictor.model.config
        with torch.inference_mode():
            output, dense = predictor.model(batch), predictor.model(batch, Dense())
        token_ids, n = encoded.token_ids, len(encoded.token_ids)
        assert example["tokens"] == predictor.reader.tokenizer.tokens(token_ids) and example["tokens"][0] == "<s>"
        assert [len(layer["alive"]) for layer in example["layers"]] == output.kept[:, 0].tolist()
        assert 0 < len(example["layers"][-1]["alive"]) < n
        entering = set(range(n))
        for layer in example["layers"]:  # the rule, for the tokens that entered, and the first token
            assert {i for i, score in enumerate(layer["scores"]) if score is not None} == entering
            entering = {i for i in entering if i == 0 or layer["scores"][i] >= layer["threshold"]}
            assert layer["alive"] == sorted(entering)
        share = macs(config, batch.lengths, output.kept) / macs(config, batch.lengths, dense.kept)
        assert example["relative_flops"] == pytest.approx(share.item()) and example["layers"][0]["relative_flops"] == 1
        for name, out in (("pruned", output), ("dense", dense)):
            assert list(example[name]["probabilities"].values()) == pytest.approx(out.logits.softmax(1)[0].tolist())
            assert example[name]["label"] == config.labels[int(out.logits.argmax())]


def test_models_without_thresholds_have_scores_in_every_layer(demo, tmp_path):
    shutil.copytree(demo / "model", tmp_path / "topk")
    save_model(tmp_path / "topk", load_model(tmp_path / "topk", prune_mode="topk", token_keep_rate=0.3).model)
    (dense,), (topk,) = examine_texts(demo / "model", TEXT), examine_texts(tmp_path / "topk", TEXT)
    n = len(dense["tokens"])
    assert dense["relative_flops"] == 1
    assert dense["dense"]["probabilities"] == pytest.approx(dense["pruned"]["probabilities"])
    assert all(layer["alive"] == list(range(n)) and None not in layer["scores"] for layer in dense["layers"])
    assert all(layer["threshold"] is None for layer in dense["layers"] + topk["layers"])
    assert [len(layer["alive"]) for layer in topk["layers"]] == [round(n * rate) for rate in topk_rates(0.3, 4)]
    last = topk["layers"][3]
    best = sorted(range(1, n), key=lambda i: -last["scores"][i])[: round(n * 0.3) - 1]
    assert last["alive"] == [0, *sorted(best)]
    assert isinstance(load_model(tmp_path / "topk").model.pruner(), TopK)


@pytest.mark.parametrize("kind", ["questions", "tags"])
def test_answers_for_every_token_are_those_of_predict(kind, request, tmp_path):
    folder = request.getfixturevalue(kind).folder
    shutil.copytree(folder, tmp_path / "hard")
    model = load_model(folder, prune_mode="absolute_threshold").model
    model.thresholds.data.fill_(0.02)
    save_model(tmp_path / "hard", model)
    question = {"question": "Who wrote it?", "context": "Ada Berg wrote it in 1912."}
    record = question if kind == "questions" else {"text": TEXT}
    predictor = Predictor(tmp_path / "hard", Process())
    (answer,) = predictor.answer([("line", record)])
    (example,) = examine(predictor, [("line", record)])
    if kind == "questions":
        label = f"“{answer['answer']}”" if answer["answer"] else "no answer"
        assert example["text"] == "Who wrote it? / Ada Berg wrote it in 1912."
    else:
        tagged = [f"{w} {t}" for w, t in zip(answer["words"], answer["labels"]) if t != "O"]
        label = ", ".join(tagged) or "no tags"
    assert example["pruned"] == {"label": label}
    assert [len(layer["alive"]) for layer in example["layers"]] == answer["kept"]
    assert answer["kept"][-1] < answer["tokens"] and example["relative_flops"] < 1


def test_several_windows_are_refused(questions):
    record = {"question": "Who?", "context": "Ada wrote it. " * 60}
    with pytest.raises(InputError, match="line: makes .* windows of 60 tokens, and one can be shown"):
        examine(Predictor(questions.folder, Process()), [("line", record)])


# ---- terminal ----


def test_colour_and_answer():
    assert relative_importance([9.0, 0.04, None, 0.01]) == pytest.approx([1.0, 1.0, 0.0, 0.5])
    assert relative_importance([0.5]) == [1.0]
    assert describe_answer({"label": "score", "score": 2.5}) == "2.500"
    assert describe_answer({"label": "in 1912"}) == "in 1912"


def test_terminal_picture(hard, demo, capsys):
    (example,) = examine_texts(hard, TEXT)
    print_examples([example, *examine_texts(hard, "it was")])
    output = capsys.readouterr().out
    rows = [line.split("│") for line in output.splitlines() if re.match(r" +\d │", line)]
    assert len(rows) == 8
    for row, layer in zip(rows, example["layers"]):
        words = [token if i in layer["alive"] else "·" for i, token in enumerate(example["tokens"])]
        assert row[3].split() == words and int(row[1]) == len(layer["alive"])
        assert float(row[2]) == pytest.approx(layer["relative_flops"], abs=0.006)
    assert f"relative FLOPs {example['relative_flops']:.3f}" in output and "dense" in output
    print_examples(examine_texts(demo / "model", TEXT))
    assert "no token is dropped" in capsys.readouterr().out

    # With colours a dropped token is struck through, and survivors have a background.
    colours = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="truecolor")
    print_example(example, colours)
    coloured = colours.file.getvalue()
    dropped = sum(len(example["tokens"]) - len(layer["alive"]) for layer in example["layers"])
    assert len(re.findall(r"\x1b\[2;9m", coloured)) == dropped > 0
    assert coloured.count("48;2;") == sum(len(layer["alive"]) for layer in example["layers"]) and "·" not in coloured


# ---- page ----


def test_page_is_one_file_that_holds_the_texts_as_data(hard, tmp_path):
    write_page(tmp_path / "p.html", hard, NASTY, "fine")
    html = (tmp_path / "p.html").read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//|@import|url\(", html) and "default-src 'none'" in html
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1]
    assert "<" not in data
    examples = json.loads(data)["examples"]
    assert "".join(examples[0]["tokens"][1:-1]) == NASTY.replace(" ", "") and len(examples) == 2


def test_page_names_are_data_too():
    html = page([{"tokens": ["<b>"]}], {"name": "</script><script>alert(1)", "pruning": "hard"})
    assert html.count("</script>") == 2 and "alert(1)" in html


CONTRAST = """(() => {
  const channel = x => (x /= 255) <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
  const light = c => {
    const k = c.startsWith("color") ? 255 : 1, [r, g, b] = c.match(/[\\d.]+/g).map(x => channel(x * k));
    return .2126 * r + .7152 * g + .0722 * b; };
  const ratio = (a, b) => (Math.max(light(a), light(b)) + .05) / (Math.min(light(a), light(b)) + .05);
  const page = getComputedStyle(document.body).backgroundColor, all = [];
  for (const x of document.querySelectorAll("#text button, .soft, .cut, h1, td")) {
    const style = getComputedStyle(x), own = style.backgroundColor;
    all.push(ratio(style.color, own.endsWith(", 0)") ? page : own));
  }
  return Math.min(...all);
})()"""
SHOWN = "[...at('text').children].map(x => [x.textContent, x.className === 'gone'])"


@pytest.fixture(scope="module")
def page_file(hard, tmp_path_factory) -> tuple[Path, list[dict]]:
    file = tmp_path_factory.mktemp("page") / "p.html"
    return file, write_page(file, hard, TEXT, NASTY, "word " * 300)


@pytest.fixture(scope="module")
def window():
    if not chromium.CHROMIUM:
        pytest.skip("no Chromium")
    with chromium.browser() as opened:
        yield opened


def test_page_fits_phones_and_desks_in_both_themes(window, page_file):
    backgrounds = set()
    for width, dark in ((375, False), (375, True), (1200, False), (1200, True)):
        window.open(page_file[0], width, 800, dark)
        window.run("choose(2)")  # the longest
        assert window.run("document.documentElement.scrollWidth") <= width
        backgrounds.add(window.run("getComputedStyle(document.body).backgroundColor"))
        window.run("choose(0); layer = 1; draw()")
        assert window.run(CONTRAST) >= 4.5  # WCAG's limit, on the weakest and the strongest colour and on the page
    assert len(backgrounds) == 2


def test_page_works_by_keyboard(window, page_file):
    file, (example, *_) = page_file
    window.open(file, 375, 800)
    assert window.run(SHOWN) == [[token, False] for token in example["tokens"]]
    # To the slider and along the layers, then to the tokens and along them.
    window.press("Tab", "Tab")
    assert window.run("document.activeElement.id") == "layer"  # "back" is disabled at the input
    window.press("ArrowRight", "ArrowRight", "ArrowRight")
    alive = example["layers"][2]["alive"]
    assert window.run(SHOWN) == [[token, i not in alive] for i, token in enumerate(example["tokens"])]
    assert window.run("at('state').textContent").startswith(f"After layer 3 of 4: {len(alive)} of")
    window.press("Tab", "Tab", "Home", "ArrowRight", "ArrowUp")
    assert window.run("document.activeElement.textContent") == example["tokens"][1] and window.run("layer") == 2
    assert window.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    cells = window.run("[...at('layers').rows].map(x => x.cells[3].textContent)")
    for layer, cell in zip(example["layers"], cells):
        if layer["scores"][1] is None:
            assert cell == "gone"
        else:
            numbers = [float(x) for x in re.findall(r"[\d.]+(?:e-\d+)?", cell)]
            assert numbers == pytest.approx([layer["scores"][1], layer["threshold"]], rel=0.06)
            assert ("dropped" in cell) == (1 not in layer["alive"])
    assert window.run("[...document.querySelectorAll('input, select')].every(x => x.labels.length)")
    assert window.run("[...document.querySelectorAll('button')].every(x => x.getAttribute('aria-label'))")


def test_page_opens_at_the_token_that_stays_longest(window, page_file):
    file, examples = page_file
    window.open(file, 1200, 800)
    for index, example in enumerate(examples):
        window.run(f"choose({index})")
        layers = [sum(i in layer["alive"] for layer in example["layers"]) for i in range(len(example["tokens"]))]
        assert window.run("token") == layers.index(max(layers[1:]), 1)  # the first token always stays


def test_layer_stays_in_sight_beside_long_texts(window, page_file):
    window.open(page_file[0], 375, 500)
    window.run("choose(2); at('text').children[token].focus()")
    window.press("End", *["ArrowLeft"] * 50)
    top = "document.activeElement.getBoundingClientRect().top - at('controls').getBoundingClientRect().bottom"
    assert window.run("scrollY") > 0 and window.run("at('controls').getBoundingClientRect().top") == 0
    assert window.run(top) >= 0  # the focused token is not behind the controls


def test_texts_from_right_to_left_run_that_way(window, hard, tmp_path):
    write_page(tmp_path / "rtl.html", hard, "(הסרט הזה) good")
    window.open(tmp_path / "rtl.html", 1200, 800)
    left = "[...at('text').children].map(x => x.getBoundingClientRect().left)"
    assert window.run(f"{left}[0] > {left}[1]")
    window.run("at('text').children[token].focus()")
    window.press("Home", "ArrowLeft")
    assert window.run("token") == 1


def test_page_shows_markup_as_text_and_asks_the_network_nothing(window, page_file):
    window.open(page_file[0], 375, 800)
    window.run("at('example').value = 1; at('example').dispatchEvent(new Event('change'))")
    words = window.run("[...at('text').children].slice(1, -1).map(x => x.textContent).join('')")
    assert words.replace("␣", "") == NASTY.replace(" ", "")
    assert window.run("document.title") == "Which tokens survive"
    assert not window.run("document.querySelectorAll('img').length")
    assert window.requests == [page_file[0].as_uri()] and window.messages == []


def test_a_dense_model_answers_once(window, page_file, demo, tmp_path):
    window.open(page_file[0], 1200, 800)
    assert window.run("at('answers').children.length") == 2
    write_page(tmp_path / "dense.html", demo / "model", TEXT)
    window.open(tmp_path / "dense.html", 1200, 800)
    assert window.run("at('answers').children.length") == 1
