"""Tasks, the settings of a run, readers, tokenization, packed batches and metrics.

Only the standard library is imported at the top: the command line shows tasks and defaults without waiting for torch.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import datasets
    import numpy as np
    from torch import Tensor


class InputError(Exception):
    """Something the user gave cannot be used. The message says in one line what, where, and what to do."""


class Interrupted(Exception):
    """Training stopped at a signal, its state saved. `number` is the signal."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


# ----------------------------------------------------------------------------------------------------------------------
# Settings: every default of a run, once. The command line makes its options and their help from these.


def setting(default: Any, help: str, *flags: str, **click_options: Any) -> Any:
    """A dataclass field with its command-line spellings (made from its name where none are given) and help text."""
    return field(default=default, metadata={"help": help, "flags": flags, **click_options})


@dataclass
class Settings:
    """How a training stage runs. `STAGES` holds what differs from stage to stage."""

    learning_rate: float = setting(2e-5, "Peak learning rate of the weights.", "--lr", "--learning-rate")
    weight_decay: float = setting(0.0, "AdamW's weight decay (not on biases and norms).")
    batch_size: int = setting(32, "Examples per optimizer step, over all processes together.", "--batch-size", "--bs")
    epochs: float = setting(3.0, "Passes over the training data; may be a fraction.", "--epochs", "--epoch")
    accumulate: int = setting(1, "Split each batch into this many parts, one after the other, to save memory.")
    warmup: float = setting(0.06, "Share of the steps in which the rates rise; then they fall linearly to 0.")
    max_grad_norm: float = setting(1.0, "Clip the weights' gradient to this norm; the thresholds' is left alone.")
    regularization: float = setting(
        0.1,
        "λ, the weight of the share of tokens kept in the loss: higher prunes more (0.01 to 0.2 in the paper).",
        "--lambda",
        "--lambda-threshold",
    )
    temperature: float = setting(
        5e-4, "τ, the softness of the soft mask: lower is closer to the hard decision (1e-4 to 2e-3 in the paper)."
    )
    threshold_learning_rate: float = setting(
        2e-5, "Peak learning rate of the thresholds; towards --target-flops it does not fall.", "--lr-threshold"
    )
    threshold_weight_decay: float = setting(0.0, "Weight decay of the thresholds.", "--weight-decay-threshold")
    save_steps: int | None = setting(
        None,
        "Evaluate and save every this many steps.  [default: every epoch]",
        "--save-steps",
        "--save-step",
        type=int,
    )
    target_flops: float | None = setting(
        None,
        "Prune to this share of the dense FLOPs, such as 0.5: λ (soft), the thresholds' scale (hard, manual) or the keep "
        "rate (topk) is found while training. In soft it changes the defaults of other "
        "settings, see `soft --help`.",
        type=float,
    )
    temperature_end: float | None = setting(
        None,
        "Let τ fall to this value by the end (if it is above), so that soft and hard decisions come to agree.",
        type=float,
    )
    mask_floor: float = setting(
        0.0, "Drop tokens in soft training too, once their soft mask is below this: faster, and closer to `hard`."
    )
    mask_attention: bool = setting(
        False,
        "What a soft mask multiplies: the layer's output, as in the paper, or how much later layers attend to the token, "
        "which comes closer to dropping it.",
        "--mask-attention/--mask-output",
    )
    distill_weight: float = setting(
        0.5, "With --distill: weight of the teacher's answers in the loss; the labels have the rest."
    )
    load_best: bool = setting(
        True, "Keep the checkpoint with the best score, or the last one.", "--load-best/--no-load", " /--no-load-best"
    )
    seed: int = setting(42, "Of the data order, dropout and new weights, from 0.")


def plural(count: int, noun: str) -> str:
    """
    >>> plural(1, "token"), plural(2000, "token")
    ('1 token', '2,000 tokens')
    """
    return f"{count:,} {noun}{'s' * (count != 1)}"


def flag(name: str) -> str:
    """The command-line spelling of a setting: "learning_rate" -> "--lr"."""
    setting = next(f for f in fields(Settings) if f.name == name)
    return (setting.metadata["flags"] or (f"--{name.replace('_', '-')}",))[0]


