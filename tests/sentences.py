"""Made sentences to tag: names, some of which mean a place or a firm by the words before them."""

import random
from itertools import chain

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
