"""Tokenizers of every layout give the ids of transformers; damaged ones are refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from support.errors import InputError
from tasks.tokenizer import Tokenizer, check_room


def lines_of_text() -> list[str]:
    """1,200 lines: words, accents, CJK, emoji, right-to-left, odd spaces, special tokens, blanks."""
    pieces = [
        "Hello",
        "world",
        "naïve",
        "café",
        "Ångström",
        "中文字符",
        "日本語テスト",
        "한국어",
        "😀",
        "👩‍👩‍👧",
        "مرحبا",
        "I'll",
        "don't",
        "1,234.5",
        "e-mail@x.org",
        "#tag",
        "\t",
        "  ",
        "\u00a0",
        "\u200b",
        "<mask>",
        "[SEP]",
        "</s>",
        "ﬁ",
        "e\u0301",
        "—",
        "’",
    ]
    generator = np.random.default_rng(0)
    lines = [" ".join(generator.choice(pieces, generator.integers(0, 12))) for _ in range(1200)]
    return [*lines[:-4], "", " ", "\n", "x" * 300]


@pytest.fixture(scope="module")
def tokenizer_folders(tmp_path_factory) -> dict[str, Path]:
    """Tokenizers trained on the lines, in every layout that is read, and made so that transformers opens them."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    root = tmp_path_factory.mktemp("tokenizers")
    folders = {}
    text = lines_of_text()[:900]
    bpe = Backend(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    for name, prefix in (("bpe", False), ("bpe_prefix", True)):
        folders[name] = root / name
        folders[name].mkdir()
        bpe.model.save(str(folders[name]))
        (folders[name] / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "RobertaTokenizer", "add_prefix_space": prefix})
        )
    for name, lower in (("wordpiece", True), ("wordpiece_cased", False)):
        piece = Backend(models.WordPiece(unk_token="[UNK]"))
        piece.normalizer = normalizers.BertNormalizer(lowercase=lower)
        piece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        piece.train_from_iterator(
            text, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
        )
        folders[name] = root / name
        folders[name].mkdir()
        piece.model.save(str(folders[name]))
        (folders[name] / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": lower})
        )
    return folders


@pytest.mark.parametrize("name", ["bpe", "bpe_prefix", "wordpiece", "wordpiece_cased"])
def test_ids_equal_transformers(name, tokenizer_folders, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, "RobertaTokenizerFast" if "bpe" in name else "BertTokenizerFast").from_pretrained(
        tokenizer_folders[name]
    )
    theirs.save_pretrained(tmp_path)  # the same as a tokenizer.json
    text = lines_of_text()
    pairs = text[::-1]
    for folder in (tokenizer_folders[name], tmp_path):
        ours = Tokenizer(folder)
        for mine, limit in ((ours.encode(text, None, 512), 512), (ours.encode(text, None, 16), 16)):
            assert [list(e.token_ids) for e in mine] == theirs(text, truncation=True, max_length=limit)["input_ids"]
        both = theirs(text, pairs, truncation=True, max_length=24, return_token_type_ids=True)
        mine = ours.encode(text, pairs, 24)
        assert [list(e.token_ids) for e in mine] == both["input_ids"]
        assert [list(e.segment_ids) for e in mine] == both["token_type_ids"]


def test_tokenizer_errors(tmp_path, byte_level):
    with pytest.raises(InputError, match="no tokenizer; expected tokenizer.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(InputError, match="damaged tokenizer"):
        Tokenizer(tmp_path)
    with pytest.raises(InputError, match="--max-length 2: leaves no room for text; expected at least 3"):
        check_room(byte_level, 2)
    with pytest.raises(InputError, match="--max-length 4: leaves no room for text; expected at least 5"):
        check_room(byte_level, 4, pair=True)
    check_room(byte_level, 3)
    check_room(byte_level, 5, pair=True)


def test_byte_level_tokens_are_readable(byte_level):
    (encoded,) = byte_level.encode(["café 😀 superb"], None, 40)
    names = byte_level.tokens(encoded.token_ids)
    assert names[0] == "<s>" and names[-1] == "</s>" and "superb" in names
    assert len(names) == len(encoded.token_ids) and byte_level.tokens([10**6]) == ["<1000000>"]
