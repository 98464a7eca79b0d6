"""Answers to questions: read off the logits of windows, chosen, and compared with those of annotators.

The model gives each token of a window two logits: the answer starts here, the answer ends here. The window's first
token stands for "no answer".
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from tasks.windows import Question

MAX_ANSWER_TOKENS = 30


class Answer(NamedTuple):
    text: str
    start: int  # characters of the context,
    end: int  # exclusive
    score: float  # start logit + end logit
    probability: float  # softmax of the scores of the n best answers and of "no answer"


class Candidates(NamedTuple):
    """The possible answers to a question."""

    answers: list[Answer]  # best first; [] where no span can be an answer
    no_answer_score: float  # how much better "no answer" scores than the best of them; infinite where there is none


def find_answers(
    questions: list[Question],
    owners: Iterable[int],
    offsets: Iterable[Sequence],
    logits: Iterable[np.ndarray],
    n_best: int = 20,
    max_answer_tokens: int = MAX_ANSWER_TOKENS,
) -> list[Candidates]:
    """For each question the `n_best` spans of its context with the highest scores, and the score of "no answer".

    For each window: the index of its question (owners), the characters of the context that each token covers (offsets:
    (n, 2), both 0 for tokens outside the context), and the logits (n, 2) of start and end.

    A span that is in several windows has its highest score. Spans with equal scores stand in the order of the context.
    "No answer" has the lowest score of the windows' first tokens: each window must do without an answer.
    """
    scores: list[dict[tuple[int, int], float]] = [{} for _ in questions]
    no_answer = [math.inf] * len(questions)
    for owner, characters, values in zip(owners, offsets, logits):
        values = values.astype(np.float64)
        no_answer[owner] = min(no_answer[owner], float(values[0].sum()))
        spans = scores[owner]
        for span, score in _best_spans(np.asarray(characters), values, n_best, max_answer_tokens).items():
            spans[span] = max(score, spans.get(span, score))
    return [_rank(question, spans, null, n_best) for question, spans, null in zip(questions, scores, no_answer)]


def _rank(question: Question, spans: dict[tuple[int, int], float], no_answer: float, n_best: int) -> Candidates:
    best = sorted(spans.items(), key=lambda item: (-item[1], item[0]))[:n_best]
    if not best:
        return Candidates([], math.inf)
    scores = np.array([no_answer, *(score for _, score in best)])
    weights = np.exp(scores - scores.max())
    answers = [
        Answer(question.context[start:end], start, end, score, float(probability))
        for ((start, end), score), probability in zip(best, weights[1:] / weights.sum())
    ]
    return Candidates(answers, no_answer - best[0][1])


def _best_spans(
    offsets: np.ndarray, logits: np.ndarray, n_best: int, max_answer_tokens: int
) -> dict[tuple[int, int], float]:
    """{(first character, last character + 1): score} of the n best spans of a window. offsets, logits: (n, 2)."""
    in_context = offsets[:, 0] < offsets[:, 1]  # False for the question and the special tokens
    start, end = np.where(in_context, logits.T, -np.inf)
    # scores[i, k] is the score of the tokens from i to i + k.
    ends = np.concatenate([end, np.full(max_answer_tokens - 1, -np.inf)])
    scores = (start[:, None] + np.lib.stride_tricks.sliding_window_view(ends, max_answer_tokens)).ravel()
    # A character may be several tokens, at most its four bytes: up to 4 * 4 spans are the same text and count as one.
    count = min(16 * n_best, len(scores))
    likely = np.flatnonzero(scores >= np.partition(scores, -count)[-count])
    best: dict[tuple[int, int], float] = {}
    for index in likely[np.argsort(-scores[likely], kind="stable")]:
        if len(best) == n_best or scores[index] == -np.inf:
            break
        first, more = divmod(int(index), max_answer_tokens)
        best.setdefault((int(offsets[first, 0]), int(offsets[first + more, 1])), float(scores[index]))
    return best


def choose_text(candidates: Candidates, threshold: float | None) -> str:
    """The best answer's text, or "" where "no answer" is better by more than the threshold (None: never)."""
    answers, no_answer_score = candidates
    if not answers or (threshold is not None and no_answer_score > threshold):
        return ""
    return answers[0].text


# ----------------------------------------------------------------------------------------------------------------------
# Metrics


def squad_metrics(questions: list[Question], texts: dict[str, str]) -> dict[str, float]:
    """SQuAD's exact match and F1 in percent. texts: {question id: answer}, "" for no answer.

    Texts are compared in lower case, without punctuation and articles. F1 compares the answer's words with those of the
    annotator who agrees most. Only "" is right for a question without answers. Where there are such questions, the two
    kinds are also reported apart: has_answer_exact, has_answer_f1 and no_answer_accuracy.
    """

    def means(prefix: str, chosen: list[Question]) -> dict[str, float]:
        scores = [_compare(question, texts[question.id]) for question in chosen]
        return {prefix + name: 100 * sum(s) / len(s) for name, s in zip(("exact", "f1"), zip(*scores))}

    metrics = means("", questions)
    answerable = [question for question in questions if question.answers]
    unanswerable = [question for question in questions if not question.answers]
    if unanswerable:
        metrics |= means("has_answer_", answerable) if answerable else {}
        metrics["no_answer_accuracy"] = means("", unanswerable)["exact"]
    return metrics


def best_thresholds(
    questions: list[Question], texts: dict[str, str], no_answer_scores: dict[str, float]
) -> dict[str, float]:
    """The thresholds of `choose_text` that are best for these very questions, and the metrics that they give.

    texts: {question id: the best answer's text}, chosen without a threshold; no_answer_scores: by id, of `Candidates`.
    Returns best_exact, best_exact_threshold, best_f1, best_f1_threshold; of equally good thresholds the lowest.
    """
    scores = np.array([no_answer_scores[question.id] for question in questions])
    unanswered = np.array([_compare(question, "") for question in questions])
    gains = np.array([_compare(question, texts[question.id]) for question in questions]) - unanswered
    order = np.argsort(scores)
    # A threshold answers the questions whose score is at most the threshold; below the lowest score it answers none.
    thresholds = np.array([scores.min() - 1, *np.unique(scores)])
    answered = np.searchsorted(scores[order], thresholds, side="right")
    totals = unanswered.sum(0) + np.concatenate([np.zeros((1, 2)), gains[order].cumsum(0)])[answered]
    best = {}
    for name, values in zip(("best_exact", "best_f1"), totals.T):
        best[name] = float(100 * values.max() / len(questions))
        best[f"{name}_threshold"] = float(thresholds[values.argmax()])
    return best


def _compare(question: Question, text: str) -> tuple[float, float]:
    """Exact match and F1, 0 to 1, with the annotator who agrees most."""
    answer = _normalize(text)
    references = [reference for reference in (_normalize(text) for text, _ in question.answers) if reference] or [""]
    return float(answer in references), max(_f1(answer.split(), reference.split()) for reference in references)


def _normalize(text: str) -> str:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _f1(answer: list[str], reference: list[str]) -> float:
    """The harmonic mean of precision and recall; a word counts as often as both texts have it."""
    if not answer or not reference:
        return float(answer == reference)
    return 2 * (Counter(answer) & Counter(reference)).total() / (len(answer) + len(reference))