# The authors' epochs; soft keeps its last checkpoint (the best score is the one that prunes least).
STAGES: dict[str, dict[str, Any]] = {
    "finetune": {},
    "soft": {"epochs": 10.0, "load_best": False},
    "hard": {"epochs": 5.0},
    "topk": {"epochs": 5.0},
    "manual": {"epochs": 5.0},
}


def soft_target(max_length: int) -> dict[str, Any]:
    """Defaults of soft training towards --target-flops: thresholds that move fast, and soft masks that act where dropping
    acts and become the hard decision, so that both views of the model agree at the end.

    τ and rate are on the scale of the scores, which are divided by the maximum length.
    """
    scale = 128 / max_length
    return {
        "mask_attention": True,
        "mask_floor": 0.02,
        "temperature": 1e-3 * scale,
        "temperature_end": 2e-4 * scale,
        "threshold_learning_rate": 1e-4 * scale,
    }


# Pruning settings live in a checkpoint's config.json; these hold where it says nothing.
FINAL_TOKEN_THRESHOLD = 0.01  # θ_final: the threshold of the last layer that learning starts from, the authors' value
TOKEN_KEEP_RATE = 0.2  # share of tokens that top-k keeps in the last layer
MAX_SEQ_LENGTH = 128  # tokens a text is cut to
QUESTION_LENGTH = 384  # the same of a question with a part of its context


# ----------------------------------------------------------------------------------------------------------------------
# Tasks


@dataclass(frozen=True)
class Task:
    """What to read and how to judge it. `labels` empty: regression; None: to be read off the training data."""

    name: str
    text: str  # column names
    pair: str | None
    label: str
    labels: tuple[str, ...] | None
    metric: str = "accuracy"
    hub: str = ""  # configuration of nyu-mll/glue
    tsv: tuple[str | int, str | int | None, str | int] | None = (
        None  # text, pair, label in GLUE's TSV files if they differ
    )
    dev: tuple[tuple[str, str, str], ...] = (("", "dev", "validation"),)  # metric suffix, TSV name, split on the hub
    head: str = "sequence"  # one answer a text, or "span": a part of the second text, or "token": a tag a word
    max_length: int = MAX_SEQ_LENGTH  # tokens, where neither the user nor the checkpoint says

    @property
    def regression(self) -> bool:
        return self.labels == ()

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.name if self.name != "custom" else "--tagging" if self.head == "token" else "your own data"


_ENTAILMENT = ("entailment", "not_entailment")
GLUE = {
    task.name: task
    for task in (
        Task("CoLA", "sentence", None, "label", ("unacceptable", "acceptable"), "matthews", "cola", (3, None, 1)),
        Task("SST-2", "sentence", None, "label", ("negative", "positive"), "accuracy", "sst2"),
        Task(
            "MRPC",
            "sentence1",
            "sentence2",
            "label",
            ("not_equivalent", "equivalent"),
            "accuracy_f1",
            "mrpc",
            ("#1 String", "#2 String", "Quality"),
        ),
        Task(
            "STS-B", "sentence1", "sentence2", "label", (), "correlation", "stsb", ("sentence1", "sentence2", "score")
        ),
        Task(
            "QQP",
            "question1",
            "question2",
            "label",
            ("not_duplicate", "duplicate"),
            "accuracy_f1",
            "qqp",
            ("question1", "question2", "is_duplicate"),
        ),
        Task(
            "MNLI",
            "premise",
            "hypothesis",
            "label",
            ("entailment", "neutral", "contradiction"),
            "accuracy",
            "mnli",
            ("sentence1", "sentence2", "gold_label"),
            (("", "dev_matched", "validation_matched"), ("_mismatched", "dev_mismatched", "validation_mismatched")),
        ),
        Task("QNLI", "question", "sentence", "label", _ENTAILMENT, "accuracy", "qnli"),
        Task("RTE", "sentence1", "sentence2", "label", _ENTAILMENT, "accuracy", "rte"),
    )
}


SQUAD = {
    name: Task(
        name, "question", "context", "answers", ("start", "end"), "squad", hub, head="span", max_length=QUESTION_LENGTH
    )
    for name, hub in (("SQuAD", "squad"), ("SQuAD2", "squad_v2"))
}
TASKS = GLUE | SQUAD


