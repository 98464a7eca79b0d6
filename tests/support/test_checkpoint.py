"""Model folders, whole and damaged: weights, the authors' release, the hub, heads, and what is refused."""

import errno
import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from folders import hugging_face, release_folder
from safetensors.torch import load_file, save_file
from small_models import small_model

from model import Hard, Model, pack, threshold_ladder
from support.checkpoint import check_config, find_model, load_config, load_model, save_model
from support.errors import InputError

GOLDEN = [Path(__file__).parents[1] / "golden" / "case1"]
if "LTP_GOLDEN" in os.environ:  # a folder of more cases
    GOLDEN = sorted(path for path in Path(os.environ["LTP_GOLDEN"]).iterdir() if path.is_dir())

# ---- files of weights ----


def test_sharded_and_pickled_folders(tmp_path):
    theirs = hugging_face("roberta", tmp_path / "one")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    (tmp_path / "pickle").mkdir()
    shutil.copy(tmp_path / "one" / "config.json", tmp_path / "pickle")
    torch.save(theirs.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    one = load_model(tmp_path / "one").model.state_dict()
    for name in ("shards", "pickle"):
        other = load_model(tmp_path / name).model.state_dict()
        assert all(torch.equal(one[key], other[key]) for key in one)
    next((tmp_path / "shards").glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match="not found, though model.safetensors.index.json names it"):
        load_model(tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InputError, match="not a shard index"):
        load_model(tmp_path / "shards")


def test_a_pickle_cannot_run_code(tmp_path):
    class Bad:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    hugging_face("roberta", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"x": Bad()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin: damaged"):
        load_model(tmp_path)
    assert not (tmp_path / "ran").exists()
    torch.save({"x": 1}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="holds more than named tensors"):
        load_model(tmp_path)


def test_old_names_of_norms(tmp_path):
    model = small_model()
    save_model(tmp_path, model)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {re.sub(r"LayerNorm\.\w+$", lambda m: old[m[0]], name): tensor for name, tensor in tensors.items()}
    assert len(set(renamed) - set(tensors)) == 2 * (1 + 2 * 5)
    save_file(renamed, tmp_path / "model.safetensors")
    again = load_model(tmp_path).model
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


# ---- the authors' release ----


@pytest.mark.parametrize("case", GOLDEN, ids=lambda path: path.name)
def test_release_folder_gives_the_releases_logits(case, tmp_path):
    expected = release_folder(tmp_path / "theirs", case)
    inputs = load_file(case / "inputs.safetensors")
    batch = pack([ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])])
    model, has_thresholds, notes = load_model(tmp_path / "theirs")
    assert has_thresholds and not notes
    save_model(tmp_path / "ours", model)  # and once more through our own format
    for folder in ("theirs", "ours"):
        model = load_model(tmp_path / folder).model
        thresholds = expected["thresholds"].clamp(min=1e-5)
        torch.testing.assert_close(model.thresholds, thresholds, atol=1e-7, rtol=0)
        with torch.inference_mode():
            output = model(batch)
        torch.testing.assert_close(output.logits, expected["hard_logits"], atol=1e-4, rtol=0)
        assert torch.equal(output.kept, expected["hard_kept_ffn"])
    assert "keep_threshold" not in str(load_file(tmp_path / "ours" / "model.safetensors").keys())


def release_tensors(folder: Path, offset: float) -> tuple[dict, dict]:
    """A small model's tensors, and the release's thresholds of its five layers with the same offset everywhere."""
    save_model(folder, small_model())
    names = [f"roberta.encoder.layer.{l}.attention.self.pruner.keep_threshold" for l in range(5)]
    return load_file(folder / "model.safetensors"), {name: torch.tensor(offset) for name in names}


def test_thresholds_of_the_release_by_hand(tmp_path):
    for offset, expected in (
        (0.1, [0.1, 0.102, 0.104, 0.106, 0.108]),
        (-0.004, [1e-5, 1e-5, 1e-5, 0.002, 0.004]),  # the release prunes below max(1e-5, θ)
    ):
        tensors, offsets = release_tensors(tmp_path, offset)
        save_file(tensors | offsets, tmp_path / "model.safetensors")
        loaded = load_model(tmp_path)
        assert loaded.has_thresholds
        torch.testing.assert_close(loaded.model.thresholds.data, torch.tensor(expected), atol=1e-7, rtol=0)


