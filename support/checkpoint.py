"""Reads and writes Hugging Face model folders, strictly: each error names the file, the key or tensor, and a remedy.

Top to bottom: the checks of a config.json, finding a folder, reading weights, `load_model`, `save_model`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model import (
    ACTIVATIONS,
    FAMILY,
    OUR_NAMES,
    THRESHOLDS,
    Config,
    Head,
    Model,
    TokenHead,
    initialize,
    tensor_names,
    threshold_ladder,
)
from support.errors import DISK_FULL, InputError, plural
from support.files import file_digest, not_written, write_file, write_text
from support.onnx_file import GRAPH, OnnxModel, model_name, open_file

# ----------------------------------------------------------------------------------------------------------------------
# config.json

PRUNE_MODES = ("absolute_threshold", "topk", None)
SCORE_NORMS = ("max_length", "length")

# Keys that select another architecture, and the one value that this encoder implements (or null).
ONLY_VALUES = {"position_embedding_type": "absolute"} | dict.fromkeys(("is_decoder", "add_cross_attention"), False)
ENCODER_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
REQUIRED_SIZES = ("vocab_size", *ENCODER_SIZES, "max_position_embeddings")
OPTIONAL_SIZES = ("type_vocab_size", "max_seq_length")
NUMBERS = {  # lowest and highest value
    "layer_norm_eps": (0, 1),
    "initializer_range": (0, 10),
    "hidden_dropout_prob": (0, 1),
    "attention_probs_dropout_prob": (0, 1),
    "classifier_dropout": (0, 1),
    "final_token_threshold": (-math.inf, math.inf),
    "token_keep_rate": (-math.inf, 1),
}
CHOICES = {"hidden_act": tuple(ACTIVATIONS), "prune_mode": PRUNE_MODES, "score_norm": SCORE_NORMS}


def check_config(raw: Any, where: str = "config.json") -> Config:
    """Checks the content of a config.json and converts it.

    Raises: InputError naming the file, the key and the value, for a missing key, a value of a wrong type or out of
    range, or a setting that this encoder does not have.
    """
    if not isinstance(raw, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(raw).__name__}")
    check_architecture(raw, where)
    check_sizes(raw, where)
    check_numbers(raw, where)
    check_choices(raw, where)
    check_labels(raw, where)
    raw = raw | {key: float(raw[key]) for key in NUMBERS if raw.get(key) is not None}
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raw["architectures"] = None  # names no head
    config = Config.from_dict(raw)
    if config.max_tokens < 2:
        raise bad_value(raw, where, "max_position_embeddings", "leaves no room for a sequence")
    return config


def bad_value(raw: dict, where: str, key: str, remedy: str) -> InputError:
    """The error for a key of a config.json."""
    return InputError(f"{where}: {key} = {raw.get(key)!r}: {remedy}")


def check_architecture(raw: dict, where: str) -> None:
    """Raises InputError for a model that this encoder does not compute as `transformers` does."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILY:
        raise bad_value(raw, where, "model_type", f"supported are {', '.join(FAMILY)}")
    for key, supported in ONLY_VALUES.items():
        if raw.get(key) not in (supported, None):
            raise bad_value(raw, where, key, f"not supported, only {json.dumps(supported)} is")
    if raw.get("quant_mode") not in (False, None):
        remedy = "integer-only inference is not implemented, use the floating-point checkpoint"
        raise bad_value(raw, where, "quant_mode", remedy)
    if raw.get("problem_type") == "multi_label_classification":
        raise bad_value(raw, where, "problem_type", "not supported, one label per example is")
    names = raw.get("id2label")
    outputs = len(names) if isinstance(names, dict) else raw.get("num_labels", 2)
    if raw.get("problem_type") == "regression" and outputs != 1:
        raise bad_value(raw, where, "problem_type", f"not supported with {outputs} outputs, one score per example is")
    if raw.get("pruned_heads"):
        raise bad_value(raw, where, "pruned_heads", "not supported, only models with all their heads are")


