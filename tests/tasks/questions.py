"""Made questions, tokenizers of several kinds, and short forms for the tests of question answering."""

from pathlib import Path

import numpy as np

from tasks import answers as answering
from tasks.answers import Candidates, best_thresholds, choose_text, squad_metrics
from tasks.tokenizer import Tokenizer
from tasks.windows import Question, Window, make_windows

CONTEXTS = [
    "The river Elbe rises at 1,386 m in the Giant Mountains and runs through Dresden and Hamburg to the North Sea.",
    "José naïvely drank café au lait in Ångström's e\u0301tude; it cost 3.50 € — a “bargain” (so he said).",
    "東京は日本の首都です。人口は約1400万人。 Ask 서울 or مرحبا too.",
    "First 😀 then 👩‍👩‍👧 and\t tabs,\n\n  blanks\u00a0of\u3000all kinds \u200b end.",
]
ANSWERS = ["the Giant Mountains", "Ångström's", "日本の首都", "👩‍👩‍👧"]


def ask(context: str, *answers: str, id: str = "q", question: str = "What is it?") -> Question:
    return Question(id, question, context, tuple((text, context.index(text)) for text in answers))


def find_answers(
    questions: list[Question], windows: list[Window], logits: list[np.ndarray], **limits: int
) -> list[Candidates]:
    owners, offsets = [w.question for w in windows], [w.offsets for w in windows]
    return answering.find_answers(questions, owners, offsets, logits, **limits)


def trained(folder: Path, kind: str, texts: list[str], size: int = 400) -> Tokenizer:
    """A tokenizer of RoBERTa's, BERT's or XLM-RoBERTa's kind."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

    special = ["<s>", "<pad>", "</s>", "<unk>", "[CLS]", "[SEP]"]
    if kind == "wordpiece":
        backend = Backend(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.train_from_iterator(
            texts,
            trainers.WordPieceTrainer(vocab_size=size, min_frequency=2, special_tokens=special, show_progress=False),
        )
        backend.post_processor = processors.BertProcessing(("[SEP]", 5), ("[CLS]", 4))
    else:
        backend = Backend(models.BPE(unk_token="<unk>"))
        spaces = pre_tokenizers.ByteLevel(add_prefix_space=False) if "bytes" in kind else pre_tokenizers.Metaspace()
        backend.pre_tokenizer = spaces
        alphabet = pre_tokenizers.ByteLevel.alphabet() if "bytes" in kind else []
        trainer = trainers.BpeTrainer(
            vocab_size=size, min_frequency=2, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
        backend.post_processor = processors.RobertaProcessing(
            ("</s>", 2), ("<s>", 0), trim_offsets=kind == "bytes", add_prefix_space=False
        )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    if kind == "wordpiece":
        (folder / "tokenizer_config.json").write_text('{"model_input_names": ["input_ids", "token_type_ids"]}')
    return Tokenizer(folder)


def text_of(window: Window, question: Question) -> str:
    return question.context[window.offsets[window.start][0] : window.offsets[window.end][1]]


def assert_labels_answer_everything(tokenizer, questions, max_length, stride):
    windows = make_windows(tokenizer, questions, max_length, stride)
    logits = [np.zeros((len(w.token_ids), 2), dtype=np.float32) for w in windows]
    for window, values in zip(windows, logits):
        values[window.start, 0] = values[window.end, 1] = 9.0
    best = find_answers(questions, windows, logits, max_answer_tokens=100)
    texts = {q.id: choose_text(candidates, 0.0) for q, candidates in zip(questions, best)}
    metrics = squad_metrics(questions, texts)
    assert metrics["exact"] == 100 and metrics["f1"] == 100, metrics
    metrics = best_thresholds(
        questions,
        {q.id: choose_text(candidates, None) for q, candidates in zip(questions, best)},
        {q.id: candidates.no_answer_score for q, candidates in zip(questions, best)},
    )
    assert metrics["best_exact"] == metrics["best_f1"] == 100