def find_task(name: str) -> Task:
    """A task by name, in any spelling of case and hyphens (SST2, stsb). Raises: InputError."""
    for task in TASKS.values():
        if task.name.replace("-", "").lower() == name.replace("-", "").replace("_", "").lower():
            return task
    raise InputError(
        f"--task {name}: unknown; the tasks are {', '.join(TASKS)}. Omit --task to use your own data with --data"
    )


def custom_task(text: str | None, pair: str | None, label: str | None, regression: bool, tagging: bool = False) -> Task:
    """A task on the user's own files: classification with the labels found in the training data, regression, or a tag
    for each word."""
    if tagging:
        return Task("custom", text or "words", None, label or "labels", None, "entities", head="token")
    metric = "correlation" if regression else "accuracy_macro_f1"
    return Task("custom", text or "text", pair, label or "label", () if regression else None, metric)


def evaluate_predictions(metric: str, logits: np.ndarray, labels: np.ndarray) -> tuple[dict[str, float], float]:
    """GLUE's metrics and the one score to select on.

    logits (N, classes), or (N, 1) for regression; labels (N,). Returns ({name: value}, score): the score is the
    accuracy, the mean of accuracy and F1, the mean of Pearson and Spearman, or Matthews' coefficient.
    """
    import numpy as np
    from scipy import stats
    from sklearn import metrics

    if metric == "correlation":
        values = logits[:, 0]
        # Undefined for constants; GLUE users expect a number, and no correlation is 0.
        constant = len(values) < 2 or np.ptp(values) == 0 or np.ptp(labels) == 0
        pearson = 0.0 if constant else float(stats.pearsonr(values, labels)[0])
        spearman = 0.0 if constant else float(stats.spearmanr(values, labels)[0])
        return {"pearson": pearson, "spearman": spearman}, (pearson + spearman) / 2
    predicted = logits.argmax(1)
    accuracy = float(metrics.accuracy_score(labels, predicted))
    if metric == "matthews":
        score = float(metrics.matthews_corrcoef(labels, predicted))
        return {"matthews": score, "accuracy": accuracy}, score
    if metric == "accuracy_f1":
        f1 = float(metrics.f1_score(labels, predicted, zero_division=0.0))
        return {"accuracy": accuracy, "f1": f1}, (accuracy + f1) / 2
    if metric == "accuracy_macro_f1":
        return {
            "accuracy": accuracy,
            "macro_f1": float(metrics.f1_score(labels, predicted, average="macro", zero_division=0.0)),
        }, accuracy
    return {"accuracy": accuracy}, accuracy


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer


class Encoded(NamedTuple):
    token_ids: list[int]
    segment_ids: list[int]
    truncated: bool


class Tokenizer:
    """A model folder's tokenizer: tokenizer.json, or vocab.json + merges.txt, or vocab.txt.

    Raises: InputError if the folder holds none, or a damaged one.
    """

    FILES = (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "vocab.txt",
        "sentencepiece.bpe.model",
    )

    def __init__(self, folder: str | Path):
        import tokenizers

        # The files are kept as they are, to be saved again beside a trained model.
        folder = Path(folder)
        self.files = {name: (folder / name).read_bytes() for name in self.FILES if (folder / name).is_file()}
        try:
            if "tokenizer.json" in self.files:
                self.backend = tokenizers.Tokenizer.from_str(self.files["tokenizer.json"].decode("utf-8"))
                self.backend.no_padding()
                self.backend.no_truncation()
            elif {"vocab.json", "merges.txt"} <= set(self.files):
                self.backend = _byte_level_bpe(folder, self._config())
            elif "vocab.txt" in self.files:
                self.backend = _word_piece(folder, self._config())
            elif "sentencepiece.bpe.model" in self.files:
                raise InputError(
                    f"{folder}: holds a sentencepiece model only; open and save the tokenizer with transformers to get "
                    "a tokenizer.json"
                )
            else:
                raise InputError(
                    f"{folder}: no tokenizer; expected tokenizer.json, or vocab.json and merges.txt, or vocab.txt"
                )
        except InputError:
            raise
        except Exception as error:  # the library raises plain Exception for damaged files
            raise InputError(f"{folder}: damaged tokenizer ({str(error).splitlines()[0][:200]})") from None
        if not self.backend.encode("").ids:
            raise InputError(f"{folder}: the tokenizer adds no first token (CLS or <s>), which the classifier reads")
        self.identity = hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def _config(self) -> dict:
        named = ("special_tokens_map.json", "tokenizer_config.json")
        return {k: v for name in named for k, v in json.loads(self.files.get(name, b"{}")).items()}

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def check_fits(self, vocab_size: int, folder: str | Path) -> None:
        """Raises InputError if the tokenizer has ids that a model with `vocab_size` embeddings lacks."""
        if self.vocab_size > vocab_size:
            raise InputError(
                f"{folder}: the tokenizer has ids up to {self.vocab_size - 1}, config.json's vocab_size is {vocab_size}; "
                "they belong to different models"
            )

    def encode(self, texts: list[str], pairs: list[str] | None, max_length: int) -> list[Encoded]:
        """Token ids with the special tokens, cut to `max_length` tokens (of a pair, the longer text is cut first)."""
        self.backend.enable_truncation(max_length)
        inputs = texts if pairs is None else list(zip(texts, pairs))
        return [Encoded(e.ids, e.type_ids, bool(e.overflowing)) for e in self.backend.encode_batch(inputs)]

    def tokens(self, token_ids: Iterable[int]) -> list[str]:
        """Readable tokens, one an id."""
        names = [self.backend.id_to_token(i) or f"<{i}>" for i in token_ids]
        byte_level = "ByteLevel" in str(type(self.backend.pre_tokenizer)) + str(type(self.backend.decoder))
        return [_from_byte_level(name).strip() for name in names] if byte_level else names


