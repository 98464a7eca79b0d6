"""A fixed subset of SST-2's training set, sentences rather than the phrases cut out of them.

    python benchmarks/sst2_subset.py GLUE/SST-2 OUT

GLUE's training file holds each review sentence and thousands of its phrases. What is part of no other line counts as a
sentence; sentences come first in the seed's order, the longest of the other lines fill up.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import write_file  # noqa: E402


def sentences_first(lines: list[str], seed: int) -> list[str]:
    """Lines "text<tab>label": those that are part of no other, shuffled by the seed, then the others, longest first."""
    covered, sentences, phrases = set(), [], []
    for line in sorted(lines, key=lambda line: (-len(line.split()), line)):
        words = line.rpartition("\t")[0].split()
        (phrases if tuple(words) in covered else sentences).append(line)
        if line is sentences[-1]:
            covered.update(tuple(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1))
    random.Random(seed).shuffle(sentences)
    return sentences + phrases


@click.command()
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
@click.option("--count", default=10_000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(source: Path, output: Path, count: int, seed: int) -> None:
    """Writes OUTPUT/train.tsv, and SOURCE's dev.tsv beside it."""
    header, *lines = (source / "train.tsv").read_text(encoding="utf-8").splitlines()
    chosen = sentences_first(lines, seed)[:count]
    text = "\n".join([header, *chosen]) + "\n"
    write_file(output / "train.tsv", lambda path: path.write_text(text, encoding="utf-8"))
    dev = (source / "dev.tsv").read_bytes()
    write_file(output / "dev.tsv", lambda path: path.write_bytes(dev))
    click.echo(
        f"{output}: {len(chosen):,} lines, {sum(len(line.split()) - 1 for line in chosen) / len(chosen):.1f} words each"
    )


if __name__ == "__main__":
    main()
