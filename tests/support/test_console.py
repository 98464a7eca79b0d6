"""Tables and progress as the commands print them."""

from support.console import evaluation_table, quiet, screen, speed_table

RECORD = {"metrics": {"accuracy": 0.91}, "score": 0.875, "gflops": 1.234, "relative_flops": 0.5, "kept": [1.0, 0.25]}


def test_evaluations_stand_side_by_side(capsys):
    evaluation_table([("dense", RECORD), ("[:heart:]", RECORD | {"speedup": {1: 1.5, 32: 2.0}})])
    lines = capsys.readouterr().out.splitlines()
    header, _, dense, hard = ([cell.strip() for cell in line.replace("┃", "│").split("│")] for line in lines)
    names = ["", "accuracy", "score", "GFLOPs", "rel. FLOPs", "speed at 1", "speed at 32", "kept after each layer"]
    assert header == names
    assert dense == ["dense", "0.9100", "0.8750", "1.23", "0.500", "", "", "1.00 0.25"]
    assert hard == ["[:heart:]", "0.9100", "0.8750", "1.23", "0.500", "1.50x", "2.00x", "1.00 0.25"]


def test_no_number_is_cut_off(capsys, monkeypatch):
    names, shares = [f"ltp-target-flops-0.{i}-distilled" for i in range(2)], [i / 100 for i in range(24)]
    rows = [(name, RECORD | {"speedup": {1: 1.5, 32: 2.0}, "kept": shares}) for name in names]
    evaluation_table(rows)  # into a pipe: a row is a line
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert "speed at 32" in header and len(lines) == 2
    assert all(line.startswith(name) and line.endswith("0.21 0.22 0.23") for name, line in zip(names, lines))
    monkeypatch.setenv("FORCE_COLOR", "1")  # which rich takes for a terminal
    for width in ("40", "140"):
        monkeypatch.setenv("COLUMNS", width)
        evaluation_table(rows)
        out = capsys.readouterr().out
        assert "…" not in out and all(text in out for text in (*names, "0.9100", "2.00x", "0.23"))


def test_many_metrics_go_below_the_table(capsys):
    evaluation_table([("eval", RECORD | {"metrics": {f"metric_{i}": i / 10 for i in range(5)}})])
    out = capsys.readouterr().out
    assert "metric_1" in out.splitlines()[0] and "metric_2" not in out.splitlines()[0]
    assert out.splitlines()[-1] == "eval: metric 2 0.2000, metric 3 0.3000, metric 4 0.4000"


ROW = {
    "model": "dense",
    "batch_size": 8,
    "file_bytes": 91_000_000,
    "latency": 1.0,
    "latency_p95": 1.25,
    "examples_per_second": 8.0,
    "speedup": 1.0,
    "relative_flops": 1.0,
    "relative_bops": 1.0,
    "computed_reduction": 1.0,
}
PRUNED = {"model": "pruned", "latency": 0.5, "latency_p95": 0.75, "examples_per_second": 16.0, "speedup": 2.0}
PRUNED = ROW | PRUNED | {"relative_flops": 0.4, "relative_bops": 0.4, "computed_reduction": 2.25}
INT8 = PRUNED | {"model": "int8.onnx", "file_bytes": 60_000_000, "relative_bops": 0.025, "speedup": 4.0}
CONDITIONS = {
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


def table_cells(out: str) -> list[list[str]]:
    lines = [line.replace("┃", "│") for line in out.splitlines()]
    return [[cell.strip() for cell in line.split("│")] for line in lines if "│" in line]


def test_speeds_and_their_conditions(capsys):
    speed_table({"rows": [ROW, PRUNED], "conditions": CONDITIONS})
    out = capsys.readouterr().out
    header, *rows = table_cells(out)
    columns = "batch  MB ms.per.batch p95 examples/s fewer.FLOPs computed speed-up FLOPs.into.time".split(" ")
    assert header == [name.replace(".", " ") for name in columns]
    assert rows[0] == ["8", "dense", "91.0", "1000.00", "1250.00", "8.0", "1.00x", "1.00x", "1.00x", ""]
    assert rows[1] == ["", "pruned", "91.0", "500.00", "750.00", "16.0", "2.50x", "2.25x", "2.00x", "0.80"]
    told = "runs/hard (hard) on 41 examples of dev.jsonl, 30.2 tokens on average (50% of them at most 28"
    assert told in out and "fp32, 1 thread," in out and out.endswith("3 MiB at the peak\n")
    assert "onnxruntime" not in out


def test_speeds_of_files_in_int8_have_bit_operations(capsys):
    sizes = [row | {"batch_size": size} for size in (1, 8) for row in (ROW, INT8)]
    speed_table({"rows": sizes, "conditions": CONDITIONS | {"onnxruntime": "1.9"}})
    out = capsys.readouterr().out
    header, *rows = table_cells(out)
    assert header[6:9] == ["fewer FLOPs", "rel. BOPs", "computed"]
    assert rows[0][6:8] == ["1.00x", "1.000"] and rows[1][6:8] == ["2.50x", "0.025"]
    assert rows[1][1:3] == ["int8.onnx", "60.0"] and rows[1][-2:] == ["4.00x", ""]
    assert [row[0] for row in rows] == ["1", "", "8", ""] and "torch 2.0, onnxruntime 1.9;" in out


def test_progress_needs_no_terminal(capsys):
    with screen() as (show, progress):
        show("step [1] :heart:")
        progress(1, None, loss=0.5, score=None)
        progress(2, 10, loss=0.5)
    quiet("nothing", loss=0.5)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.strip() == "step [1] :heart:"