def test_damaged_release_folders_are_refused(tmp_path):
    tensors, offsets = release_tensors(tmp_path, 0.1)
    file, last = tmp_path / "model.safetensors", list(offsets)[-1]
    for changed, message in (
        ({k: v for k, v in offsets.items() if k != last}, "not one keep_threshold for each layer"),
        (offsets | {last: torch.tensor(float("nan"))}, "is not one finite number"),
        (offsets | {last: torch.zeros(2)}, "is not one finite number"),
    ):
        save_file(tensors | changed, file)
        with pytest.raises(InputError, match=message):
            load_model(tmp_path)
    save_file(tensors | offsets, file)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["final_token_threshold"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="final_token_threshold is missing"):
        load_model(tmp_path)


# ---- names on the hub ----


def test_hub_names_with_a_revision(tmp_path, monkeypatch):
    """A cache laid out as the hub's library does, read without a network."""
    from huggingface_hub import constants

    repository = tmp_path / "models--somebody--reviews"
    save_model(repository / "snapshots" / ("a" * 40), small_model())
    (repository / "refs").mkdir()
    (repository / "refs" / "v1.0").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("somebody/reviews@v1.0", f"somebody/reviews@{'a' * 40}"):
        assert load_config(find_model(name)).num_hidden_layers == 5
    with pytest.raises(InputError, match="cannot be reached$"):
        find_model("somebody/reviews")  # there is no main


def test_unknown_hub_names_are_one_line(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = "--restore nobody/nothing@v2: no such folder here, nor a copy of it from the hub, which cannot be reached"
    with pytest.raises(InputError, match=re.escape(message)):
        find_model("nobody/nothing@v2")
    with pytest.raises(InputError, match="^--distill nobody/nothing: no such folder"):
        find_model("nobody/nothing", "--distill")
    (tmp_path / "name@v1").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_model("name@v1") == Path("name@v1")  # a folder goes first
    assert find_model("a/b/c@v1") == Path("a/b/c@v1")


def test_a_full_disk_below_the_cache_of_the_hub_is_named(tmp_path, monkeypatch):
    def download(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=f"{tmp_path}: could not be written .*; free some space there"):
        find_model("somebody/reviews")


# ---- saving and heads ----


def test_a_graph_beside_the_weights_is_not_taken_for_the_model(tmp_path):
    save_model(tmp_path, small_model())
    (tmp_path / "model.onnx").write_text("another program's, or an export into the checkpoint's folder")
    assert isinstance(load_model(tmp_path).model, Model)


def test_saving_gives_back_everything(tmp_path):
    model = small_model(prune_mode="absolute_threshold", other={"my_key": [1, 2]}, labels=("ä", "b", "c"))
    model.thresholds.data = threshold_ladder(0.02, 5)
    save_model(tmp_path / "new", model)
    again = load_model(tmp_path / "new")
    assert again.has_thresholds and not again.notes and not again.model.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.model.state_dict().values()))
    written = json.loads((tmp_path / "new" / "config.json").read_text(encoding="utf-8"))
    assert written["my_key"] == [1, 2] and written["prune_mode"] == "absolute_threshold"
    assert isinstance(again.model.pruner(), Hard) and again.model.config.labels == ("ä", "b", "c")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["config.json", "model.safetensors"]
    assert [name for name, p in again.model.named_parameters() if not p.requires_grad] == ["thresholds"]


def test_the_plain_reader_and_writer_agree_with_the_strict_ones(tmp_path):
    model = small_model(prune_mode="absolute_threshold")
    model.save(tmp_path / "plain")
    save_model(tmp_path / "strict", model)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "strict" / name).read_bytes()
    plain, strict = Model.load(tmp_path / "strict"), load_model(tmp_path / "strict").model
    assert plain.config == strict.config
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), strict.state_dict().values()))


def test_changes_of_the_configuration(tmp_path):
    save_model(tmp_path, small_model())
    loaded = load_model(tmp_path, prune_mode="absolute_threshold", final_token_threshold=0.05)
    assert not loaded.has_thresholds and loaded.model.config.prune_mode == "absolute_threshold"
    assert torch.equal(loaded.model.thresholds, threshold_ladder(0.05, 5))


def test_a_new_head_leaves_the_old_heads_map_of_dropped_tokens_behind(tmp_path):
    save_model(tmp_path, small_model(read_dropped=True))
    assert load_model(tmp_path).model.head.dropped.all()
    assert not load_model(tmp_path, ("p", "q"), new_head=True).model.head.dropped.any()
    tagger = load_model(tmp_path, ("p", "q"), new_head=True, head="token").model
    assert not hasattr(tagger.head, "dropped")


