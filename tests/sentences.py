"""Made sentences to tag, with names of which some mean a place or a firm by the words before, and made questions."""

import json
import random
from itertools import chain
from pathlib import Path

import numpy as np

from tasks.tagging import Sentence
from tools.demo import FILLER

GIVEN = "Anna Boris Clara David Elena Felix Greta Hugo".split()
FAMILY = "Berg Castro Dumont Eriksen Fontana Gruber Jansen Keller".split()
PLACES = "Malden Norwick Orleton Pernau Quimby Rosental".split()
TRADES = "Press Motors Bank Airways Theatre".split()
SHARED = "Harlow Sutton Whitby Lindau Amberg".split()  # places and firms


def made_sentences(count: int, seed: int) -> list[Sentence]:
    """Synthetic sentences: 8 to 24 filler words and one to three names, labelled PER, LOC and ORG in BIO.

    A name of `SHARED` alone is a place after "in" and a firm after "at the": only the word before decides. Most words
    are filler and most labels "O", so most tokens can go, but not the words before names.
    """
    generator = random.Random(seed)
    sentences = []
    for line in range(1, count + 1):
        pieces = [[(word, "O")] for word in generator.choices(FILLER, k=generator.randint(8, 24))]
        for _ in range(generator.randint(1, 3)):
            kind = generator.choice(("PER", "LOC", "ORG"))
            if kind == "PER":
                cue, name = [], [generator.choice(GIVEN), generator.choice(FAMILY)]
            elif kind == "LOC":
                cue, name = ["in"], [generator.choice(PLACES + SHARED)]
            else:
                trade = generator.choices(TRADES, k=generator.randint(0, 1))  # one or none
                cue, name = ["at", "the"], [generator.choice(SHARED), *trade]
            tagged = [(word, f"{'I' if i else 'B'}-{kind}") for i, word in enumerate(name)]
            pieces.insert(generator.randint(0, len(pieces)), [(word, "O") for word in cue] + tagged)
        words, labels = zip(*chain.from_iterable(pieces))
        sentences.append(Sentence(list(words), list(labels), line))
    return sentences


def write_tags(path: Path, count: int, seed: int) -> None:
    """Made sentences as CoNLL: a word and its label in a line, a blank line between sentences."""
    blocks = (
        "\n".join(f"{word} {label}" for word, label in zip(s.words, s.labels)) for s in made_sentences(count, seed)
    )
    path.write_text("\n\n".join(blocks) + "\n")


def write_questions(path: Path, count: int, seed: int, words: int = 0) -> None:
    """Who lives where? Contexts of three sentences in SQuAD's layout; every fourth question has no answer.

    words: of a preface that makes each question longer.
    """
    generator = np.random.default_rng(seed)
    paragraphs = []
    for number in range(count):
        people = generator.permutation(GIVEN)[:4]
        context = " ".join(f"{name} lives in {generator.choice(PLACES)}." for name in people[:3])
        person = people[3] if number % 4 == 0 else people[number % 3]
        answers = []
        if person in people[:3]:
            start = context.index(f"{person} lives in ") + len(f"{person} lives in ")
            answers = [{"text": context[start:].split(".")[0], "answer_start": start}]
        text = "Now then " * words + f"where does {person} live?"
        paragraphs.append(
            {"context": context, "qas": [{"id": f"{seed}-{number}", "question": text, "answers": answers}]}
        )
    path.write_text(json.dumps({"version": "1", "data": [{"title": "t", "paragraphs": paragraphs}]}))
