"""The model card: what it says, and that nobody else's README.md is replaced."""

import json
import shutil

import pytest
from stages import read_records, stage

from runs.card import MARK, add_speed, base_model, check_card, write_card
from support.checkpoint import load_config
from support.errors import InputError


@pytest.fixture(scope="module")
def soft(source, finetuned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "soft"
    stage(source, "soft", finetuned, folder, epochs=0.5, threshold_learning_rate=3e-3)
    return folder


def test_what_a_card_says(soft, finetuned):
    from huggingface_hub import ModelCard

    card = ModelCard.load(soft / "README.md")
    record = read_records(soft)[-1]["best"]
    assert card.data.pipeline_tag == "text-classification" and card.data.library_name == "transformers"
    assert {result.metric_name: result.metric_value for result in card.data.eval_results} == {
        name: round(value, 4) for name, value in record["metrics"].items()
    }
    assert MARK in card.text and f"{record['relative_flops']:.3f}" in card.text and "regularization 0.1" in card.text
    assert "| task | custom |" in card.text and "150 training and 41 evaluation examples" in card.text
    for l, (share, threshold) in enumerate(zip(record["kept"], record["thresholds"]), 1):
        assert f"| {l} | {share:.3f} | {threshold:.3g} |" in card.text
    assert "Measured speed" not in card.text and str(soft) not in card.content
    dense = (finetuned / "README.md").read_text()
    assert "threshold |" not in dense and "It prunes nothing." in dense and "regularization" not in dense
    assert "without pruning, whose scores are not those above:" in card.text and "without pruning:" in dense


def test_the_class_that_a_card_names_opens_the_folder(soft):
    transformers = pytest.importorskip("transformers")
    assert "AutoModelForSequenceClassification.from_pretrained" in (soft / "README.md").read_text()
    assert transformers.AutoModelForSequenceClassification.from_pretrained(soft).config.num_hidden_layers == 4
    assert len(transformers.AutoTokenizer.from_pretrained(soft)("a text")["input_ids"]) > 2


def test_the_cards_of_other_tasks(soft, questions, tmp_path):
    card = (questions.folder / "README.md").read_text()
    assert "question-answering" in card and "exact_match" in card and "type: best" not in card and "windows" in card
    assert "type: rajpurkar/squad_v2" in card and "AutoModelForQuestionAnswering" in card
    header, record = read_records(soft)[:2]
    write_card(
        tmp_path, load_config(soft), header | {"task": "MNLI"}, record | {"metrics": {"accuracy_mismatched": 0.5}}
    )
    card = (tmp_path / "README.md").read_text()
    assert "regularization 0.1" in card and "target_flops" not in card
    assert "GLUE MNLI" in card and "nyu-mll/glue" in card and "| accuracy_mismatched | 0.5000 |" in card


def test_a_card_names_the_target_and_not_a_lambda_that_training_found_itself(soft, tmp_path):
    header, record = read_records(soft)[:2]
    header["settings"]["target_flops"] = 0.5
    write_card(tmp_path, load_config(soft), header, record)
    card = (tmp_path / "README.md").read_text()
    assert "target_flops 0.5, temperature 0.0005" in card and "regularization" not in card


def test_a_readme_of_somebody_else_stays_and_ours_is_renewed(demo, source, tmp_path):
    for name, text, stays in (("a", "# Mine\n", True), ("b", f"{MARK}\nold", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(text)
        stage(source, "finetune", demo / "model", tmp_path / name, epochs=0.2)
        assert ((tmp_path / name / "README.md").read_text() == text) == stays
    assert "| task | custom |" in (tmp_path / "b" / "README.md").read_text()


def test_measured_speed_is_added_and_replaced(soft, tmp_path):
    folder = shutil.copytree(soft, tmp_path / "m")
    before = (folder / "README.md").read_text()
    conditions = {
        "repeats": 3,
        "examples": 9,
        "data": "random tokens",
        "mean_length": 7.0,
        "device": "CPU",
        "threads": 1,
    }
    conditions |= {"precision": "fp32", "torch": "2"}

    def measured(batch_size: int, **more) -> dict:
        row = {"batch_size": batch_size, "model": "dense", "file_bytes": 91e6, "latency": 0.5, "speedup": 1.0}
        row |= {"relative_flops": 1.0, "relative_bops": 1.0}
        pruned = {"model": "pruned", "latency": 0.25, "speedup": 2.0, "relative_flops": 0.4, "relative_bops": 0.4}
        return {"rows": [row, row | pruned | more], "conditions": conditions}

    add_speed(folder, measured(2))
    text = (folder / "README.md").read_text()
    assert text.startswith(before) and "| 2 | pruned | 91.0 | 250.00 | 2.00x | 2.50x |\n" in text
    assert "| 2 | dense | 91.0 | 500.00 | 1.00x | 1.00x |\n" in text and "BOPs" not in text
    assert "Medians of 3 passes over 9 examples" in text
    (folder / "README.md").write_text(text + "\n## Mine\n\nstays\n")
    add_speed(folder, measured(3))
    text = (folder / "README.md").read_text()
    assert text.count("## Measured speed") == 1 and "| 3 |" in text and "| 2 | dense" not in text
    assert "## Mine\n\nstays\n" in text
    add_speed(folder, measured(3, model="int8.onnx", relative_bops=0.025))
    text = (folder / "README.md").read_text()
    assert "relative BOPs |\n" in text and "| 3 | int8.onnx | 91.0 | 250.00 | 2.00x | 2.50x | 0.025 |\n" in text
    (folder / "README.md").write_text("mine")
    with pytest.raises(InputError, match="has no README.md that training wrote"):
        add_speed(folder, measured(2))
    assert (folder / "README.md").read_text() == "mine"
    (folder / "README.md").unlink()
    with pytest.raises(InputError, match="has no README.md that training wrote"):
        check_card(folder)


def test_the_base_model_is_the_hubs_name_and_goes_from_card_to_card(soft, source, tmp_path):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    assert base_model(snapshot) == "owner/name" and base_model(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nbase_model: owner/other\n---\n")
    assert base_model(tmp_path) == "owner/other"
    shutil.copytree(soft, snapshot)
    stage(source, "hard", snapshot, tmp_path / "hard", epochs=0.1)
    assert base_model(tmp_path / "hard") == "owner/name"
    assert json.loads((tmp_path / "hard" / "log.jsonl").read_text().splitlines()[0])["restore"] == str(snapshot)
