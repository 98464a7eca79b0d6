"""A run's folder: what lies in it, what may be replaced, and which runs may go on."""

import json
import re
import shutil

import pytest
from stages import read_records, stage

from runs.folder import (
    append,
    check_output,
    check_same_run,
    clear_output,
    clear_states,
    finished,
    load_state,
    read_log,
    save_state,
)
from support.checkpoint import load_model
from support.errors import InputError
from support.settings import Settings

START = ("event", "stage", "task", "data", "dev_data", "restore", "distill", "distill_data", "content")
START += (
    "final_token_threshold",
    "token_keep_rate",
    "keep_rates",
    "score_norm",
    "max_seq_length",
    "protect_question",
    "read_dropped",
    "columns",
    "regression",
    "pruning",
    "settings",
)
START += ("examples", "unlabelled", "precision", "steps", "thresholds", "processes", "device", "torch", "machine")
EVALUATION = ("event", "step", "epoch", "train_loss", "metrics", "score", "loss", "examples", "gflops", "dense_gflops")
EVALUATION += (
    "relative_flops",
    "relative_bops",
    "kept",
    "seconds",
    "examples_per_second",
    "thresholds",
    "elapsed",
    "saved",
)


@pytest.fixture(scope="module")
def soft(source, finetuned, tmp_path_factory):
    """A run with an evaluation every step, and its event files."""
    folder = tmp_path_factory.mktemp("folder")
    pytest.importorskip("tensorboard")
    from runs.stage import StageRequest, run_stage

    lines, states = [], []
    settings = Settings(batch_size=50, epochs=1.0, save_steps=1, threshold_learning_rate=3e-3, learning_rate=1e-3)
    request = StageRequest("soft", finetuned, source, settings, output=folder / "soft", tensorboard=folder / "board")
    run_stage(request, show=lines.append, progress=lambda **state: states.append(state))
    return folder, lines, states


def test_the_folder_and_its_log(finetuned):
    names = {"README.md", "config.json", "model.safetensors", "vocab.json", "merges.txt", "log.jsonl"}
    assert {path.name for path in finetuned.iterdir()} == names
    start, evaluation, end = read_records(finetuned)
    assert tuple(start) == START and tuple(evaluation) == EVALUATION and list(end) == ["event", "best"]
    assert [start["event"], evaluation["event"], end["event"]] == ["start", "evaluation", "end"]
    assert start["settings"] == vars(Settings(learning_rate=1e-3, epochs=1.0, batch_size=16, load_best=False))
    assert start["pruning"] == "none" and start["thresholds"] is None and start["steps"] == 10
    assert end["best"] | {"saved": True} == evaluation == finished(finetuned / "log.jsonl") | {"saved": True}
    assert load_model(finetuned).model.config.labels == ("negative", "positive")


def test_soft_training_also_logs_its_masks(soft):
    folder, lines, states = soft
    start, *evaluations, _ = read_records(folder / "soft")
    added = ("soft_relative_flops", "lambda")
    assert tuple(evaluations[0]) == (*EVALUATION[:4], *added, *EVALUATION[4:])
    assert start["pruning"] == "soft" and len(start["thresholds"]) == 4
    assert [state["step"] for state in states] == [1, 2, 3] and states[0].keys() == states[2].keys()
    assert states[0]["score"] is None and states[2]["score"] in [r["score"] for r in evaluations]
    assert states[2]["flops"] in [r["relative_flops"] for r in evaluations] and states[0]["steps"] == 3
    shown = [line for line in lines if line.startswith("epoch ")]
    assert len(shown) == 3 and shown[0].startswith(f"epoch 0.33  loss {evaluations[0]['train_loss']:.4f}  accuracy ")


def test_tensorboard(soft):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _, _ = soft
    events = EventAccumulator(str(folder / "board"))
    events.Reload()
    log = read_records(folder / "soft")[1:-1]
    for name, expected in (
        ("evaluation/relative_flops", [record["relative_flops"] for record in log]),
        ("evaluation/accuracy", [record["metrics"]["accuracy"] for record in log]),
        ("thresholds/layer_02", [record["thresholds"][1] for record in log]),
        ("kept/layer_04", [record["kept"][3] for record in log]),
        ("train/loss", [record["train_loss"] for record in log]),  # an evaluation every step
        ("train/learning_rate", [1e-3, 1e-3 * 2 / 3, 1e-3 / 3]),
    ):
        scalars = events.Scalars(name)
        assert [event.step for event in scalars] == [1, 2, 3]
        assert [event.value for event in scalars] == pytest.approx(expected, rel=1e-6), name


