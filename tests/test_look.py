"""What is there to look at, and what other programs read: inspect, plot, TensorBoard, model card, release folders, ONNX."""

import ast
import io
import json
import re
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import browser as chromium
import numpy as np
import pytest
import torch
from conftest import random_sequences, small_model
from safetensors.torch import load_file, save_file
from test_cli import refused, run
from test_model import GOLDEN

from card import MARK, base_model
from data import InputError, pack
from export import SingleSequence, compare, keep_highest
from look import COLOURS, describe_answer, examine, natural_kind, page, print_example, read_runs, relative_importance
from model import find_model, keep_topk, load_config, load_model, macs, save_model, threshold_ladder
from train import Predictor, Process

ROOT = Path(__file__).parent.parent
NASTY = "</script><script>document.title='owned'</script><img src=x onerror=document.title='owned'> \"&'"


@pytest.fixture(scope="module")
def hard(demo, tmp_path_factory) -> Path:
    """The demo's untrained model with thresholds at which some tokens go in each layer."""
    folder = tmp_path_factory.mktemp("look") / "hard"
    shutil.copytree(demo / "model", folder)
    model = load_model(folder, prune_mode="absolute_threshold").model
    model.thresholds.data = torch.tensor([0.0, 0.004, 0.0065, 0.009])
    save_model(folder, model)
    return folder


@pytest.fixture(scope="module")
def runs(demo, tmp_path_factory) -> Path:
    """Folders of two short trainings, the second with an evaluation every step, and the answers of the second."""
    folder = tmp_path_factory.mktemp("runs")
    common = ("--data", demo / "data", "--bs", 50, "--lr", "1e-3", "--threads", 1)
    run("finetune", *common, "--restore", demo / "model", "--epochs", 0.4, "--output", folder / "dense")
    soft = ("--restore", folder / "dense", "--epochs", 1, "--save-steps", 1, "--lr-threshold", "3e-3")
    run("soft", *common, *soft, "--output", folder / "soft", "--tensorboard", folder / "board")
    lines = (demo / "data" / "dev.jsonl", folder / "answers.jsonl")
    run("predict", "--restore", folder / "soft", "--input", lines[0], "--output", lines[1], "--threads", 1)
    return folder


# ---- inspect ----


def test_examples_agree_with_the_model(hard):
    predictor = Predictor(hard, Process(), 1, None, False)
    records = [("a", {"text": "the road was not excellent at all."}), ("b", {"text": "one", "text_pair": "two"})]
    for example, (ids, segments) in zip(examine(predictor, records), predictor.encode(records)):
        batch = pack([ids], [segments])
        with torch.inference_mode():
            output, dense = predictor.model(*batch), predictor.model(*batch, pruning="none")
        n = len(ids)
        assert example["tokens"] == predictor.tokenizer.tokens(ids) and example["tokens"][0] == "<s>"
        assert [len(layer["alive"]) for layer in example["layers"]] == output.kept[:, 0].tolist()
        assert 0 < len(example["layers"][-1]["alive"]) < n
        there = set(range(n))
        for layer in example["layers"]:  # scores of those that entered, the rule, and the first token
            assert {i for i, score in enumerate(layer["scores"]) if score is not None} == there
            there = {i for i in there if i == 0 or layer["scores"][i] >= layer["threshold"]}
            assert layer["alive"] == sorted(there)
        config = predictor.model.config
        share = macs(config, batch.lengths, output.kept) / macs(config, batch.lengths, dense.kept)
        assert example["relative_flops"] == pytest.approx(share.item()) and example["layers"][0]["relative_flops"] == 1
        for name, out in (("pruned", output), ("dense", dense)):
            assert list(example[name]["probabilities"].values()) == pytest.approx(out.logits.softmax(1)[0].tolist())
            assert example[name]["label"] == config.labels[int(out.logits.argmax())]
    assert [example["text"] for example in examine(predictor, records)] == [
        "the road was not excellent at all.",
        "one / two",
    ]


