"""Answers out of logits, and SQuAD's metrics."""

import math
import random
import re
import string

import numpy as np
import pytest
from questions import ANSWERS, CONTEXTS, ask, assert_labels_answer_everything, find_answers

from tasks.answers import Answer, Candidates, best_thresholds, choose_text, squad_metrics
from tasks.windows import Question, Window


def window_of(question: int, *words: tuple[int, int]) -> Window:
    """Two tokens of a question and its separator, then one token for each word."""
    count = len(words) + 4
    return Window(question, list(range(count)), [0] * count, 3, [(0, 0)] * 3 + [*words, (0, 0)], 0, 0)


def logits_of(count: int, starts: dict[int, float], ends: dict[int, float]) -> np.ndarray:
    logits = np.full((count, 2), -10.0, dtype=np.float32)
    for column, values in enumerate((starts, ends)):
        for position, value in values.items():
            logits[position, column] = value
    return logits


SHORT = ask("one two three four")
ONE, TWO, THREE, FOUR = (0, 3), (4, 7), (8, 13), (14, 18)


def test_answers_by_hand():
    windows = [window_of(0, ONE, TWO, THREE, FOUR)]  # positions 3 to 6
    # The question's tokens and the separator have the highest logits, and must not be answers.
    logits = [logits_of(8, {0: 14, 1: 50, 4: 3, 5: 2}, {0: 15, 2: 50, 7: 50, 4: 1, 3: 40, 6: 2})]
    ((answers, null),) = find_answers([SHORT], windows, logits, n_best=4)
    assert [a[:4] for a in answers] == [  # "one" ends before "two" starts, so 3 + 40 is no piece
        ("one", 0, 3, 30.0),  # -10 + 40
        ("two three four", 4, 18, 5.0),
        ("two", 4, 7, 4.0),
        ("three four", 8, 18, 4.0),
    ]
    assert null == 29 - 30
    weights = np.exp([30 - 30, 5 - 30, 4 - 30, 4 - 30])
    assert [a.probability for a in answers] == pytest.approx(weights / (weights.sum() + math.exp(29 - 30)))


def test_answers_are_no_longer_than_the_limit():
    windows = [window_of(0, ONE, TWO, THREE, FOUR)]
    logits = [logits_of(8, {3: 5}, {6: 5, 4: 1})]
    for longest, text, score in ((4, "one two three four", 10), (3, "one two", 6), (1, "one", -5)):
        ((answers, _),) = find_answers([SHORT], windows, logits, max_answer_tokens=longest)
        assert answers[0][0] == text and answers[0].score == score
        assert len(answers) == sum(range(5)) - sum(range(5 - longest)) and all(math.isfinite(a.score) for a in answers)


def test_ties_stand_in_the_order_of_the_context():
    windows = [window_of(0, ONE, TWO, THREE), window_of(0, THREE, FOUR)]
    logits = [np.zeros((7, 2)), np.zeros((6, 2))]
    ((answers, null),) = find_answers([SHORT], windows, logits)
    pieces = [(a, b) for a in (0, 4, 8) for b in (3, 7, 13) if a < b] + [(8, 18), (14, 18)]
    assert [(a.start, a.end) for a in answers] == pieces and null == 0
    ((answers, _),) = find_answers([SHORT], windows[::-1], logits[::-1], n_best=3)
    assert [(a.start, a.end) for a in answers] == pieces[:3]


def test_the_best_over_windows_and_the_lowest_no_answer():
    questions = [SHORT, ask("no windows"), ask("one two")]
    windows = [window_of(0, ONE, TWO, THREE), window_of(2, ONE, TWO), window_of(0, TWO, THREE, FOUR)]
    logits = [
        logits_of(7, {0: 4, 4: 1}, {0: 3, 5: 1}),
        logits_of(6, {0: 9, 3: 1}, {0: 1, 3: 1}),
        logits_of(7, {0: -2, 3: 6, 5: 2}, {0: 1, 4: 1, 5: 7}),
    ]
    (answers, null), nothing, (others, other_null) = find_answers(questions, windows, logits, n_best=2)
    assert [(a.text, a.score) for a in answers] == [("two three four", 13.0), ("four", 9.0)]
    assert null == -2 + 1 - 13 and nothing == ([], math.inf)
    assert (others[0].text, others[0].score, other_null) == ("one", 2.0, 8.0)
    for order in ((0, 2), (2, 0)):  # "two three" is in both windows: 1 + 1 and 6 + 1
        ((answers, _),) = find_answers([SHORT], [windows[i] for i in order], [logits[i] for i in order], n_best=20)
        assert [a.score for a in answers if a.text == "two three"] == [7.0]