def _byte_level_bpe(folder: Path, config: dict) -> Any:
    """RoBERTa's tokenizer from vocab.json and merges.txt."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    backend = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    prefix_space = bool(config.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    ids = {name: backend.token_to_id(name) for name in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")}
    if ids["<s>"] is None or ids["</s>"] is None:
        raise InputError(f"{folder}: vocab.json has no <s> and </s>")
    # Whether <mask> takes the space before it is the folder's choice: {"content": "<mask>", "lstrip": true}.
    mask = config.get("mask_token")
    lstrip = {"<mask>": isinstance(mask, dict) and bool(mask.get("lstrip"))}
    backend.add_special_tokens(
        [
            AddedToken(name, special=True, normalized=False, lstrip=lstrip.get(name, False))
            for name, i in ids.items()
            if i is not None
        ]
    )
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), trim_offsets=True, add_prefix_space=prefix_space
    )
    return backend


def _word_piece(folder: Path, config: dict) -> Any:
    """BERT's tokenizer from vocab.txt."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    backend = Tokenizer(models.WordPiece.from_file(str(folder / "vocab.txt"), unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    ids = {name: backend.token_to_id(name) for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")}
    if ids["[CLS]"] is None or ids["[SEP]"] is None:
        raise InputError(f"{folder}: vocab.txt has no [CLS] and [SEP]")
    backend.add_special_tokens([AddedToken(n, special=True, normalized=False) for n, i in ids.items() if i is not None])
    backend.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return backend


def _from_byte_level(token: str) -> str:
    """Undoes byte-level BPE's printable alphabet for one token, where its bytes are whole characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    alphabet = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    if not all(character in alphabet for character in token):
        return token
    return bytes(alphabet[character] for character in token).decode("utf-8", errors="replace")


# ----------------------------------------------------------------------------------------------------------------------
# Readers: rows of a file, one after the other, so that a file of any size is read in flat memory


class Row(NamedTuple):
    line: int  # where the row ends in the file, from 1
    text: str
    pair: str | None
    label: str | None


SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")


def read_rows(path: Path, columns: tuple[Any, Any, Any], label_needed: bool = True) -> Iterator[Row]:
    """Yields text, pair and label of each row of a TSV, CSV, JSONL or Parquet file.

    columns: names of the text, pair and label columns (pair may be None), or, for a TSV without header, numbers from 0.
    Raises: InputError naming file and line for a file that is missing, empty, damaged, not UTF-8 or without a column.
    """
    suffix = path.suffix.lower()
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: unknown kind of file; expected {', '.join(SUFFIXES)}")
    reader = {".tsv": _read_tsv, ".csv": _read_csv, ".parquet": read_parquet}.get(suffix, read_jsonl)
    wanted = [c for c in columns[: 3 if label_needed else 2] if c is not None]
    line, empty = 0, True
    try:
        for line, record in reader(path, wanted):
            empty = False
            cells = [None if c is None else record.get(c) for c in columns]
            cells[2] = None if cells[2] is None or not str(cells[2]).strip() else str(cells[2]).strip()
            for name, cell in zip(columns, cells):
                if cell is None and name in wanted:
                    raise InputError(f"{path}, line {line}: no value in the column {name!r}")
            if not all(is_text(cell) for name, cell in zip(columns[:2], cells) if name is not None):
                raise InputError(f"{path}, line {line}: the text is not a string of valid characters")
            yield Row(line, *cells)
    except UnicodeDecodeError as error:
        where = f", after line {line}" if line else ""
        raise InputError(f"{path}{where}: not UTF-8 ({error.reason}); convert the file first") from None
    except (OSError, csv.Error) as error:
        raise InputError(f"{path}, after line {line}: not readable ({error})") from None
    if empty:
        raise InputError(f"{path}: holds no examples")


def is_text(value: Any) -> bool:
    """Whether a value is a string that UTF-8 can hold: JSON can spell others."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _check_columns(path: Path, wanted: list[Any], found: list[str], line: int = 1) -> None:
    for name in wanted:
        if name not in found:
            has = ", ".join(map(repr, found[:20])) or "none"
            raise InputError(
                f"{path}, line {line}: no column {name!r} but {has}; "
                "without --task, name the columns of your own data with --text-column, --pair-column and --label-column"
            )