def test_colour_and_answer():
    assert relative_importance([9.0, 0.04, None, 0.01]) == pytest.approx([1.0, 1.0, 0.0, 0.5])
    assert relative_importance([0.5]) == [1.0]
    assert describe_answer({"label": "score", "score": 2.5}) == "2.500"
    assert describe_answer({"label": "in 1912"}) == "in 1912"


def test_terminal_picture(hard):
    from rich.console import Console

    text = "the road was not excellent"
    result = run("inspect", "--restore", hard, text, "a table").stdout
    example = examine(Predictor(hard, Process(), 1, None, False), [("a", {"text": text})])[0]
    rows = [line.split("│") for line in result.splitlines() if re.match(r" +\d │", line)]
    assert len(rows) == 8
    for row, layer in zip(rows, example["layers"]):
        words = [token if i in layer["alive"] else "·" for i, token in enumerate(example["tokens"])]
        assert row[3].split() == words and int(row[1]) == len(layer["alive"])
        assert float(row[2]) == pytest.approx(layer["relative_flops"], abs=0.006)
    assert "relative FLOPs" in result and "dense" in result

    # With colours a dropped token is there, struck through, and survivors have a background.
    colours = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="truecolor")
    print_example(example, colours)
    coloured = colours.file.getvalue()
    dropped = sum(len(example["tokens"]) - len(layer["alive"]) for layer in example["layers"])
    assert len(re.findall(r"\x1b\[2;9m", coloured)) == dropped > 0
    assert coloured.count("48;2;") == sum(len(layer["alive"]) for layer in example["layers"]) and "·" not in coloured


def test_page_is_one_file_that_holds_the_texts_as_data(hard, tmp_path):
    run("inspect", "--restore", hard, "--html", tmp_path / "p.html", NASTY, "fine")
    html = (tmp_path / "p.html").read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//|@import|url\(", html) and "default-src 'none'" in html
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1]
    assert "<" not in data
    examples = json.loads(data)["examples"]
    assert "".join(examples[0]["tokens"][1:-1]) == NASTY.replace(" ", "") and len(examples) == 2


def test_page_names_are_data_too():
    page_of = page([{"tokens": ["<b>"]}], {"name": "</script><script>alert(1)", "pruning": "hard"})
    assert page_of.count("</script>") == 2 and "alert(1)" in page_of


