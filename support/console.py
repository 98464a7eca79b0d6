"""What the command line prints with rich: progress on standard error, tables on standard output. It needs no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

NARROWEST = 24  # columns of text that a table's last column has at least


def quiet(*args: Any, **state: Any) -> None:
    """Prints nothing: `show` and `progress` of the processes that are not the main one."""


@contextlib.contextmanager
def screen() -> Iterator[tuple[Callable[[str], Any], Callable[..., Any]]]:
    """Gives (show, progress) on standard error; the bar appears on a terminal only.

    show(line) prints a line above the bar. progress(step, steps, **state) moves the bar; steps may be None, and state
    holds numbers to show beside it, or None.
    """
    console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def show(line: str) -> None:
            console.print(line, markup=False)

        def progress(step: int, steps: int | None, **state: Any) -> None:
            description = "  ".join(f"{name} {value:.4f}" for name, value in state.items() if value is not None)
            if not bar.task_ids:
                bar.add_task(description, total=steps)
            bar.update(bar.task_ids[0], completed=step, total=steps, description=description)

        yield show, progress


def output_console() -> Console:
    """Standard output: as wide as the terminal, or 160 columns of text where it is a file or a pipe."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 160
    return console


def new_table(left: tuple[str, ...], *names: str) -> Table:
    """A table without a frame; the columns named in `left` are aligned to the left, the others to the right."""
    table = Table(show_edge=False, pad_edge=False)
    for name in names:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    return table


def print_whole(table: Table) -> None:
    """Prints a table on standard output, with nothing cut off: a row is a line in a file or a pipe.

    On a terminal that is too narrow the last column's text takes several lines.
    """
    console = output_console()
    *others, last = (max(map(cell_len, (column.header, *column.cells))) for column in table.columns)
    fixed = sum(others) + 3 * len(others)  # three for each line between two columns
    console.width = max(console.width, fixed + min(last, NARROWEST)) if console.is_terminal else fixed + last
    table.columns[-1].no_wrap, table.columns[-1].overflow = False, "fold"
    console.print(table)


def print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Prints rows of text on standard output. The first and the last column are aligned to the left."""
    table = new_table((columns[0], columns[-1]), *columns)
    for row in rows:
        table.add_row(*row)
    print_whole(table)


def evaluation_table(rows: list[tuple[str, dict[str, Any]]]) -> None:
    """Prints evaluations one below the other on standard output: (title, fields of an `Evaluation`) each.

    A few metrics have a column each. Of many, only the first ones have, and the others stand in a line below the table.
    Bit operations have one where they are not what the FLOPs say.
    """
    metrics = list(dict.fromkeys(name for _, record in rows for name in record["metrics"]))
    metrics, others = (metrics, []) if len(metrics) <= 4 else (metrics[:2], metrics[2:])
    sizes = list(dict.fromkeys(size for _, record in rows for size in record.get("speedup", ())))
    kept = "kept after each layer"
    rounded = any(
        record.get("relative_bops", record["relative_flops"]) != record["relative_flops"] for _, record in rows
    )
    bops = ("rel. BOPs",) if rounded else ()
    columns = ("", *metrics, "score", "GFLOPs", "rel. FLOPs", *bops, *(f"speed at {size}" for size in sizes), kept)
    table = new_table(("", kept), *columns)
    for title, record in rows:
        table.add_row(
            title,
            *(f"{record['metrics'][name]:.4f}" for name in metrics),
            f"{record['score']:.4f}",
            f"{record['gflops']:.3g}",
            f"{record['relative_flops']:.3f}",
            *(f"{record.get('relative_bops', record['relative_flops']):.3f}" for _ in bops),
            *(f"{record['speedup'][size]:.2f}x" if "speedup" in record else "" for size in sizes),
            " ".join(f"{share:.2f}" for share in record["kept"]),
        )
    print_whole(table)
    for title, record in rows if others else ():
        values = ", ".join(f"{name.replace('_', ' ')} {record['metrics'][name]:.4f}" for name in others)
        print(f"{title}: {values}")


def speed_table(result: dict[str, Any]) -> None:
    """Prints what `bench` measured, and its conditions. result: the content of `bench --json`.

    Bit operations have a column where they are not what the FLOPs say.
    """
    rows = result["rows"]
    bops = ("rel. BOPs",) if any(row["relative_bops"] != row["relative_flops"] for row in rows) else ()
    columns = ("batch", "", "MB", "ms per batch", "p95", "examples/s", "fewer FLOPs", *bops, "computed", "speed-up")
    table = new_table(("",), *columns, "FLOPs into time")
    sizes = [row["batch_size"] for row in rows]
    for row, before in zip(rows, [None, *sizes]):
        flops_to_time = row["speedup"] * row["relative_flops"]
        table.add_row(
            str(row["batch_size"]) if row["batch_size"] != before else "",
            row["model"],
            f"{row['file_bytes'] / 1e6:.1f}",
            f"{1e3 * row['latency']:.2f}",
            f"{1e3 * row['latency_p95']:.2f}",
            f"{row['examples_per_second']:.1f}",
            f"{1 / row['relative_flops']:.2f}x",
            *(f"{row['relative_bops']:.3f}" for _ in bops),
            f"{row['computed_reduction']:.2f}x",
            f"{row['speedup']:.2f}x",
            f"{flops_to_time:.2f}" if row["model"] == "pruned" else "",
        )
    print_whole(table)
    print(f"\n{conditions_line(result['conditions'])}")


def conditions_line(c: dict[str, Any]) -> str:
    """What was measured, on what, and how, in one line. c: the conditions of `bench --json`."""
    threads = "1 thread" if c["threads"] == 1 else f"{c['threads']} threads"
    lengths = ", ".join(f"{share} of them at most {n:.0f}" for share, n in c["length_quantiles"].items())
    return (
        f"{c['checkpoint']} ({c['pruning']}) on {c['examples']} examples of {c['data']}, {c['mean_length']:.1f} tokens "
        f"on average ({lengths}). {c['device']}, {c['precision']}, {threads}, torch {c['torch']}"
        f"{', onnxruntime ' + c['onnxruntime'] if 'onnxruntime' in c else ''}; "
        f"{c['statistic']} of {c['repeats']} passes; {c['peak_memory_bytes'] / 2**20:.0f} MiB at the peak"
    )