def check_sizes(raw: dict, where: str) -> None:
    """Raises InputError for a missing size, or one that is not a positive whole number."""
    for key in (*REQUIRED_SIZES, *OPTIONAL_SIZES):
        if key not in raw and key in OPTIONAL_SIZES:
            continue
        if key not in raw:
            raise InputError(f"{where}: the key {key} is missing")
        if type(raw[key]) is not int or not 1 <= raw[key] < 2**31:
            raise bad_value(raw, where, key, "expected a whole number of at least 1")
    pad = raw.get("pad_token_id")
    if pad is None:
        pad = 1 if FAMILY[raw["model_type"]] == "roberta" else 0
    if type(pad) is not int or not 0 <= pad < raw["vocab_size"]:
        raise bad_value(raw, where, "pad_token_id", "expected a token id below vocab_size")
    if raw["hidden_size"] % raw["num_attention_heads"]:
        remedy = f"not a multiple of num_attention_heads = {raw['num_attention_heads']}"
        raise bad_value(raw, where, "hidden_size", remedy)


def check_numbers(raw: dict, where: str) -> None:
    """Raises InputError for a rate, threshold or epsilon that is not a number in its range, or rates of some layers."""
    for key, (low, high) in NUMBERS.items():
        if key not in raw or key == "classifier_dropout" and raw[key] is None:
            continue
        if type(raw[key]) not in (int, float) or not low <= raw[key] <= high or abs(raw[key]) > 1e6:
            limits = "" if high == math.inf else f" of at most {high}" if low == -math.inf else f" from {low} to {high}"
            raise bad_value(raw, where, key, f"expected a number{limits}")

    rates = raw.get("keep_rates")
    shares = isinstance(rates, list) and all(type(rate) in (int, float) and 0 <= rate <= 1 for rate in rates)
    if rates is not None and not (shares and len(rates) == raw["num_hidden_layers"]):
        raise bad_value(raw, where, "keep_rates", "expected a number from 0 to 1 for each layer")


def check_choices(raw: dict, where: str) -> None:
    """Raises InputError for a name that is none of those supported, or a flag that is not true or false."""
    for key, supported in CHOICES.items():
        if key in raw and (not isinstance(raw[key], str | None) or raw[key] not in supported):
            names = ", ".join("null" if name is None else name for name in supported)
            raise bad_value(raw, where, key, f"supported are {names}")
    for key in ("protect_question", "read_dropped"):
        if type(raw.get(key, False)) is not bool:
            raise bad_value(raw, where, key, "expected true or false")


def check_labels(raw: dict, where: str) -> None:
    """Raises InputError unless id2label, or num_labels where it is absent, gives each output a name of its own."""
    names = raw.get("id2label")
    if names is None:
        count = raw.get("num_labels", 2)
        if type(count) is not int or not 1 <= count <= 10**6:
            raise bad_value(raw, where, "num_labels", "expected a whole number of at least 1")
        return
    valid = isinstance(names, dict) and names and all(type(name) in (str, int, float, bool) for name in names.values())
    if not valid or set(names) != {str(i) for i in range(len(names))}:
        raise bad_value(raw, where, "id2label", 'expected a name, or a number, for each id from "0" on without a gap')
    if len({str(name) for name in names.values()}) < len(names):
        raise bad_value(raw, where, "id2label", "two classes have one name; rename one")


def load_config(folder: str | Path) -> Config:
    """Reads and checks the folder's config.json. Raises: InputError."""
    path = Path(folder) / "config.json"
    if not path.parent.is_dir():
        raise InputError(f"{folder}: no such model folder")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found; a model folder has config.json, its weights and its tokenizer") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    return check_config(raw, str(path))


# ----------------------------------------------------------------------------------------------------------------------
# Folders and their weights

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def folder_digest(folder: Path) -> str:
    """A digest of a model's configuration and weights: the content of the files, not their names."""
    path = weights_file(folder)
    files = [folder / "config.json", *([path] if path.suffix != ".json" else shard_files(path))]
    return hashlib.sha256(" ".join(file_digest(file) for file in files if file.is_file()).encode()).hexdigest()[:16]