@pytest.mark.skipif(not chromium.CHROMIUM, reason="no Chromium")
def test_page_in_a_browser(hard, demo, tmp_path):
    file = tmp_path / "p.html"
    run("inspect", "--restore", hard, "--html", file, "the road was not excellent", NASTY, "word " * 300)
    text = "the road was not excellent"
    example = examine(Predictor(hard, Process(), 1, None, False), [("a", {"text": text})])[0]
    with chromium.browser() as b:
        backgrounds = set()
        for width, dark in ((375, False), (375, True), (1200, False), (1200, True)):
            b.open(file, width, 800, dark)
            b.run("choose(2)")  # the longest
            assert b.run("document.documentElement.scrollWidth") <= width
            backgrounds.add(b.run("getComputedStyle(document.body).backgroundColor"))
        assert len(backgrounds) == 2
        # Contrast of the text on the weakest and the strongest colour and on the page, WCAG's 4.5.
        for dark in (False, True):
            b.open(file, 1200, 800, dark)
            b.run("layer = 1; draw()")
            assert b.run(CONTRAST) >= 4.5

        b.open(file, 375, 800)
        shown = "[...at('text').children].map(x => [x.textContent, x.className === 'gone'])"
        assert b.run(shown) == [[token, False] for token in example["tokens"]]
        # By keyboard alone: to the slider, along the layers; then to the tokens and along them.
        b.press("Tab", "Tab")
        assert b.run("document.activeElement.id") == "layer"  # "back" is disabled at the input
        b.press("ArrowRight", "ArrowRight", "ArrowRight")
        alive = example["layers"][2]["alive"]
        assert b.run(shown) == [[token, i not in alive] for i, token in enumerate(example["tokens"])]
        assert b.run("at('state').textContent").startswith(f"After layer 3 of 4: {len(alive)} of")
        b.press("Tab", "Tab", "Home", "ArrowRight", "ArrowUp")
        assert b.run("document.activeElement.textContent") == example["tokens"][1] and b.run("layer") == 2
        assert b.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        cells = b.run("[...at('layers').rows].map(x => x.cells[3].textContent)")
        for layer, cell in zip(example["layers"], cells):
            if layer["scores"][1] is None:
                assert cell == "gone"
            else:
                numbers = [float(x) for x in re.findall(r"[\d.]+(?:e-\d+)?", cell)]
                assert numbers == pytest.approx([layer["scores"][1], layer["threshold"]], rel=0.06)
                assert ("dropped" in cell) == (1 not in layer["alive"])
        assert b.run("[...document.querySelectorAll('input, select')].every(x => x.labels.length)")
        assert b.run("[...document.querySelectorAll('button')].every(x => x.getAttribute('aria-label'))")

        # Text that would be markup stays text; nothing is asked of the network.
        b.run("at('example').value = 1; at('example').dispatchEvent(new Event('change'))")
        words = b.run("[...at('text').children].slice(1, -1).map(x => x.textContent).join('')")
        assert words.replace("␣", "") == NASTY.replace(" ", "")
        assert b.run("document.title") == "Which tokens survive" and not b.run(
            "document.querySelectorAll('img').length"
        )
        assert b.requests == [file.as_uri()] and b.messages == []

        assert b.run("at('answers').children.length") == 2  # a dense model answers once
        run("inspect", "--restore", demo / "model", "--html", file, text)
        b.open(file, 1200, 800)
        assert b.run("at('answers').children.length") == 1


CONTRAST = """(() => {
  const channel = x => (x /= 255) <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
  const light = c => { const k = c.startsWith("color") ? 255 : 1, [r, g, b] = c.match(/[\\d.]+/g).map(x => channel(x * k));
    return .2126 * r + .7152 * g + .0722 * b; };
  const ratio = (a, b) => (Math.max(light(a), light(b)) + .05) / (Math.min(light(a), light(b)) + .05);
  const page = getComputedStyle(document.body).backgroundColor, all = [];
  for (const x of document.querySelectorAll("#text button, .soft, .cut, h1, td")) {
    const style = getComputedStyle(x), own = style.backgroundColor;
    all.push(ratio(style.color, own.endsWith(", 0)") ? page : own));
  }
  return Math.min(...all);
})()"""


def test_inspect_refuses(hard, tmp_path):
    assert "no such model folder" in refused("inspect", "--restore", tmp_path / "x/y/z", "a")
    assert "one --pair for each TEXT" in run("inspect", "--restore", hard, "a", "b", "--pair", "c", code=2).stderr
    assert "could not be written" in refused("inspect", "--restore", hard, "a", "--html", "/proc/none/p.html")


# ---- plot ----


def texts_of(svg: Path) -> set[str]:
    tree = ElementTree.parse(svg)
    return {"".join(node.itertext()).strip() for node in tree.iter("{http://www.w3.org/2000/svg}text")}