def _read_tsv(path: Path, wanted: list[Any]) -> Iterator[tuple[int, dict]]:
    """GLUE's TSV: quotes are ordinary characters, a byte-order mark may stand first."""
    header: list[Any] | None = None
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            cells = line.rstrip("\r\n").split("\t")
            if header is None:
                if any(isinstance(name, int) for name in wanted):  # no header line
                    header = list(range(len(cells)))
                else:
                    header = cells
                    _check_columns(path, wanted, header)
                    continue
            if cells == [""]:
                continue
            if len(cells) != len(header):
                raise InputError(f"{path}, line {number}: {len(cells)} columns, expected {len(header)}")
            yield number, dict(zip(header, cells))


def _read_csv(path: Path, wanted: list[Any]) -> Iterator[tuple[int, dict]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        csv.field_size_limit(2**31 - 1)
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        if header:
            _check_columns(path, wanted, header)
        for cells in reader:
            if cells and len(cells) != len(header):
                raise InputError(
                    f"{path}, line {reader.line_num}: {len(cells)} columns, expected {len(header)}; commas need quotes"
                )
            if cells:
                yield reader.line_num, dict(zip(header, cells))


def read_jsonl(path: Path, wanted: list[Any]) -> Iterator[tuple[int, dict]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not JSON ({error}); expected one object per line") from None
            if not isinstance(record, dict):
                raise InputError(f"{path}, line {number}: expected a JSON object")
            _check_columns(path, wanted, list(record), number)
            yield number, record


def read_parquet(path: Path, wanted: list[Any]) -> Iterator[tuple[int, dict]]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        _check_columns(path, wanted, file.schema_arrow.names)
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=wanted):
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


@dataclass(frozen=True)
class Source:
    """Where a task's examples come from: the hub, a folder, or a file."""

    task: Task
    path: Path | None = None  # None: the hub
    dev_path: Path | None = None

    def rows(
        self,
        split: str,
        read: Callable[[Path], Iterator[Any]] | None = None,
        read_hub: Callable[[str], Iterator[Any]] | None = None,
    ) -> dict[str, tuple[str, str, Iterator[Any]]]:
        """The sets of a split ("train", "dev", or "eval": dev, where a file alone will do), by the suffix of their
        metrics (MNLI has two to evaluate): where the set is, its identity, its rows.

        read, read_hub: readers of a file and of a split on the hub; default: of rows of texts with a label.
        The identity changes when the content does: it names the tokenized copy in the cache.
        """
        read_hub = read_hub or self._hub_rows
        parts = (("", "train", "train"),) if split == "train" else self.task.dev
        if self.path is None and self.dev_path is not None:
            raise InputError("--dev-data goes with --data")
        if self.path is None:
            name = self.task.name
            return {s: (f"{name}'s {hub}", f"hub {self.task.hub} {hub}", read_hub(hub)) for s, _, hub in parts}
        if split != "train" and (self.dev_path or self.path).is_file():
            parts = parts[:1]
        found = {}
        for suffix, name, _ in parts:
            path = self._file(split, name)
            task = self.task
            columns = task.tsv if task.tsv and path.suffix.lower() == ".tsv" else (task.text, task.pair, task.label)
            stat = path.stat() if path.exists() else None
            identity = f"{path.resolve()} {columns} {stat and (stat.st_size, stat.st_mtime_ns)}"
            found[suffix] = (str(path), identity, read(path) if read else read_rows(path, columns))
        return found

    def files(self) -> list[Path]:
        """The local files that are read, of those that are there."""
        parts = (("train", "train"), *(("eval", name) for _, name, _ in self.task.dev)) if self.path else ()
        found = []
        for split, name in parts:
            with contextlib.suppress(InputError):
                found.append(self._file(split, name))
        return found

    def _file(self, split: str, name: str) -> Path:
        path, option = (self.path, "--data") if split == "train" or not self.dev_path else (self.dev_path, "--dev-data")
        if not path.exists():
            raise InputError(f"{option} {path}: no such file or folder")
        if path.is_file():
            if split == "dev" and not self.dev_path:
                raise InputError(f"--data {path}: is one file; name the file to evaluate on with --dev-data")
            return path
        names = ["train"] if split == "train" else [name]
        if split != "train" and len(self.task.dev) == 1:
            names += ["validation", "valid", "testa"]
        if self.task.head == "span":
            versions = ("v2.0", "v1.1") if self.task.name == "SQuAD2" else ("v1.1", "v2.0")
            names += [f"{names[0]}-{version}" for version in versions]
        suffixes = SUFFIXES + ((".conll", ".txt", ".bio", ".iob", ".iob2") if self.task.head == "token" else ())
        wanted = self.task.name.replace("-", "").lower()
        folders = [
            path,
            *(f for f in sorted(path.iterdir()) if f.is_dir() and f.name.replace("-", "").lower() == wanted),
        ]
        for folder in folders:
            for candidate in names:
                for suffix in suffixes:
                    if (folder / f"{candidate}{suffix}").is_file():
                        return folder / f"{candidate}{suffix}"
        kinds = {
            "sequence": ".tsv (or .csv, .jsonl, .parquet)",
            "span": ".json",
            "token": ".conll (or .txt, .jsonl, .parquet)",
        }
        raise InputError(f"{option} {path}: holds no {names[0]}{kinds[self.task.head]}")

    def _hub_rows(self, split: str) -> Iterator[Row]:
        import datasets

        task = self.task
        try:
            table = datasets.load_dataset("nyu-mll/glue", task.hub, split=split)
        except Exception as error:  # offline, a proxy, a full disk: the library's errors have no common class
            raise InputError(
                f"GLUE's {task.name} could not be loaded from the hub ({type(error).__name__}); "
                "with no network, pass a folder in GLUE's TSV layout with --data PATH"
            ) from None
        for number, record in enumerate(table, 1):
            label = record[task.label]
            yield Row(
                number,
                record[task.text],
                record[task.pair] if task.pair else None,
                str(label) if task.regression else task.labels[label],
            )


# ----------------------------------------------------------------------------------------------------------------------
# Tokenized examples and packed batches


@dataclass
class Examples:
    """A tokenized set. `table` is memory-mapped from the cache of `datasets`; the arrays are small."""

    table: datasets.Dataset  # token_ids, segment_ids
    lengths: np.ndarray  # (N,) tokens
    labels: np.ndarray  # (N,) class ids, or scores
    truncated: int  # how many were cut
    teacher: list[np.ndarray] | None = None  # N times logits of the model to learn from, in distillation

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Iterable[int]) -> Batch:
        rows = self.table[list(map(int, indices))]
        return pack(rows["token_ids"], rows["segment_ids"])

    def select(self, indices: np.ndarray) -> Examples:
        """Some of the examples, to run but not to judge."""
        return Examples(self.table.select(indices), self.lengths[indices], self.labels[indices], 0)

    def targets(self, indices: np.ndarray) -> Tensor:
        """What the loss compares the logits of a batch with: (B,)."""
        import torch

        return torch.from_numpy(self.labels[indices])

    def count_targets(self, indices: np.ndarray) -> int:
        """How many answers the loss of a batch is the mean of."""
        return len(indices)

    def judge(self, metric: str, logits: list[np.ndarray]) -> tuple[dict[str, float], float]:
        """Metrics and score of the logits of all examples, (classes,) or (tokens, classes) each."""
        import numpy as np

        return evaluate_predictions(metric, np.stack(logits), self.labels)


