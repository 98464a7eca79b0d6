"""An exported model in the place of a checkpoint: an ONNX file whose metadata holds config.json and the tokenizer."""

from __future__ import annotations

import atexit
import base64
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model import Batch, Config, Dense, Pruner
from support.errors import InputError

GRAPH = "exported-by-ltp.onnx"  # its name in an opened folder: no name that a model folder of a user holds
BITS = "linear_bits"  # key of the metadata: bits of the factors of linear layers, where they are not 32
FILES = "files"  # key of the metadata: JSON {name of a file: its content in base64}


def pack_files(files: dict[str, bytes]) -> str:
    """The metadata's value for some files."""
    return json.dumps({name: base64.b64encode(content).decode() for name, content in files.items()})


def open_file(path: Path) -> Path:
    """A temporary folder with the files of an exported model, and the graph itself. It goes when the program ends.

    Raises: InputError.
    """
    session = start_session(path)
    metadata = session.get_modelmeta().custom_metadata_map
    if FILES not in metadata:
        raise InputError(f"{path}: holds no configuration and no tokenizer; write it again with `export`")
    folder = Path(tempfile.mkdtemp(prefix="ltp-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, content in json.loads(metadata[FILES]).items():
        (folder / Path(name).name).write_bytes(base64.b64decode(content))
    (folder / GRAPH).symlink_to(path.resolve())
    return folder


def model_name(folder: Path) -> Path:
    """What messages call a model: its folder, or the exported file that `open_file` made this folder of."""
    graph = folder / GRAPH
    return graph.readlink() if graph.is_symlink() else folder


def start_session(path: Path) -> Any:
    """ONNX Runtime's session for a file, with torch's number of threads. Raises: InputError."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise InputError(f"{path}: needs onnxruntime: pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library has a class for each reason, all of Exception alone
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"{path}: not a graph that ONNX Runtime can run ({reason})") from None


class Answers(NamedTuple):
    """As `model.Output`, without its steps."""

    logits: Tensor  # (B, labels) or (T, labels)
    kept: Tensor  # (L, B)


class OnnxModel(nn.Module):
    """Runs an exported graph as `Model` runs a batch. The graph prunes by itself."""

    def __init__(self, config: Config, path: Path, order: list[int]):
        """order: the graph's outputs that become ours."""
        super().__init__()
        self.config, self.path, self.order = config, path, order
        self.session = start_session(path)
        self.linear_bits = int(self.session.get_modelmeta().custom_metadata_map.get(BITS, 32))
        self.names = [node.name for node in self.session.get_inputs()]
        self.own_pruner = Dense()

    def pruner(self) -> Pruner:
        """Stands for the graph's own rule: `forward` takes no other."""
        return self.own_pruner

    def forward(self, batch: Batch, pruner: Pruner | None = None) -> Answers:
        """Answers for a batch, on the CPU. Raises: InputError for another pruner."""
        if pruner not in (None, self.own_pruner):
            raise InputError(f"{self.path.resolve()}: an exported model prunes in its one way; use the checkpoint here")
        logits, kept = self.session.run(["logits", "kept"], padded_inputs(batch, self.names))
        logits = torch.from_numpy(logits)[..., self.order]
        if self.config.head != "sequence":
            logits = torch.cat([row[:n] for row, n in zip(logits, batch.lengths.tolist())])
        return Answers(logits, torch.from_numpy(kept).T)


def padded_inputs(batch: Batch, names: list[str]) -> dict[str, np.ndarray]:
    """A graph's inputs of these names for a batch: int64, each sequence in a row as long as the longest."""
    lengths = batch.lengths.tolist()

    def lay(values: Tensor) -> np.ndarray:
        return pad_sequence(values.cpu().long().split(lengths), batch_first=True).numpy()

    values = {
        "input_ids": lambda: lay(batch.token_ids),
        "attention_mask": lambda: lay(torch.ones_like(batch.token_ids)),
        "token_type_ids": lambda: lay(batch.segment_ids),
        "question_length": lambda: batch.question_lengths.cpu().long().numpy(),
    }
    return {name: values[name]() for name in names}
