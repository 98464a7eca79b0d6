"""Model folders as other programs write them, and their answers. Sizes are odd and distinct: a swapped axis fails."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import SMALL, random_sequences

from model import Dense, Hard, Model, pack

KINDS = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert", "ibert": "IBert", "bert": "Bert"}
KINDS_AND_ACTIVATIONS = [
    (kind, activation)
    for kind in KINDS
    for activation in ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
    if kind != "ibert" or activation == "gelu"  # I-BERT knows gelu only
]
HEADS = {"sequence": "SequenceClassification", "token": "TokenClassification", "span": "QuestionAnswering"}
SIZES = {
    name: getattr(SMALL, name) for name in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size")
}
SIZES |= {"num_hidden_layers": 2, "max_position_embeddings": 60, "num_labels": 3, "initializer_range": 0.3}


def hugging_face(kind: str, folder: Path, head: str = "sequence", **changes):
    """A random model of `transformers`, saved in `folder`."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{KINDS[kind]}Config")(**SIZES | changes)
    model = getattr(transformers, f"{KINDS[kind]}For{HEADS[head]}")(config).eval()
    for parameter in model.parameters():  # biases and norms too, so that a swapped one shows
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def their_logits(model, sequences, pad: int) -> torch.Tensor:
    """A padded batch's logits: (B, labels), or (T, labels) of heads that answer for every token."""
    n = max(map(len, sequences))
    ids = torch.tensor([s + [pad] * (n - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (n - len(s)) for s in sequences])
    output = model(input_ids=ids, attention_mask=mask)
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], 2)[mask.bool()]
    return output.logits if output.logits.dim() == 2 else output.logits[mask.bool()]


def open_saved(folder: Path, head: str):
    """Opens a folder with transformers, and checks that it holds what transformers asks for."""
    import transformers

    cls = getattr(transformers, f"AutoModelFor{HEADS[head]}")
    model, report = cls.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and set(report["unexpected_keys"]) <= {"ltp.thresholds"}
    return model.eval()


def expect_equal_both_ways(
    kind: str, folder: Path, head: str, load: Callable[[Path], Model], save: Callable[[Model, Path], object], **changes
) -> None:
    """A model of transformers has the same logits as ours once loaded, and so has ours as theirs once saved."""
    theirs = hugging_face(kind, folder / "theirs", head, **changes)
    sequences, pad = random_sequences(7, longest=50), 0 if kind == "bert" else 1
    expected, ours = their_logits(theirs, sequences, pad), load(folder / "theirs")
    assert expected.std() > 0.1 and ours.config.head == head
    with torch.inference_mode():
        # No token goes: thresholds of 0 need no scores, and the smallest positive ones score and drop nothing.
        for pruner in (Dense(), Hard(torch.zeros(2)), Hard(torch.full((2,), 1e-30))):
            torch.testing.assert_close(ours(pack(sequences), pruner).logits, expected, atol=1e-4, rtol=0)
    # What we write, thresholds included, is an ordinary folder to transformers.
    ours.config = replace(ours.config, prune_mode="absolute_threshold")
    save(ours, folder / "ours")
    again = open_saved(folder / "ours", head)
    torch.testing.assert_close(their_logits(again, sequences, pad), expected, atol=1e-4, rtol=0)
    assert again.config.num_labels == theirs.config.num_labels


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
