"""Model folders as other programs write them. Sizes are odd and distinct: a swapped axis fails."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

KINDS = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert", "ibert": "IBert", "bert": "Bert"}
SIZES = dict(
    vocab_size=101,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=37,
    max_position_embeddings=60,
    num_labels=3,
    initializer_range=0.3,
)


def hugging_face(kind: str, folder: Path, architecture: str = "SequenceClassification", **changes):
    """A random model of `transformers`, saved in `folder`."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{KINDS[kind]}Config")(**SIZES | changes)
    model = getattr(transformers, f"{KINDS[kind]}For{architecture}")(config).eval()
    for parameter in model.parameters():  # biases and norms too, so that a swapped one shows
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def release_folder(folder: Path, case: Path) -> dict[str, torch.Tensor]:
    """Writes a golden case as the authors' release would, with its model type, prefix and offsets of each layer.

    Returns the expected values of the case.
    """
    folder.mkdir()
    config = json.loads((case / "config.json").read_text())
    config |= {"model_type": "ltp", "architectures": ["LTPForSequenceClassification"], "quant_mode": False}
    (folder / "config.json").write_text(json.dumps(config))
    expected = load_file(case / "expected.safetensors")
    tensors = {re.sub(r"^roberta\.", "ltp.", k): v for k, v in load_file(case / "model.safetensors").items()}
    for l, offset in enumerate(expected["threshold_offset"]):
        tensors[f"ltp.encoder.layer.{l}.attention.self.pruner.keep_threshold"] = offset.clone()
    torch.save(tensors, folder / "pytorch_model.bin")
    return expected
