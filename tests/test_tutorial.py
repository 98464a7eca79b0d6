"""The tutorial notebook: it runs, and its committed outputs are those of one complete run."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.ipynb"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(TUTORIAL, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_committed_outputs_are_those_of_one_complete_run(notebook):
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert cells and [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        kinds = [output.get("name", output.output_type) for output in cell.outputs]
        assert not {"error", "stderr"} & set(kinds)
        assert kinds.count("display_data") == cell.source.count("plt.show()")
        assert ("stdout" in kinds) == bool(re.search(r"^ *print\(", cell.source, re.M))


def test_the_page_is_small_and_names_no_machine(notebook):
    assert TUTORIAL.stat().st_size < 1_500_000
    text = [cell.source for cell in notebook.cells]
    text += [output.text for cell in code_cells(notebook) for output in cell.outputs if output.output_type == "stream"]
    assert not re.search(r"/(work|home|root|tmp|Users)/", "\n".join(text))


def test_links_lead_to_files(notebook):
    links = [link for cell in notebook.cells for link in re.findall(r"\]\((?!http)([^)]+)\)", cell.source)]
    assert links and [link for link in links if not (TUTORIAL.parent / link).is_file()] == []


@pytest.mark.parametrize("folder", ["docs", "."])
def test_it_finds_the_model_from_both_folders(notebook, folder):
    notebook.cells = code_cells(notebook)[:1]
    assert "from model import" in notebook.cells[0].source
    NotebookClient(notebook, resources={"metadata": {"path": ROOT / folder}}).execute()


@pytest.mark.slow
def test_it_runs(notebook):
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": ROOT / "docs"}}).execute()