def test_pieces_of_a_character_are_one_answer():
    windows = [window_of(0, (0, 1), (0, 1), (0, 1), (2, 3))]  # a character of three tokens
    ((answers, _),) = find_answers([ask("é x")], windows, [np.zeros((8, 2))], n_best=3)
    assert [a.text for a in answers] == ["é", "é x", "x"]


def test_answers_are_those_of_trying_every_piece():
    generator = np.random.default_rng(0)
    question = ask("x" * 60)
    for pieces in (1, 2, 4):  # tokens a character
        for longest, n_best in ((1, 3), (7, 20), (100, 500)):
            start = np.sort(np.arange(40) // pieces)
            words = [(int(a), int(a + b)) for a, b in zip(start, generator.integers(0, 2, 40))]  # some cover nothing
            window = window_of(0, *words)
            logits = generator.integers(-9, 10, (44, 2)).astype(np.float32)
            all_spans: dict[tuple[int, int], float] = {}
            for i in range(3, 43):
                for j in range(i, min(43, i + longest)):
                    if all(a < b for a, b in (window.offsets[i], window.offsets[j])):
                        piece = window.offsets[i][0], window.offsets[j][1]
                        all_spans[piece] = max(all_spans.get(piece, -math.inf), float(logits[i, 0] + logits[j, 1]))
            expected = sorted(all_spans.items(), key=lambda item: (-item[1], item[0]))[:n_best]
            ((answers, _),) = find_answers([question], [window], [logits], n_best=n_best, max_answer_tokens=longest)
            assert [((a.start, a.end), a.score) for a in answers] == expected


def test_choose_text():
    answers = [Answer("yes", 0, 3, 5.0, 0.9)]
    assert choose_text(Candidates(answers, 3.0), None) == choose_text(Candidates(answers, 3.0), 3.0) == "yes"
    assert choose_text(Candidates(answers, 3.1), 3.0) == choose_text(Candidates([], -5.0), None) == ""


@pytest.mark.parametrize("max_length, stride", [(300, 20), (60, 40)])
def test_logits_of_the_labels_answer_everything(tokenizer, max_length, stride):
    questions = [ask(c, a, id=a) for c, a in zip(CONTEXTS, ANSWERS)] + [ask(CONTEXTS[0], id="none")]
    assert_labels_answer_everything(tokenizer, questions, max_length, stride)


# ---- metrics ----


@pytest.mark.parametrize(
    "answers, text, exact, f1",
    [
        (["The Elbe"], "elbe!", 1, 1),  # case, article, punctuation
        (["Elbe"], "", 0, 0),
        (["an apple a day"], "Apple the  day.", 1, 1),
        (["theatre"], "atre", 0, 0),  # articles are whole words
        (["U.S."], "US", 1, 1),
        (["well-known"], "well known", 0, 0),  # punctuation does not part words
        (["the Giant Mountains"], "Mountains", 0, 2 * 1 * (1 / 2) / (3 / 2)),
        (["new york new york"], "new new new", 0, 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),  # two of "new" are shared
        (["Dresden", "Dresden and Hamburg"], "Hamburg and", 0, 2 * 1 * (2 / 3) / (5 / 3)),  # the best annotator
        (["Dresden", "Hamburg"], "Hamburg", 1, 1),
        ([], "", 1, 1),
        ([], "Hamburg", 0, 0),
        ([], "the", 1, 1),  # nothing is left of it
        (["the"], "the", 1, 1),
        (["the", "Elbe"], "", 0, 0),  # an annotator's answer of which nothing is left does not count
    ],
)
def test_metrics_by_hand(answers, text, exact, f1):
    question = Question("q", "?", "context", tuple((answer, 0) for answer in answers))
    metrics = squad_metrics([question], {"q": text})
    assert metrics["exact"] == pytest.approx(100 * exact) and metrics["f1"] == pytest.approx(100 * f1)


def kinds(*answers: str) -> list[Question]:
    return [Question(f"q{i}", "?", "c", ((answer, 0),) if answer else ()) for i, answer in enumerate(answers)]


def test_metrics_of_both_kinds_of_questions():
    texts = {"q0": "red", "q1": "green", "q2": "", "q3": "blue"}
    assert squad_metrics(kinds("red", "green apple", "", ""), texts) == pytest.approx(
        {
            "exact": 50,
            "f1": 100 * (1 + 2 / 3 + 1) / 4,
            "has_answer_exact": 50,
            "has_answer_f1": 100 * (1 + 2 / 3) / 2,
            "no_answer_accuracy": 50,
        }
    )
    assert set(squad_metrics(kinds("red", "green"), texts)) == {"exact", "f1"}
    assert squad_metrics(kinds("", ""), {"q0": "", "q1": "x"}) == {"exact": 50, "f1": 50, "no_answer_accuracy": 50}


def test_best_thresholds_by_hand():
    questions = kinds("red", "green apple", "", "blue", "")
    texts = {"q0": "red", "q1": "apple", "q2": "x", "q3": "blue", "q4": "y"}
    nulls = {"q0": -3.0, "q1": -1.0, "q2": 1.0, "q3": 2.0, "q4": 2.0}
    # right of 5, by the last question answered: none 2, q0 3, q1 3 (F1 3 + 2/3), q2 2 (2 + 2/3), q3 and q4 2 (2 + 2/3)
    assert best_thresholds(questions, texts, nulls) == pytest.approx(
        {"best_exact": 60, "best_exact_threshold": -3, "best_f1": 100 * (3 + 2 / 3) / 5, "best_f1_threshold": -1}
    )
    for threshold, exact in ((-4.0, 40), (-3.0, 60), (-1.0, 60), (1.0, 40), (2.0, 40)):
        candidates = {i: Candidates([Answer(texts[i], 0, 1, 0.0, 1.0)], nulls[i]) for i in texts}
        chosen = {i: choose_text(candidates[i], threshold) for i in texts}
        assert squad_metrics(questions, chosen)["exact"] == exact
    best = best_thresholds(kinds("", ""), {"q0": "x", "q1": "y"}, {"q0": -1.0, "q1": 0.5})
    assert best["best_exact"] == 100 and best["best_exact_threshold"] < -1  # best to answer nothing


# ---- against the definition ----


def words_of(text: str) -> list[str]:
    """The words that count: lower case, without ASCII punctuation and the articles a, an, the."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    tokens = re.split(r"(\w+)", kept)  # words in the sense of a regular expression at the odd places
    return "".join(" " if token in ("a", "an", "the") else token for token in tokens).split()


def definition(answer: str, references: list[str]) -> tuple[int, float]:
    """Exact match and F1 with the best annotator."""
    best = (0, 0.0)
    for reference in [r for r in references if words_of(r)] or [""]:
        mine, theirs = words_of(answer), words_of(reference)
        rest, common = list(theirs), 0
        for word in mine:
            if word in rest:
                rest.remove(word)
                common += 1
        if not mine or not theirs:
            f1 = float(mine == theirs)
        else:
            precision, recall = common / len(mine), common / len(theirs)
            f1 = 2 * precision * recall / (precision + recall) if common else 0.0
        best = max(best[0], int(mine == theirs)), max(best[1], f1)
    return best


def test_metrics_of_a_thousand_predictions_are_the_definitions():
    draw = random.Random(5)
    pieces = [
        "the", "The", "a", "an", "An", "river", "Elbe", "elbe,", "(Elbe)", "1,386", "m.", "über", "ÜBER", "—", "-",
        "it's", "", "the-sea", "a.", "中文", "ﬁn", "\u00a0", "x",
    ]  # fmt: skip

    def text() -> str:
        return draw.choice([" ", " ", "  ", ""]).join(draw.choices(pieces, k=draw.randrange(0, 5)))

    questions, texts, expected = [], {}, []
    for i in range(1000):
        references = [text() for _ in range(draw.randrange(0, 4))]
        questions.append(Question(str(i), "?", "context", tuple((reference, 0) for reference in references)))
        texts[str(i)] = draw.choice([text(), *references, ""])
        expected.append(definition(texts[str(i)], references))
        one = squad_metrics(questions[-1:], texts)
        assert (one["exact"], one["f1"]) == pytest.approx([100 * value for value in expected[-1]]), questions[-1]
    metrics = squad_metrics(questions, texts)
    assert metrics["exact"] == pytest.approx(sum(exact for exact, _ in expected) / 10)
    assert metrics["f1"] == pytest.approx(sum(f1 for _, f1 in expected) / 10)
    assert 20 < metrics["exact"] < 80
