"""Random model folders: the logits of `transformers`, or a refusal in one line.

LTP_FOLDERS=300 reads more of them, LTP_FOLDERS_SEED=1000 others; `python tests/random_folders.py 300 1000` counts.
"""

import os

import pytest

pytest.importorskip("transformers", minversion="5")

from random_folders import compare  # noqa: E402

COUNT, SEED = int(os.environ.get("LTP_FOLDERS", 60)), int(os.environ.get("LTP_FOLDERS_SEED", 0))


@pytest.fixture(scope="module")
def outcomes() -> list[str]:
    return []


@pytest.mark.parametrize("number", range(COUNT))
def test_a_random_folder_reads_as_in_transformers(number, outcomes, tmp_path):
    outcomes.append(compare(SEED + number, tmp_path / "model"))


def test_most_folders_are_compared(outcomes):
    if len(outcomes) < 30:
        pytest.skip("needs the tests of 30 folders before it")
    assert sum(outcome == "equal" for outcome in outcomes) > len(outcomes) / 2