def test_plots(runs, demo, tmp_path):
    pytest.importorskip("matplotlib")
    run("eval", "--data", demo / "data", "--restore", runs / "dense", "--json", tmp_path / "plain.json")
    for name, arguments, words in (
        (
            "curves",
            (runs / "soft",),
            {"training loss", "score: accuracy", "relative FLOPs", "thresholds", "layer 4", "step"},
        ),
        ("curves", ("--kind", "curves", runs / "soft", runs / "dense"), {"soft", "dense", "thresholds", "layer"}),
        (
            "tradeoff",
            (runs / "soft", tmp_path / "plain.json"),
            {"soft", "plain", "relative FLOPs (1: the dense model)"},
        ),
        ("lengths", (runs / "answers.jsonl",), {"tokens of the text", "none dropped", "answers"}),
        ("kept", (runs / "answers.jsonl", runs / "soft"), {"answers (median, 5 to 95%)", "soft", "input", "4"}),
    ):
        run("plot", "--output", tmp_path / f"{name}.svg", *arguments)
        assert words <= texts_of(tmp_path / f"{name}.svg"), name
    before = (tmp_path / "kept.svg").read_bytes()
    run("plot", "--output", tmp_path / "kept.svg", *arguments)
    assert (tmp_path / "kept.svg").read_bytes() == before  # the same runs, the same file
    run("plot", "--output", tmp_path / "p.PNG", runs / "soft")
    header = (tmp_path / "p.PNG").read_bytes()[:24]
    assert header.startswith(b"\x89PNG") and int.from_bytes(header[16:20], "big") > 1000


def test_answers_may_hold_any_character(tmp_path):
    answer = {"words": ["a\u2028b\x85"], "tokens": 4, "kept": [3, 2]}
    (tmp_path / "answers.jsonl").write_text(2 * (json.dumps(answer, ensure_ascii=False) + "\n"), encoding="utf-8")
    assert read_runs([tmp_path / "answers.jsonl"])[0].lengths.tolist() == [4, 4]


def test_a_trade_off_is_of_one_task(runs):
    pytest.importorskip("matplotlib")
    from look import plot_tradeoff

    soft, dense = read_runs([runs / "soft", runs / "dense"])
    with pytest.raises(InputError, match="not on MRPC and your own data"):
        plot_tradeoff([soft._replace(task="MRPC"), dense])


def test_plots_show_the_logs_numbers(runs):
    pytest.importorskip("matplotlib")
    from look import plot_curves, plot_kept, plot_lengths, plot_tradeoff

    soft, dense, answers = read_runs([runs / "soft", runs / "dense", runs / "answers.jsonl"])
    log = [json.loads(line) for line in (runs / "soft" / "log.jsonl").read_text().splitlines()[1:-1]]
    panels = plot_curves([soft]).axes
    for panel, key in zip(panels, ("train_loss", "score", "relative_flops")):
        line = panel.lines[0]
        assert list(line.get_xdata()) == [1, 2, 3] and list(line.get_ydata()) == [record[key] for record in log]
    assert [line.get_ydata()[-1] for line in panels[3].lines] == log[-1]["thresholds"]
    start = json.loads((runs / "soft" / "log.jsonl").read_text().splitlines()[0])["thresholds"]
    assert list(panels[3].lines[0].get_xdata()) == [0, 1, 2, 3] and start == pytest.approx(
        [0.0025, 0.005, 0.0075, 0.01]
    )
    assert [line.get_ydata()[0] for line in panels[3].lines] == start
    both = plot_curves([soft, dense]).axes[3].lines
    assert len(both) == 1 and list(both[0].get_ydata()) == log[-1]["thresholds"]

    band, plain = plot_kept([answers, soft]).axes[0].lines
    records = [json.loads(line) for line in (runs / "answers.jsonl").read_text().splitlines()]
    shares = [[k / record["tokens"] for k in record["kept"]] for record in records]
    assert list(band.get_ydata()[1:]) == pytest.approx(np.median(shares, 0))
    assert list(plain.get_ydata()) == [1.0, *log[-1]["kept"]]
    for change, name in (({-1: 2}, "the last layer"), ({2: 2, 3: 1}, "layer 3"), ({0: 1, 1: 1, 2: 1, 3: 1}, "layer 1")):
        kept = answers.kept.copy()
        for l, count in change.items():
            kept[:, l] = count
        panel = plot_lengths([answers._replace(kept=kept)]).axes[0]
        assert panel.collections[0].get_array().sum() == len(records)
        assert panel.get_ylabel() == f"tokens leaving {name}"

    panel = plot_tradeoff([soft, dense]).axes[0]
    points = [(c.lines[0].get_xdata()[0], c.lines[0].get_ydata()[0]) for c in panel.containers]
    assert points[0] == (log[-1]["relative_flops"], log[-1]["metrics"]["accuracy"]) and points[1][0] == 1.0
    assert [c.lines[0].get_color() for c in panel.containers] == list(COLOURS[:2])
    assert natural_kind([soft]) == "curves" and natural_kind([soft, dense]) == "tradeoff"


