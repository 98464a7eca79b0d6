"""Writes the generated tagging task: names of people, places and firms, some of which only the word before tells apart.

python benchmarks/tags.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import write_file  # noqa: E402
from tagging import demo_sentences  # noqa: E402


@click.command()
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
@click.option("--train", default=2000, show_default=True)
@click.option("--dev", default=500, show_default=True)
def main(output: Path, train: int, dev: int) -> None:
    """Writes OUTPUT/train.conll and OUTPUT/dev.conll."""
    for name, count, seed in (("train", train, 0), ("dev", dev, 1)):
        lines = (
            f"{word} {label}"
            for s in demo_sentences(count, seed)
            for word, label in (*zip(s.words, s.labels), ("", ""))
        )
        text = "\n".join(line.strip() for line in lines) + "\n"
        write_file(output / f"{name}.conll", lambda path: path.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
