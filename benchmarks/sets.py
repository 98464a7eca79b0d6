"""Makes the data sets of the README's tables that differ from the distributed ones.

python benchmarks/sets.py sentences GLUE/SST-2 OUT      10,000 lines of SST-2, sentences rather than phrases
python benchmarks/sets.py neighbours MRPC GLUE OUT      pairs of texts without labels, for --distill-data
python benchmarks/sets.py halves GLUE/MRPC OUT          the shorter half to train, the longer ones to evaluate; also R8
python benchmarks/sets.py names SQUAD OUT               SQuAD's contexts in lower case: which words are names?
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.files import write_text  # noqa: E402
from tasks import find_task  # noqa: E402
from tasks.base import Source  # noqa: E402
from tasks.squad import read_squad  # noqa: E402

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
OUTPUT = click.Path(file_okay=False, path_type=Path)


@click.group()
def main() -> None:
    """Makes the data sets of the README's tables that differ from the distributed ones."""


def read_lines(path: Path) -> tuple[str, list[str]]:
    """A TSV file's header and its other lines."""
    header, *lines = path.read_text(encoding="utf-8-sig").splitlines()
    return header, lines


def write_lines(path: Path, lines: list[str]) -> None:
    write_text(path, "\n".join(lines) + "\n")
    click.echo(f"{path}: {len(lines):,} lines")


@main.command()
@click.argument("source", type=FOLDER)
@click.argument("output", type=OUTPUT)
@click.option("--count", default=10_000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def sentences(source: Path, output: Path, count: int, seed: int) -> None:
    """Takes lines of SST-2, whose training file holds each sentence and many phrases cut out of it.

    A line that is part of no other counts as a sentence. Sentences come first, in the seed's order. The longest of the
    other lines make up the rest.
    """
    header, lines = read_lines(source / "train.tsv")
    covered, whole, phrases = set(), [], []
    for line in sorted(lines, key=lambda line: (-len(line.split()), line)):
        words = line.rpartition("\t")[0].split()
        if tuple(words) in covered:
            phrases.append(line)
        else:
            whole.append(line)
            covered.update(tuple(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1))
    random.Random(seed).shuffle(whole)
    lines = whole + phrases
    write_lines(output / "train.tsv", [header, *lines[:count]])
    write_lines(output / "more.tsv", [header, *lines[count : 2 * count]])
    write_lines(output / "dev.tsv", [header, *read_lines(source / "dev.tsv")[1]])


@main.command()
@click.argument("task")
@click.argument("source", type=FOLDER)
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--seed", default=0, show_default=True)
def neighbours(task: str, source: Path, output: Path, seed: int) -> None:
    """Makes as many pairs without labels as the training data of a task has, for --distill-data.

    The two texts of a pair share words: each text is paired with its nearest one, by the cosine of TF-IDF vectors, that
    is not its partner in the training data.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    kind = find_task(task)
    rows = [row for row in Source(kind, source).rows("train")[""].rows if row.label is not None]
    texts = [text for row in rows for text in (row.text, row.pair)]  # partners stand side by side
    vectors = TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
    generator, pairs = random.Random(seed), {}
    for start in range(0, len(texts), 1024):
        for i, likeness in enumerate((vectors[start : start + 1024] @ vectors.T).toarray(), start):
            own = {texts[i], texts[i ^ 1]}
            nearest = next(j for j in (-likeness).argsort(kind="stable").tolist() if texts[j] not in own)
            pairs[frozenset((i, nearest))] = generator.sample((i, nearest), 2)
    chosen = generator.sample(sorted(pairs.values()), min(len(rows), len(pairs)))
    write_lines(output, [json.dumps({kind.text: texts[i], kind.pair: texts[j]}) for i, j in chosen])


@main.command()
@click.argument("source", type=FOLDER)
@click.argument("output", type=OUTPUT)
def halves(source: Path, output: Path) -> None:
    """Sorts lines of TSV or JSONL by the number of their words.

    The training data's shorter half is to train on, all longer halves are to evaluate on.
    """
    suffix, header, parts = ".jsonl" if (source / "train.jsonl").is_file() else ".tsv", [], []
    for split in ("train", "dev"):
        lines = (source / f"{split}{suffix}").read_text(encoding="utf-8-sig").splitlines()
        header = [lines.pop(0)] if suffix == ".tsv" else []
        lines.sort(key=lambda line: len(line.split()))
        parts += [lines[: len(lines) // 2], lines[len(lines) // 2 :]]
    write_lines(output / f"train{suffix}", header + parts[0])
    write_lines(output / f"dev{suffix}", header + parts[1] + parts[3])


@main.command()
@click.argument("source", type=FOLDER)
@click.argument("output", type=OUTPUT)
def names(source: Path, output: Path) -> None:
    """Writes sentences in lower case, in CoNLL's layout: words that had a capital are to be found again.

    Neighbouring ones make one NAME. A sentence's first word counts if its split has it nowhere in lower case.
    """
    for split in ("train", "dev"):
        path = source / f"{split}-v2.0.json"
        contexts = dict.fromkeys(question.context for question in read_squad(path))
        small = {word for context in contexts for word in re.findall(r"\w+", context) if word.islower()}
        lines = []
        for context in contexts:
            for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", context):
                label = "O"
                for i, word in enumerate(re.findall(r"\w+|[^\w\s]", sentence)):
                    name = word[0].isupper() and (i > 0 or word.lower() not in small)
                    label = "O" if not name else "B-NAME" if label == "O" else "I-NAME"
                    lines.append(f"{word.lower()} {label}")
                lines.append("")
        write_lines(output / f"{split}.conll", lines)


if __name__ == "__main__":
    main()