def test_a_lost_map_of_dropped_tokens_is_told(tmp_path):
    save_model(tmp_path, small_model(read_dropped=True))
    assert not load_model(tmp_path).notes and not load_model(tmp_path, read_dropped=False).notes
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["ltp.dropped"]  # as `transformers` leaves it out of what it saves
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path)
    assert loaded.notes == ["the folder has no map of dropped tokens (ltp.dropped): it starts at 0"]
    assert not loaded.model.head.dropped.any()


def test_new_head_when_the_number_of_classes_changes(tmp_path):
    save_model(tmp_path, small_model())
    loaded = load_model(tmp_path, labels=("p", "q"), new_head=True)
    assert "the folder's has 3 outputs" in loaded.notes[0] and loaded.model.head.output.out_features == 2
    assert "for a, b, c now stands for x, y, z" in load_model(tmp_path, labels=("x", "y", "z")).notes[0]
    assert not load_model(tmp_path, labels=("a", "b", "c")).notes
    with pytest.raises(InputError, match="has 3 outputs, not 2; fine-tune this model"):
        load_model(tmp_path, labels=("p", "q"))


def test_a_head_with_the_labels_in_another_order_is_permuted(tmp_path):
    model = small_model(labels=("CONTRADICTION", "NEUTRAL", "ENTAILMENT"))
    save_model(tmp_path, model)
    again, _, notes = load_model(tmp_path, ("entailment", "neutral", "contradiction"))
    assert torch.equal(again.head.output.weight, model.head.output.weight[[2, 1, 0]]) and not notes
    assert torch.equal(again.head.output.bias, model.head.output.bias[[2, 1, 0]])


def test_labels_that_differ_in_case_keep_their_rows(tmp_path):
    model = small_model(head="token", labels=("O", "b", "B"))
    save_model(tmp_path, model)
    for labels in (None, ("O", "b", "B")):
        assert load_model(tmp_path, labels).model.head.output.weight.equal(model.head.output.weight)
    assert load_model(tmp_path, ("B", "O", "b")).model.head.output.weight.equal(model.head.output.weight[[2, 0, 1]])


def test_another_kind_of_head_is_new_where_asked_for_and_an_error_elsewhere(tmp_path):
    save_model(tmp_path, small_model())
    with pytest.raises(InputError, match="the token head .* is missing; fine-tune"):
        load_model(tmp_path, ("O", "B-X", "I-X"), head="token")
    for head, labels in (("token", ("O", "B-X", "I-X")), ("span", ("start", "end"))):
        loaded = load_model(tmp_path, labels, new_head=True, head=head)
        assert f"the {head} head is new" in loaded.notes[0]
        assert loaded.model(pack([[5, 6, 7]])).logits.shape == (3, len(labels))
        save_model(tmp_path / head, loaded.model)
        assert load_config(tmp_path / head).head == head and load_config(tmp_path / head).labels == labels
    # A span model of another program has no max_seq_length: windows then have 384 tokens, or as many as fit.
    raw = json.loads((tmp_path / "span" / "config.json").read_text())
    del raw["max_seq_length"]
    assert check_config(raw).max_seq_length == check_config(raw).max_tokens < 384
    assert check_config(raw | {"max_position_embeddings": 514}).max_seq_length == 384


# ---- refusing ----


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2'"),
        ({"model_type": ["bert"]}, "model_type"),
        ({"quant_mode": True}, "quant_mode = True: integer-only inference is not implemented"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"problem_type": "multi_label_classification"}, "problem_type"),
        ({"hidden_act": "silu"}, "hidden_act"),
        ({"hidden_act": None}, "hidden_act"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 31}, "hidden_size = 31: not a multiple of num_attention_heads = 3"),
        ({"vocab_size": "83"}, "vocab_size"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"pad_token_id": 83}, "pad_token_id"),
        ({"max_position_embeddings": 3}, "max_position_embeddings = 3: leaves no room"),
        ({"prune_mode": "other"}, "prune_mode"),
        ({"prune_mode": ["topk"]}, "prune_mode"),
        ({"score_norm": "sum"}, "score_norm"),
        ({"protect_question": 1}, "protect_question"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob = 1.5: expected a number from 0 to 1"),
        ({"keep_rates": [1.0, 0.5]}, r"keep_rates = \[1.0, 0.5\]: expected a number from 0 to 1 for each layer"),
        ({"keep_rates": [2.0] * 5}, "for each layer"),
        ({"token_keep_rate": 2}, "token_keep_rate = 2: expected a number of at most 1"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label"),
        ({"id2label": {}}, "id2label"),
        ({"id2label": {"0": "a", "1": "a", "2": "b"}}, "id2label"),
        ({"id2label": ["a", "b", "c"]}, "id2label"),
        ({"id2label": None, "num_labels": 0}, "num_labels"),
        ({"final_token_threshold": "x"}, "final_token_threshold = 'x': expected a number$"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"layer_norm_eps": -1}, "layer_norm_eps"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps"),
    ],
)
def test_refused_configurations_name_file_and_key(tmp_path, change, message):
    save_model(tmp_path, small_model())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=f"config.json: .*{message}"):
        load_model(tmp_path)