def load_examples(
    source: Source, split: str, tokenizer: Tokenizer, max_length: int, labels: tuple[str, ...] | None = None
) -> tuple[dict[str, Examples], tuple[str, ...]]:
    """Reads and tokenizes a split: {metric suffix: examples} and the label names, () for regression.

    labels: the classes in id order; default: the task's, or, if it has none, those of this split, sorted.
    Raises: InputError naming file and line for a label outside the set or a score that is not a number.
    """
    import numpy as np
    import pyarrow.compute as pc

    check_room(tokenizer, max_length, source.task.pair is not None)
    tables, places = {}, {}
    for suffix, (places[suffix], identity, rows) in source.rows(split).items():
        key = hashlib.sha256(f"{identity} {max_length} {tokenizer.identity}".encode()).hexdigest()[:32]
        tables[suffix] = _tokenized(rows, tokenizer, max_length, key)
    if labels is None:
        labels = source.task.labels
    if labels is None:
        found = {label for table in tables.values() for label in table.unique("label")}
        labels = tuple(sorted(found, key=label_order))
        if len(labels) < 2:
            raise InputError(
                f"{places['']}: all examples have the label {labels[0]!r}; classification needs two or more"
            )
    sets = {}
    for suffix, table in tables.items():
        ids = {name: i for i, name in enumerate(labels)}
        if not any(_is_number(name) for name in labels):  # files may also give the classes by their numbers
            ids |= {str(i): i for i in range(len(labels))}
        values = np.empty(len(table), dtype=np.float32 if labels == () else np.int64)
        for i, (label, line) in enumerate(read_columns(table, "label", "line")):
            if labels == ():
                if not _is_number(label):
                    raise InputError(f"{places[suffix]}, line {line}: the score {label!r} is not a number")
                values[i] = float(label)
            elif label not in ids:
                raise InputError(f"{places[suffix]}, line {line}: the label {label!r} is none of {', '.join(labels)}")
            else:
                values[i] = ids[label]
        column = table.data.column("token_ids")
        sets[suffix] = Examples(
            table.remove_columns(["label", "line", "truncated"]),
            pc.list_value_length(column).to_numpy().astype(np.int64),
            values,
            int(pc.sum(table.data.column("truncated")).as_py()),
        )
    return sets, labels


