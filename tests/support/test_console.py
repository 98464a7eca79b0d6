"""Tables and progress as the commands print them."""

from support.console import evaluation_table, quiet, screen, speed_table

RECORD = {"metrics": {"accuracy": 0.91}, "score": 0.875, "gflops": 1.234, "relative_flops": 0.5, "kept": [1.0, 0.25]}


def test_evaluations_stand_side_by_side(capsys):
    evaluation_table([("dense", RECORD), ("[hard]", RECORD | {"speedup": {1: 1.5, 32: 2.0}})])
    lines = capsys.readouterr().out.splitlines()
    header, _, dense, hard = ([cell.strip() for cell in line.replace("┃", "│").split("│")] for line in lines)
    names = ["", "accuracy", "score", "GFLOPs", "rel. FLOPs", "speed at 1", "speed at 32", "kept after each layer"]
    assert header == names
    assert dense == ["dense", "0.9100", "0.8750", "1.23", "0.500", "", "", "1.00 0.25"]
    assert hard == ["[hard]", "0.9100", "0.8750", "1.23", "0.500", "1.50x", "2.00x", "1.00 0.25"]


def test_many_metrics_go_below_the_table(capsys):
    evaluation_table([("eval", RECORD | {"metrics": {f"metric_{i}": i / 10 for i in range(5)}})])
    out = capsys.readouterr().out
    assert "metric_1" in out.splitlines()[0] and "metric_2" not in out.splitlines()[0]
    assert out.splitlines()[-1] == "eval: metric 2 0.2000, metric 3 0.3000, metric 4 0.4000"


def test_speeds_and_their_conditions(capsys):
    speed = {
        "batch_size": 8,
        "latency": 0.5,
        "latency_p95": 0.75,
        "dense_latency": 1.0,
        "dense_latency_p95": 1.25,
        "examples_per_second": 16.0,
        "dense_examples_per_second": 8.0,
        "tokens_per_second": 100.0,
        "speedup": 2.0,
        "flops_reduction": 2.5,
        "done_reduction": 2.25,
        "flops_to_time": 0.8,
    }
    conditions = {
        "checkpoint": "runs/hard",
        "pruning": "hard",
        "examples": 41,
        "data": "dev.jsonl",
        "mean_length": 30.25,
        "length_quantiles": {"50%": 28, "95%": 60},
        "device": "a CPU",
        "precision": "fp32",
        "threads": 1,
        "torch": "2.0",
        "statistic": "median",
        "repeats": 5,
        "peak_memory_bytes": 3 * 2**20,
    }
    speed_table({"speeds": [speed], "conditions": conditions})
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")] for line in out.splitlines() if "│" in line]
    assert rows[0] == ["8", "dense", "1000.00", "1250.00", "8.0", "1.00x", "1.00x", "1.00x", ""]
    assert rows[1] == ["", "pruned", "500.00", "750.00", "16.0", "2.50x", "2.25x", "2.00x", "0.80"]
    told = "runs/hard (hard) on 41 examples of dev.jsonl, 30.2 tokens on average (50% of them at most 28"
    assert told in out and "fp32, 1 threads" in out and out.endswith("3 MiB at the peak\n")


def test_progress_needs_no_terminal(capsys):
    with screen() as (show, progress):
        show("step [1]")
        progress(1, None, loss=0.5, score=None)
        progress(2, 10, loss=0.5)
    quiet("nothing", loss=0.5)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.strip() == "step [1]"