def find_model(name: str, option: str = "--restore") -> Path:
    """The folder of a model: `name` itself, what an exported file holds (see onnx_file.py), or a hub model's copy in
    the local cache, downloaded if it is not there.

    A hub name may give a revision (branch, tag or commit): "name@revision".
    Raises: InputError, naming the command line's `option`, if there is neither.
    """
    hub_name = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?", name)
    if name.endswith(".onnx") and Path(name).is_file():
        return open_file(Path(name))
    if Path(name).exists() or not hub_name:
        return Path(name)
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, revision = hub_name.groups()
    patterns = ["*.json", "*.txt", "model*.safetensors"]
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
        if not any(folder.glob("model*.safetensors")):
            patterns.append("pytorch_model*.bin")
            folder = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
        return folder
    except LocalEntryNotFoundError:
        raise InputError(
            f"{option} {name}: no such folder here, nor a copy of it from the hub, which cannot be reached"
        ) from None
    except Exception as error:  # unknown or private: the library's errors have no common class
        if getattr(error, "errno", None) in DISK_FULL:
            raise not_written(Path(constants.HF_HUB_CACHE), error) from None
        raise InputError(
            f"{option} {name}: no such folder here, and the hub gave no model of that name"
            f"{' and revision' if revision else ''} ({type(error).__name__})"
        ) from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder: model.safetensors, or else pytorch_model.bin, each in one file or in shards.

    Raises: InputError for a missing or damaged file. Pickles are read with weights_only=True: they cannot run code.
    """
    path = weights_file(folder)
    tensors = {}
    for shard in [path] if path.suffix != ".json" else shard_files(path):
        try:
            tensors |= read_safetensors(shard) if ".safetensors" in path.name else read_pickle(shard)
        except FileNotFoundError:
            raise InputError(f"{shard}: not found, though {path.name} names it") from None
        except Exception as error:  # a damaged file raises whatever its reader meets first
            reason = str(error).strip().split("\n")[0][:200]
            raise InputError(f"{shard}: damaged or not a weights file ({type(error).__name__}: {reason})") from None
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()):
        raise InputError(f"{path}: holds more than named tensors; expected a state dict")
    return tensors


def weights_file(folder: Path) -> Path:
    """The file of a folder's weights, or the index of its shards. Raises: InputError if there is none."""
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None and (folder / GRAPH).exists():
        raise InputError(f"{(folder / GRAPH).resolve()}: an exported model cannot change; use its checkpoint here")
    if path is None:
        raise InputError(f"{folder}: no weights; expected model.safetensors or pytorch_model.bin")
    return path