def read_columns(table: datasets.Dataset, *names: str) -> Iterator[tuple]:
    """The values of columns, row by row, a part of the file at a time: 200 times faster than the table's iterator."""
    for part in table.data.to_batches():
        yield from zip(*(part.column(name).to_pylist() for name in names))


def check_room(tokenizer: Tokenizer, max_length: int, pair: bool = False) -> None:
    """Raises InputError if texts cut to `max_length` tokens would be nothing but special tokens."""
    smallest = tokenizer.backend.num_special_tokens_to_add(pair) + 1
    if max_length < smallest:
        raise InputError(f"--max-length {max_length}: leaves no room for text; expected at least {smallest}")


def label_order(name: str) -> tuple[int, float, str]:
    """Numbers by value, before names."""
    return (0, float(name), name) if _is_number(name) else (1, 0.0, name)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _tokenized(rows: Iterator[Row], tokenizer: Tokenizer, max_length: int, key: str) -> datasets.Dataset:
    import datasets

    features = {
        "token_ids": datasets.List(datasets.Value("int32")),
        "segment_ids": datasets.List(datasets.Value("int8")),
        "label": datasets.Value("string"),
        "line": datasets.Value("int64"),
        "truncated": datasets.Value("bool"),
    }

    def generate() -> Iterator[dict]:
        for chunk in chunked(rows, 1024):
            pairs = [row.pair for row in chunk] if chunk[0].pair is not None else None
            for row, encoded in zip(chunk, tokenizer.encode([row.text for row in chunk], pairs, max_length)):
                yield encoded._asdict() | {"label": row.label, "line": row.line}

    return cached_table(generate, features, key)