def test_what_lies_far_below_does_not_stretch_the_frontier():
    pytest.importorskip("matplotlib")
    from look import Run, plot_frontier

    def cell(method: str, share: float, accuracy: float) -> dict:
        record = {"method": method, "relative_flops": share, "distilled": True, "target_flops": share}
        return record | {"metrics": {"accuracy": accuracy}, "examples": 100}

    cells = [cell("dense", 1.0, 0.8), cell("ltp", 0.5, 0.79), cell("manual", 0.5, 0.78), cell("manual", 0.25, 0.1)]
    panel = plot_frontier([Run("task", [], None, cells=cells)]).axes[0]
    drawn = {line.get_label(): list(line.get_ydata()) for line in panel.lines}
    assert drawn["manual thresholds"] == pytest.approx([0.6, 0.78]) and drawn["LTP"] == [0.79]
    assert [text.get_text() for text in panel.texts] == ["0.10 ↓"] and 0.55 < panel.get_ylim()[0] < 0.6
    band = panel.patches[0].get_extents().transformed(panel.transData.inverted())
    assert (band.y0, band.y1) == pytest.approx((0.76, 0.84))  # one standard error of 100 examples


def test_runs_are_named_by_what_differs(runs, tmp_path):
    for place in ("a/hard", "b/hard"):
        shutil.copytree(runs / "soft", tmp_path / place)
    assert [found.name for found in read_runs([tmp_path / "a/hard", tmp_path / "b/hard"])] == ["a/hard", "b/hard"]
    assert read_runs([tmp_path / "a/hard"])[0].name == "hard"


def test_plot_refuses(runs, tmp_path, monkeypatch):
    out = ("--output", tmp_path / "p.svg")
    assert "ends in .png or .svg" in run("plot", "--output", tmp_path / "p.pdf", runs / "soft", code=2).stderr
    assert "no such file or folder" in refused("plot", *out, tmp_path / "absent")
    assert "holds no log.jsonl" in refused("plot", *out, tmp_path)
    for number, content in enumerate(("{", "[]", '{"kept": [1]}', "", '{"a": 1}\n{"b": 2}', "3")):
        (tmp_path / f"{number}.json").write_text(content)
        assert f"{number}.json" in refused("plot", *out, tmp_path / f"{number}.json")
    (tmp_path / "log.jsonl").write_text('{"event": "start"}\n')
    assert "no evaluation yet" in refused("plot", *out, tmp_path)
    assert "pass another --kind" in refused("plot", *out, "--kind", "lengths", runs / "soft")
    assert not (tmp_path / "p.svg").exists()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for kind in ("curves", "kept", "tradeoff"):
        assert refused("plot", *out, "--kind", kind, runs / "soft").endswith("pip install matplotlib")


# ---- TensorBoard ----


def test_tensorboard(runs):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs / "board"))
    events.Reload()
    log = [json.loads(line) for line in (runs / "soft" / "log.jsonl").read_text().splitlines()[1:-1]]
    for name, wanted in (
        ("evaluation/relative_flops", [record["relative_flops"] for record in log]),
        ("evaluation/accuracy", [record["metrics"]["accuracy"] for record in log]),
        ("thresholds/layer_02", [record["thresholds"][1] for record in log]),
        ("kept/layer_04", [record["kept"][3] for record in log]),
        ("train/loss", [record["train_loss"] for record in log]),  # an evaluation every step
    ):
        found = events.Scalars(name)
        assert [event.step for event in found] == [1, 2, 3]
        assert [event.value for event in found] == pytest.approx(wanted, rel=1e-6), name