def test_values_that_mean_the_default(tmp_path):
    save_model(tmp_path, small_model())
    raw = json.loads((tmp_path / "config.json").read_text())
    absent = check_config({key: value for key, value in raw.items() if key != "pad_token_id"})
    assert check_config(raw | {"pad_token_id": None}).pad_token_id == absent.pad_token_id == 1
    assert check_config(raw | {"classifier_dropout": None, "is_decoder": None}).classifier_dropout is None
    threshold = check_config(raw | {"final_token_threshold": 1}).final_token_threshold
    assert threshold == 1 and isinstance(threshold, float)
    without_names = check_config(raw | {"id2label": None, "num_labels": 2})
    assert without_names.labels == ("LABEL_0", "LABEL_1")
    for architectures in (None, [], {}, "RobertaForTokenClassification", [1], [None]):
        assert check_config(raw | {"architectures": architectures}).head == "sequence"


def test_missing_keys_files_and_damaged_ones(tmp_path):
    with pytest.raises(InputError, match="no such model folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(InputError, match="config.json: not found"):
        load_model(tmp_path)
    save_model(tmp_path, small_model())
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    whole = json.loads(config.read_text())
    config.write_text(json.dumps({k: v for k, v in whole.items() if k != "vocab_size"}))
    with pytest.raises(InputError, match="the key vocab_size is missing"):
        load_model(tmp_path)
    for text, message in (
        ("{", "not readable as JSON"),
        ("[]", "expected a JSON object"),
        ("[" * 10**5, "not readable"),
    ):
        config.write_text(text)
        with pytest.raises(InputError, match=message):
            load_model(tmp_path)
    config.write_text(json.dumps(whole))
    content = weights.read_bytes()
    for damaged in (content[: len(content) // 2], b"", content[:7], b"\xff" * 100):
        weights.write_bytes(damaged)
        with pytest.raises(InputError, match="model.safetensors: damaged"):
            load_model(tmp_path)
    weights.unlink()
    with pytest.raises(InputError, match="no weights"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "edit, message",
    [
        (
            lambda t: t.pop("roberta.encoder.layer.2.attention.self.key.bias"),
            "layer.2.attention.self.key.bias is missing",
        ),
        (lambda t: t.update({"roberta.encoder.layer.9.extra": torch.zeros(2)}), "layer.9.extra is not part"),
        (
            lambda t: t.update({"classifier.dense.weight": torch.zeros(30, 29)}),
            r"classifier.dense.weight has shape \(30, 29\), but config.json asks for \(30, 30\)",
        ),
        (lambda t: t.update({"classifier.out_proj.bias": torch.zeros(3).int()}), "is of type torch.int32"),
        (lambda t: t.update({"ltp.thresholds": torch.zeros(4)}), r"ltp.thresholds has shape \(4,\)"),
        (lambda t: t["ltp.thresholds"].fill_(float("nan")), "ltp.thresholds holds values that are not finite"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, edit, message):
    save_model(tmp_path, small_model(prune_mode="absolute_threshold"))
    tensors = load_file(tmp_path / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        load_model(tmp_path)


JUNK = [None, "", "x", -1, 0, 1.5, 10**30, [], {}, [1], {"0": 1}, True, float("nan"), "7", -(10**400)]


def test_any_junk_in_a_configuration_is_refused_or_gives_a_model(tmp_path):
    save_model(tmp_path, small_model(prune_mode="absolute_threshold"))
    path, whole = tmp_path / "config.json", json.loads((tmp_path / "config.json").read_text())
    generator, refused = random.Random(0), 0
    for _ in range(150):
        key, value = generator.choice(sorted(whole)), generator.choice(JUNK)
        path.write_text(json.dumps(whole | {key: value}))
        try:
            model = load_model(tmp_path).model
        except InputError as error:
            assert str(tmp_path) in str(error), (key, value)
            refused += 1
        else:
            save_model(tmp_path / "again", model)
            assert load_model(tmp_path / "again").model.config.to_dict() == model.config.to_dict(), (key, value)
    assert refused > 50