def shard_files(index: Path) -> list[Path]:
    """The files that an index of shards names. Raises: InputError for a damaged index."""
    try:
        return sorted({index.parent / shard for shard in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index}: not a shard index ({type(error).__name__}: {error})") from None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def read_pickle(path: Path) -> dict[str, Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True)


def usual_name(name: str, family: str) -> str:
    """A tensor's name as today's `transformers` spells it.

    >>> usual_name("module.bert.pooler.dense.bias", "bert")  # saved from a wrapped model
    'bert.pooler.dense.bias'
    >>> usual_name("ltp.embeddings.LayerNorm.gamma", "roberta"), usual_name("encoder.layer.0.output.dense.bias", "bert")
    ('roberta.embeddings.LayerNorm.weight', 'bert.encoder.layer.0.output.dense.bias')
    """
    if name in OUR_NAMES.values():
        return name
    name = re.sub(r"^((module|_orig_mod)\.)+", "", name)  # DistributedDataParallel, torch.compile
    # Conversions from TensorFlow call a norm's weight gamma and its bias beta.
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
    # Bare encoders have no prefix; I-BERT and the authors' LTP have their own.
    return re.sub(r"^(roberta|bert|ibert|ltp)\.|^(?=(embeddings|encoder|pooler)\.)", f"{family}.", name)


def release_thresholds(tensors: dict[str, Tensor], config: Config, folder: Path) -> Tensor | None:
    """Removes the thresholds of the authors' release from `tensors` and returns them (L,); None if there are none.

    Their layers count from 0 and hold learned offsets: θ_l = θ_final · l / L + keep_threshold_l. The release compares
    scores with max(1e-5, θ_l), so the result is at least 1e-5.
    Raises: InputError if a layer has no offset, an offset is not one finite number, or θ_final is unknown.
    """
    names = {}
    for name in tensors:
        match = re.search(r"\bencoder\.layer\.(\d+)\..*\bkeep_threshold$", name)
        if match:
            names[int(match[1])] = name
    if not names:
        return None
    L = config.num_hidden_layers
    if sorted(names) != list(range(L)):
        raise InputError(f"{folder}: has {names[max(names)]}, but not one keep_threshold for each layer")
    final = config.other.get("final_token_threshold")
    if final is None:
        raise InputError(f"{folder}/config.json: final_token_threshold is missing; the thresholds are offsets to it")
    for name in names.values():
        if tensors[name].numel() != 1 or not tensors[name].isfinite().all():
            raise InputError(f"{folder}: the tensor {name} is not one finite number")
    offsets = torch.stack([tensors.pop(names[l]).float().flatten()[0] for l in range(L)])
    return (final * torch.arange(L) / L + offsets).clamp(min=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Loading


class Loaded(NamedTuple):
    """What `load_model` returns."""

    model: Model | OnnxModel
    has_thresholds: bool  # whether the folder held thresholds
    notes: list[str]  # what the user should know


# Tensors that a folder may hold and this encoder does not need: pretraining heads, a pooler that the head does not
# read, position indices, and I-BERT's quantization buffers.
UNUSED = re.compile(
    r"^(lm_head|cls|qa_outputs)\.|^(roberta|bert)\.pooler\.|(^|\.)position_ids$|"
    r"\.(x_min|x_max|act_scaling_factor|weight_integer|weight_scaling_factor|bias_integer|fc_scaling_factor|shift)$"
)


def load_model(folder: str | Path, labels: tuple[str, ...] | None = None, new_head: bool = False, **changes) -> Loaded:
    """Reads a model folder: in float32, on the CPU, in evaluation mode.

    labels: names of the classes in the head's order; default: the folder's. If the folder has the same names in another
        order, the head's rows are permuted.
    new_head: a folder without a head, or with one for another number of classes, gets a new one and a note; otherwise
        that is an error.
    changes: fields of the configuration to replace.
    Raises: InputError naming file and tensor if one is missing, unknown, of a wrong shape or not finite.
    """
    folder = Path(folder)
    saved = load_config(folder)
    if (folder / GRAPH).exists() and not (new_head or changes):
        return load_graph(folder, saved, saved.labels if labels is None else tuple(labels))
    config = replace(saved, **changes)
    tensors = {}
    for name, tensor in read_tensors(folder).items():
        if (usual := usual_name(name, config.family)) in tensors:
            raise InputError(f"{folder}: the weights hold {usual} twice, once as {name}")
        tensors[usual] = tensor
    if saved.read_dropped and not config.read_dropped:
        tensors.pop(OUR_NAMES["head.dropped"], None)
    labels = config.labels if labels is None else tuple(labels)
    outputs = len(config.labels) if config.head == saved.head and output_name(config) in tensors else None
    if outputs == len(labels):
        fresh = {}
        note = match_labels(tensors, config, labels)
    elif new_head:
        fresh = fresh_head(tensors, replace(config, labels=labels))
        reason = "the folder has none" if outputs is None else f"the folder's has {plural(outputs, 'output')}"
        note = f"the {head_title(config)} is new, with {plural(len(labels), 'output')}: {reason}"
    else:
        reason = "is missing" if outputs is None else f"has {plural(outputs, 'output')}, not {len(labels)}"
        title = f"{head_title(config)} ({output_name(config)})"
        raise InputError(f"{folder}: the {title} {reason}; fine-tune this model on the task first")
    config = replace(config, labels=labels)
    if THRESHOLDS not in tensors:
        thresholds = release_thresholds(tensors, config, folder)
        if thresholds is not None:
            tensors[THRESHOLDS] = thresholds
    has_thresholds = THRESHOLDS in tensors
    notes = [note] if note else []
    if saved.read_dropped and config.read_dropped and not fresh and OUR_NAMES["head.dropped"] not in tensors:
        notes.append("the folder has no map of dropped tokens (ltp.dropped): it starts at 0")
    fresh["thresholds"] = threshold_ladder(config.final_token_threshold, config.num_hidden_layers)
    fresh["head.dropped"] = torch.zeros(config.hidden_size, 2 * config.hidden_size)

    with torch.device("meta"):  # no time or memory for weights that are replaced at once
        model = Model(config)
    model.load_state_dict(make_state(model, tensors, fresh, folder), assign=True)
    refuse_unknown(tensors, config, folder)
    model.requires_grad_(True).thresholds.requires_grad_(False)
    return Loaded(model.eval(), has_thresholds, notes)


def load_graph(folder: Path, config: Config, labels: tuple[str, ...]) -> Loaded:
    """The exported model of an opened file. Raises: InputError."""
    if len(labels) != len(config.labels):
        raise InputError(f"{model_name(folder)}: has {plural(len(config.labels), 'output')}, not {len(labels)}")
    order = {output_name(config): torch.arange(len(labels))}  # in place of a head's rows
    note = match_labels(order, config, labels)
    config = replace(config, labels=labels)
    model = OnnxModel(config, folder / GRAPH, order[output_name(config)].tolist())
    return Loaded(model.eval(), True, [note] if note else [])


def head_title(config: Config) -> str:
    """What messages call the head."""
    return "classification head" if config.head == "sequence" else f"{config.head} head"


def output_name(config: Config) -> str:
    """The name of the head's last weight in a model folder."""
    return tensor_names("head.output.weight", config)[0]


def match_labels(tensors: dict[str, Tensor], config: Config, labels: tuple[str, ...]) -> str | None:
    """Puts the rows of the folder's head in the order of `labels`; names may differ in case.

    If the names are others, the rows stay, and a note is returned.
    """
    order = {name: i for i, name in enumerate(config.labels)}
    names = list(labels)
    if set(order) != set(names):
        order = {name.lower(): i for name, i in order.items()}
        names = [name if name in order else name.lower() for name in names]
    if len(order) == len(names) and sorted(order) == sorted(names):
        weight = output_name(config)
        for name in (weight, weight.replace("weight", "bias")):
            if name in tensors and tensors[name].shape[:1] == (len(labels),):
                tensors[name] = tensors[name][[order[label] for label in names]]
        return None
    if len(labels) == 1:
        return None
    if config.labels[0].startswith("LABEL_"):
        pairs = ", ".join(f"{theirs} for {ours}" for theirs, ours in zip(config.labels, labels))
        return f"the {head_title(config)} does not name its classes; taken are {pairs}"
    return f"the {head_title(config)} for {', '.join(config.labels)} now stands for {', '.join(labels)}"


def fresh_head(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Removes an old head from `tensors`. Returns the weights of a new one by our parameters' names."""
    for name in list(tensors):
        if name.startswith(("classifier.", "qa_outputs.")) or name == OUR_NAMES["head.dropped"]:
            del tensors[name]
    head = Head(config) if config.head == "sequence" else TokenHead(config)
    initialize(head, config.initializer_range)
    return {f"head.{name}": tensor for name, tensor in head.state_dict().items()}


def make_state(model: Model, tensors: dict[str, Tensor], fresh: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The model's state dict, in float32, from the folder's tensors, which are removed from `tensors`.

    fresh: tensors by our names, used where the folder has none.
    Raises: InputError for a tensor that is missing or unusable.
    """
    state = {}
    for name, parameter in model.state_dict().items():
        parts = tensor_names(name, model.config)
        if name in fresh and parts[0] not in tensors:
            state[name] = fresh[name]
            continue
        shape = (parameter.size(0) // len(parts), *parameter.shape[1:])
        for part in parts:
            check_tensor(tensors.get(part), part, shape, folder)
        state[name] = torch.cat([tensors.pop(part).float() for part in parts])
    return state


def check_tensor(tensor: Tensor | None, name: str, shape: tuple[int, ...], folder: Path) -> None:
    """Raises InputError unless the tensor is there, of this shape, floating point and finite."""
    if tensor is None:
        raise InputError(f"{folder}: the tensor {name} is missing from the weights")
    if (actual := tuple(tensor.shape)) != shape:
        raise InputError(f"{folder}: the tensor {name} has shape {actual}, but config.json asks for {shape}")
    if not tensor.is_floating_point():
        raise InputError(f"{folder}: the tensor {name} is of type {tensor.dtype}, expected floating point")
    if not tensor.float().isfinite().all():
        raise InputError(f"{folder}: the tensor {name} holds values that are not finite numbers")


def refuse_unknown(tensors: dict[str, Tensor], config: Config, folder: Path) -> None:
    """Raises InputError for tensors that are left over, unless `UNUSED` names them."""
    unknown = sorted(name for name in tensors if not UNUSED.search(name))
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise InputError(f"{folder}: the tensor {unknown[0]}{more} is not part of a {config.model_type} classifier")


# ----------------------------------------------------------------------------------------------------------------------
# Saving


def save_model(folder: str | Path, model: Model) -> None:
    """Writes config.json and model.safetensors, each whole. `transformers` opens the folder as the dense model.

    Raises: InputError if a file cannot be written.
    """
    text = json.dumps(model.config.to_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_text(Path(folder) / "config.json", text)
    tensors = model.hub_tensors()
    write_file(Path(folder) / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