def test_a_folder_with_a_run_is_refused_and_overwritten_on_demand(finetuned, tmp_path):
    with pytest.raises(InputError, match="already holds a run; choose another, or pass --resume"):
        check_output(finetuned, overwrite=False, resume=False)
    check_output(finetuned, overwrite=True, resume=False)
    check_output(finetuned, overwrite=False, resume=True)
    check_output(tmp_path / "new", overwrite=False, resume=False)
    (tmp_path / "config.json").write_text("{}")
    for resume in (False, True):
        with pytest.raises(InputError, match="holds config.json and is no run to resume"):
            check_output(tmp_path, overwrite=False, resume=resume)
    with pytest.raises(InputError, match="is a file; name a folder"):
        check_output(tmp_path / "config.json", overwrite=True, resume=False)


def test_clearing_a_folder_leaves_what_is_not_the_runs(finetuned, tmp_path):
    folder = shutil.copytree(finetuned, tmp_path / "run")
    (folder / "mine.txt").write_text("keep me")
    (folder / "hard").mkdir()
    (folder / "resume").mkdir()
    (folder / "resume" / "step-000000018-0123456789abcdef.pt").write_bytes(b"late")
    (folder / ".model.safetensors.a1b2c3d4").write_bytes(b"half")
    clear_output(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["hard", "mine.txt"]
    (folder / "README.md").write_text("somebody else's")
    clear_output(folder)
    assert (folder / "README.md").exists()


# ---- states ----


def state(step: int) -> dict:
    return {"step": step, "losses": [0.5] * step}


def test_the_last_two_states_stay_and_a_damaged_one_is_passed_over(tmp_path):
    for step in (3, 6, 9):
        save_state(tmp_path, state(step))
    files = sorted(tmp_path.iterdir())
    assert [path.name.split("-")[1] for path in files] == ["000000006", "000000009"]
    lines = []
    assert load_state(tmp_path, lines.append) == state(9) and not lines
    content = bytearray(files[1].read_bytes())
    content[len(content) // 2] ^= 1
    files[1].write_bytes(content)
    assert load_state(tmp_path, lines.append) == state(6)
    assert lines == [f"note: {files[1]} is damaged; trying the one before it"]
    files[0].write_bytes(files[0].read_bytes()[:100])
    assert load_state(tmp_path, lines.append) is None and load_state(tmp_path / "none", lines.append) is None


def test_clearing_states_keeps_the_users_own_files(tmp_path):
    save_state(tmp_path / "resume", state(3))
    own = [tmp_path / "resume" / name for name in ("notes.txt", "step-100.pt")]
    for path in own:
        path.write_text("the user's own")
    clear_states(tmp_path)
    assert sorted((tmp_path / "resume").iterdir()) == own
    for path in own:
        path.unlink()
    clear_states(tmp_path)
    assert not (tmp_path / "resume").exists()


# ---- the log ----


def header(**changes) -> dict:
    return {"stage": "soft", "precision": "fp32", "settings": vars(Settings()) | changes}


def write_log(folder, *records) -> None:
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_run_goes_on_with_its_own_settings_only(tmp_path):
    log = tmp_path / "log.jsonl"
    check_same_run(log, header())  # nothing there
    write_log(tmp_path, {"event": "start"} | header())
    check_same_run(log, header())
    check_same_run(log, header() | {"regression": False})  # which the log does not know yet
    message = "the run was started with learning_rate = 2e-05, not 0.1; use the same options"
    with pytest.raises(InputError, match=message):
        check_same_run(log, header(learning_rate=0.1))
    with pytest.raises(InputError, match="started with stage = soft, not hard"):
        check_same_run(log, header() | {"stage": "hard"})
    write_log(tmp_path, {"event": "start", "stage": "soft", "precision": "fp32"})
    with pytest.raises(InputError, match="started with learning_rate = None"):
        check_same_run(log, header())
    content = {"data": None, "restore": "1", "tokenizer": "2"}
    write_log(tmp_path, {"event": "start", "content": content, "data": "None", "restore": "a"} | header())
    with pytest.raises(InputError, match="the run was started without --data; give it the same again"):
        check_same_run(log, header() | {"content": content | {"data": "3"}})
    with pytest.raises(InputError, match="started with a model of other content, --restore a; give it the same again"):
        check_same_run(log, header() | {"content": content | {"restore": "3"}})
    log.write_text('{"event": "sta')
    with pytest.raises(InputError, match="damaged; pass --overwrite to start again, or choose another"):
        check_same_run(log, header())


@pytest.mark.parametrize("value", [0, 0.0, False, None])
def test_a_setting_of_another_version_that_was_off_changes_nothing(tmp_path, value):
    write_log(tmp_path, {"event": "start"} | header(mask_floor=value))
    check_same_run(tmp_path / "log.jsonl", header())
    with pytest.raises(InputError, match="was started with learning_rate = 2e-05, not 0.1"):
        check_same_run(tmp_path / "log.jsonl", header(learning_rate=0.1))


@pytest.mark.parametrize("value", [0.02, True])
def test_a_run_of_another_version_is_not_misread(tmp_path, value):
    write_log(tmp_path, {"event": "start"} | header(mask_floor=value))
    with pytest.raises(InputError) as caught:
        check_same_run(tmp_path / "log.jsonl", header())
    assert f"started by another version, with mask_floor = {value}, which" in str(caught.value)
    assert "\n" not in str(caught.value) and "--overwrite" in str(caught.value)


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
    write_log(tmp_path, {"event": "start"}, {"event": "evaluation", "step": 3})
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"event": "end", "be')
    lines = list(read_log(log))
    assert [record["event"] for _, record in lines] == ["start", "evaluation"]
    assert "".join(line for line, _ in lines) == log.read_text()[: -len('{"event": "end", "be')]
    assert finished(log) is None and finished(tmp_path / "none") is None
    write_log(tmp_path, {"event": "start"}, {"event": "end", "best": {"step": 3}})
    assert finished(log) == {"step": 3}


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(demo, source, tmp_path):
    """The learning rate rises over all steps: the first evaluations are fine, and a later step is not."""
    rising = {"learning_rate": 1e20, "warmup": 1.0, "save_steps": 1}
    with pytest.raises(
        InputError, match=r"step \d: the loss is not finite any more; lower the learning rate. "
    ) as caught:
        stage(source, "finetune", demo / "model", tmp_path / "a", **rising)
    where = "No checkpoint was saved yet"
    if len(read_records(tmp_path / "a")) > 1:
        where = f"The last good checkpoint is in {tmp_path / 'a'}"
        assert load_model(tmp_path / "a").model.config.labels == ("negative", "positive")
    assert str(caught.value).endswith(where)


def test_state_checkpoint_card_and_log_are_there_when_an_evaluation_is_shown(source, finetuned, tmp_path):
    """A kill at any moment leaves a state from before the log's last evaluation, which is then made again."""
    steps = []

    def show(line):
        if line.startswith("epoch "):
            record = read_records(tmp_path)[-1]
            steps.append(record["step"])
            assert record["saved"] and load_model(tmp_path).model.thresholds.tolist() == record["thresholds"]
            assert f"step {record['step']} |" in (tmp_path / "README.md").read_text()
            saved = [int(path.name.split("-")[1]) for path in sorted((tmp_path / "resume").glob("step-*.pt"))]
            assert saved == steps[-2:]

    stage(source, "soft", finetuned, tmp_path, show=show, save_steps=2, epochs=0.6, threshold_learning_rate=1e-3)
    assert steps == [2, 4, 6] and not (tmp_path / "resume").exists()


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    log = tmp_path / "missing" / "log.jsonl"
    with pytest.raises(InputError, match=re.escape(f"{log}: could not be written (")):
        append(log, {"event": "end"})