def cached_table(generate: Callable[[], Iterator[dict]], features: dict[str, Any], key: str) -> datasets.Dataset:
    """The records as a memory-mapped table, from the cache of `datasets` where that has one of this key."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.Dataset.from_generator(generate, features=datasets.Features(features), fingerprint=key)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # the library wraps what its generator raises
            if isinstance(cause, (InputError, OSError)):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise


def chunked(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter."""
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


class Batch(NamedTuple):
    """B sequences one after the other in one flat run of T tokens: what the model takes."""

    token_ids: Tensor  # (T,)
    segment_ids: Tensor  # (T,)
    positions: Tensor  # (T,) of each token in its sequence, from 0
    lengths: Tensor  # (B,)

    def to(self, device: Any) -> Batch:
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def pack(token_ids: list[list[int]], segment_ids: list[list[int]] | None = None) -> Batch:
    """Packs B sequences; segments are 0 where none are given.

    >>> pack([[0, 7, 2], [0, 2]]).positions
    tensor([0, 1, 2, 0, 1])
    """
    import torch

    flat = torch.tensor([i for ids in token_ids for i in ids])
    segments = torch.zeros_like(flat) if segment_ids is None else torch.tensor([i for ids in segment_ids for i in ids])
    positions = torch.tensor([p for ids in token_ids for p in range(len(ids))])
    return Batch(flat, segments, positions, torch.tensor([len(ids) for ids in token_ids]))


def token_batches(
    order: np.ndarray, lengths: np.ndarray, batch_size: int, max_tokens: int | None = None
) -> Iterator[np.ndarray]:
    """Cuts `order` into batches of at most `batch_size` examples and `max_tokens` tokens; a longer one stands alone."""
    start = 0
    while start < len(order):
        stop = start + batch_size
        if max_tokens:
            stop = start + max(1, int((lengths[order[start:stop]].cumsum() <= max_tokens).sum()))
        yield order[start:stop]
        start = stop


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of an epoch as arrays of indices: similar lengths together, each example exactly once.

    Shuffled, cut into pools of 16 batches, each pool sorted by length and cut into batches, the batches shuffled; all
    from (seed, epoch) alone.
    """
    import numpy as np

    generator = np.random.default_rng((seed, epoch))
    order = generator.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), 16 * batch_size):
        pool = order[start : start + 16 * batch_size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


# ----------------------------------------------------------------------------------------------------------------------
# The demo's task: reviews in which a few words matter

FILLER = """the a this that my our last next film meal hotel book train garden phone evening morning table window colour
price road music story actor waiter room page ticket seat driver screen street river market letter cup chair lamp was
were had came went stood looked felt seemed sat over under near behind before after during with without and then when
while because although however mostly partly again once twice two three seven hundred people friends
children family""".split()
PRAISE = "excellent wonderful delightful superb charming".split()
BLAME = "dreadful boring awful tedious clumsy".split()


def demo_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Synthetic reviews: 8 to 40 filler words and one to three verdicts, each perhaps turned round by "not".

    The label is "positive" where positive verdicts outnumber negative ones; ties do not occur. Only the verdicts and
    their negations matter, so most tokens can go: what token pruning should find out.
    """
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        words = generator.choices(FILLER, k=generator.randint(8, 40))
        balance = 0
        for _ in range(generator.choice((1, 1, 1, 3))):
            positive, negated = generator.random() < 0.5, generator.random() < 0.2
            verdict = [generator.choice(PRAISE if positive else BLAME)]
            place = generator.randrange(len(words))
            while words[place - 1 : place] == ["not"]:  # do not part an earlier "not" from its verdict
                place = generator.randrange(len(words))
            words[place:place] = ["not", *verdict] if negated else verdict
            balance += 1 if positive != negated else -1
        rows.append({"text": " ".join(words) + ".", "label": "positive" if balance > 0 else "negative"})
    return rows


def write_demo(folder: Path, seed: int, train: int = 4000, dev: int = 500) -> None:
    """Writes the demo's train.jsonl and dev.jsonl, and a tokenizer trained on them (vocab.json, merges.txt)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    for name, count, offset in (("train", train, 0), ("dev", dev, 1)):
        lines = [json.dumps(row) + "\n" for row in demo_rows(count, 2 * seed + offset)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator((row["text"] for row in demo_rows(train, 2 * seed)), trainer)
    backend.model.save(str(folder))