def test_tensorboard_missing_is_told_before_anything_is_touched(runs, demo, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    options = ("--data", demo / "data", "--restore", demo / "model", "--output", tmp_path / "o", "--tensorboard", "b")
    assert refused("finetune", *options).endswith("pip install tensorboard")
    assert not (tmp_path / "o").exists()


# ---- model card ----


def test_card(runs):
    from huggingface_hub import ModelCard

    card = ModelCard.load(runs / "soft" / "README.md")
    record = json.loads((runs / "soft" / "log.jsonl").read_text().splitlines()[-1])["best"]
    assert card.data.pipeline_tag == "text-classification" and card.data.library_name == "transformers"
    assert {result.metric_name: result.metric_value for result in card.data.eval_results} == {
        name: round(value, 4) for name, value in record["metrics"].items()
    }
    assert MARK in card.text and f"{record['relative_flops']:.3f}" in card.text and "regularization 0.1" in card.text
    for l, (share, threshold) in enumerate(zip(record["kept"], record["thresholds"]), 1):
        assert f"| {l} | {share:.3f} | {threshold:.3g} |" in card.text
    assert "Measured speed" not in card.text and str(runs) not in card.content
    assert "threshold |" not in (runs / "dense" / "README.md").read_text()
    # The two ways to load that it shows.
    run("predict", "--restore", runs / "soft", "a text")
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoModelForSequenceClassification.from_pretrained(runs / "soft").config.num_hidden_layers == 4
    assert len(transformers.AutoTokenizer.from_pretrained(runs / "soft")("a text")["input_ids"]) > 2


def test_bench_adds_to_our_card_and_replaces_what_it_added(runs, demo, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(runs / "soft", folder)
    before = (folder / "README.md").read_text()
    bench = ("bench", "--restore", folder, "--lengths", "5,9", "--examples", 4, "--repeats", 1, "--threads", 1)
    run(*bench)
    assert (folder / "README.md").read_text() == before
    run(*bench, "--card", "--bs", 2, "--json", tmp_path / "b.json")
    speed = json.loads((tmp_path / "b.json").read_text())["speeds"][0]
    text = (folder / "README.md").read_text()
    assert text.startswith(before) and f"| 2 | {1e3 * speed['dense_latency']:.2f} |" in text
    (folder / "README.md").write_text(text + "\n## Mine\n\nstays\n")
    run(*bench, "--card", "--bs", 3)
    text = (folder / "README.md").read_text()
    assert text.count("## Measured speed") == 1 and "| 3 |" in text and "## Mine\n\nstays\n" in text
    (folder / "README.md").write_text("mine")
    assert "is not a card that training wrote" in refused(*bench, "--card")
    assert (folder / "README.md").read_text() == "mine"


def test_training_keeps_a_readme_of_somebody_else_and_renews_ours(runs, demo, tmp_path):
    folder = tmp_path / "dense"
    options = ("--data", demo / "data", "--restore", demo / "model", "--epochs", 0.2, "--output", folder, "--overwrite")
    for text, stays in (("# Mine\n", True), (f"{MARK}\nold", False)):
        folder.mkdir(exist_ok=True)
        (folder / "README.md").write_text(text)
        run("finetune", *options)
        assert ((folder / "README.md").read_text() == text) == stays
    assert "| task | custom |" in (folder / "README.md").read_text()


def test_base_model_is_the_hubs_name_and_goes_from_card_to_card(tmp_path):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    assert base_model(snapshot) == "owner/name" and base_model(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nbase_model: owner/other\n---\n")
    assert base_model(tmp_path) == "owner/other"


# ---- folders of the authors' release, names on the hub ----


def release_folder(folder: Path, case: Path) -> dict:
    """Writes a golden case as the release would: its model type, prefix and per-layer offsets; returns what to expect."""
    folder.mkdir()
    config = json.loads((case / "config.json").read_text())
    config |= {"model_type": "ltp", "architectures": ["LTPForSequenceClassification"], "quant_mode": False}
    (folder / "config.json").write_text(json.dumps(config))
    expected = load_file(case / "expected.safetensors")
    tensors = {re.sub(r"^roberta\.", "ltp.", k): v for k, v in load_file(case / "model.safetensors").items()}
    for l, offset in enumerate(expected["threshold_offset"]):
        tensors[f"ltp.encoder.layer.{l}.attention.self.pruner.keep_threshold"] = offset.clone()
    torch.save(tensors, folder / "pytorch_model.bin")
    return expected


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden values are not beside this checkout")
@pytest.mark.parametrize("case", ["case1", "case2", "case3"])
def test_release_folder_gives_the_releases_logits(case, tmp_path):
    expected = release_folder(tmp_path / "theirs", GOLDEN / case)
    inputs = load_file(GOLDEN / case / "inputs.safetensors")
    batch = pack([ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])])
    model, has_thresholds, notes = load_model(tmp_path / "theirs")
    assert has_thresholds and not notes
    save_model(tmp_path / "ours", model)  # and once more through our own format
    for folder in ("theirs", "ours"):
        model = load_model(tmp_path / folder).model
        torch.testing.assert_close(model.thresholds, expected["thresholds"], atol=1e-7, rtol=0)
        with torch.inference_mode():
            output = model(*batch)
        torch.testing.assert_close(output.logits, expected["hard_logits"], atol=1e-4, rtol=0)
        assert torch.equal(output.kept, expected["hard_kept_ffn"])
    assert "keep_threshold" not in str(load_file(tmp_path / "ours" / "model.safetensors").keys())


def test_damaged_release_folders_are_refused(tmp_path):
    model = small_model(prune_mode="absolute_threshold")
    save_model(tmp_path, model)
    file, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(file)
    del tensors["ltp.thresholds"]
    offsets = {f"roberta.encoder.layer.{l}.attention.self.pruner.keep_threshold": torch.tensor(0.1) for l in range(5)}
    last = list(offsets)[-1]
    for changed, message in (
        ({k: v for k, v in offsets.items() if k != last}, "not one keep_threshold for each layer"),
        (offsets | {last: torch.tensor(float("nan"))}, "is not one finite number"),
        (offsets | {last: torch.zeros(2)}, "is not one finite number"),
    ):
        save_file(tensors | changed, file)
        with pytest.raises(InputError, match=message):
            load_model(tmp_path)
    save_file(tensors | offsets, file)
    wanted = threshold_ladder(config["final_token_threshold"], 5) * 1.0
    assert torch.allclose(load_model(tmp_path).model.thresholds, wanted - wanted[0] + 0.1)
    del config["final_token_threshold"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="final_token_threshold is missing"):
        load_model(tmp_path)


def test_hub_names_with_a_revision(demo, tmp_path, monkeypatch):
    """A cache laid out as the hub's library does, read without a network."""
    from huggingface_hub import constants

    repository = tmp_path / "models--somebody--reviews"
    shutil.copytree(demo / "model", repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "v1.0").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("somebody/reviews@v1.0", f"somebody/reviews@{'a' * 40}"):
        assert load_config(find_model(name)).num_hidden_layers == 4
    with pytest.raises(InputError, match="gave no model of that name [(]"):
        find_model("somebody/reviews")  # there is no main


def test_unknown_hub_names_are_one_line(tmp_path, monkeypatch):
    message = "--restore nobody/nothing@v2: no such folder here, and the hub gave no model of that name and revision"
    with pytest.raises(InputError, match=re.escape(message)):
        find_model("nobody/nothing@v2")
    (tmp_path / "name@v1").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_model("name@v1") == Path("name@v1")  # a folder goes first
    assert find_model("a/b/c@v1") == Path("a/b/c@v1")


# ---- ONNX ----


@pytest.mark.parametrize("norm", ["max_length", "length"])
@pytest.mark.parametrize("mode", [None, "absolute_threshold", "topk"])
def test_the_exported_arithmetic_is_the_models(mode, norm):
    model = small_model(prune_mode=mode, score_norm=norm, token_keep_rate=0.2)
    model.thresholds.data = torch.tensor([0.0, 0.006, 0.007, 0.008, 0.012]) * (3 if norm == "length" else 1)
    dropped = 0
    for ids in [[5], [5, 6], *random_sequences(9, seed=3)]:
        segments = [i % 2 for i in range(len(ids))]
        with torch.inference_mode():
            wanted = model(*pack([ids], [segments]))
            logits, kept = SingleSequence(model)(torch.tensor([ids]), torch.tensor([segments]))
        assert kept.tolist() == wanted.kept[:, 0].tolist()
        torch.testing.assert_close(logits, wanted.logits, atol=1e-5, rtol=0)
        dropped += len(ids) - int(kept[-2])
    assert (dropped > 0) == (mode is not None)


def test_keep_highest_is_keep_topk_of_one_sequence():
    generator = torch.Generator().manual_seed(1)
    for n in (1, 2, 7, 30):
        scores = torch.randint(0, 4, (n,), generator=generator) / 4  # with ties
        for count in range(1, n + 1):
            wanted = keep_topk(scores, torch.tensor([n]), torch.tensor([count]), torch.arange(n) == 0)
            assert keep_highest(scores, torch.tensor(count)).tolist() == wanted.tolist()


def test_onnx_drops_tokens_inside_the_graph(tmp_path):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = small_model(prune_mode="absolute_threshold", num_hidden_layers=2)
    model.thresholds.data = torch.tensor([0.007, 0.012])
    save_model(tmp_path / "m", model)
    result = run("export", "--restore", tmp_path / "m", "--output", tmp_path / "m.onnx")
    assert float(re.search(r"differ by at most (\S+) of", result.output)[1]) < 1e-5
    # Which shapes does the runtime see? The first layer's feed-forward block must get the survivors only.
    graph = onnx.load(tmp_path / "m.onnx")
    assert json.loads(graph.metadata_props[0].value) == ["a", "b", "c"]
    widths = {i.name: i.dims for i in graph.graph.initializer}
    wide = [n for n in graph.graph.node if any(47 in widths.get(name, ()) for name in n.input)]
    graph.graph.output.extend(onnx.ValueInfoProto(name=n.output[0]) for n in wide)
    session = runtime.InferenceSession(graph.SerializeToString())
    for ids in random_sequences(6, seed=2):
        feed = {"input_ids": np.array([ids]), "token_type_ids": np.zeros((1, len(ids)), dtype=np.int64)}
        logits, kept, *inside = session.run(None, feed)
        with torch.inference_mode():
            wanted = model(*pack([ids]))
        np.testing.assert_allclose(logits, wanted.logits, atol=1e-5)
        assert kept.tolist() == wanted.kept[:, 0].tolist()
        rows = [x.shape[-2] for x in inside if x.ndim >= 2 and x.shape[-1] == 47]
        assert set(rows) == {kept[0], 1}  # the last layer computes the first token only
    assert kept[0] < len(ids)
    # A graph of another model is noticed.
    model.thresholds.data = torch.tensor([0.0, 0.012])
    with pytest.raises(InputError, match="differs from the model .* was not written"):
        compare(model, tmp_path / "m.onnx", ["input_ids", "token_type_ids"])


def test_export_refuses(tmp_path, monkeypatch):
    save_model(tmp_path / "m", small_model())
    (tmp_path / "m.onnx").write_text("old")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert refused("export", "--restore", tmp_path / "m", "--output", tmp_path / "m.onnx").endswith(
        "pip install onnx onnxscript"
    )
    assert (tmp_path / "m.onnx").read_text() == "old"


def test_none_of_it_is_needed_to_train():
    wanted = set()
    for name in ("data", "model", "card", "train"):
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            wanted |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            wanted |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    assert "card" in wanted and "safetensors" in wanted
    assert not {name.split(".")[0] for name in wanted} & {"look", "export", "matplotlib", "rich", "onnx", "onnxscript"}
