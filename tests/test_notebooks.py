"""The notebooks run from the first to the last cell with small sizes, and match their scripts."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from tests import sentences

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


@pytest.fixture(scope="module")
def execute(tmp_path_factory, processes_compile_quickly):
    """Return a function that runs a notebook with changed parameters and returns its folder and outputs."""
    home = tmp_path_factory.mktemp("home")

    def execute(name, **parameters):
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        assert len(cells) == 1
        assert all(key in cells[0].source for key in parameters)
        cells[0].source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
        NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": home}}).execute()
        return home, [output for cell in notebook.cells for output in cell.get("outputs", [])]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        yield execute


def displayed(outputs, kind):
    """Return the displayed outputs of a MIME type."""
    return [output["data"][kind] for output in outputs if kind in output.get("data", {})]


def printed(outputs):
    """Return the printed text."""
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")


def test_all_notebooks_exist():
    assert NAMES == ["kernels", "own_objects", "quickstart", "read_a_run"]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_matches_its_script(name):
    notebook, script = (jupytext.read(FOLDER / f"{name}.{suffix}") for suffix in ("ipynb", "py"))
    notebook_cells, script_cells = (
        [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in document.cells]
        for document in (notebook, script)
    )
    assert notebook_cells == script_cells
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 200_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code[0].metadata.tags == ["install"]
    for path in ("/home", "/root", "/work", "/tmp"):
        assert path not in "".join(cell.source for cell in notebook.cells)


@pytest.fixture(scope="module")
def quickstart(execute):
    return execute("quickstart", objects="CandyCane,GummyBear,Marshmallow", epochs=1, images=8, pixels=64, size=64)


def test_quickstart(quickstart):
    home, outputs = quickstart
    (table,) = displayed(outputs, "text/markdown")
    for name in ("CandyCane", "GummyBear", "Marshmallow", "memory_bank"):
        assert name in table
    assert len(displayed(outputs, "image/jpeg")) == 3
    assert 'href="runs/notebook/report.html"' in displayed(outputs, "text/html")[-1]
    assert (home / "runs" / "notebook" / "report.html").stat().st_size > 100_000


def test_read_a_run(quickstart, execute):
    _, outputs = execute("read_a_run")
    assert len(displayed(outputs, "image/png")) == 4
    assert sentences.NOTEBOOK_EVENTS.format(2) in printed(outputs)
    assert sentences.NOTEBOOK_OBJECTS.format("CandyCane GummyBear Marshmallow") in printed(outputs)


def test_read_a_run_makes_a_missing_run(execute):
    home, outputs = execute("read_a_run", workdir="runs/smallest")
    assert (home / "runs" / "smallest" / "results.json").exists()
    assert len(displayed(outputs, "image/png")) == 3  # without training there is no loss curve
    assert sentences.NOTEBOOK_EVENTS_PART.format(0) in printed(outputs)


def test_own_objects(execute):
    home, outputs = execute("own_objects", epochs=1, images=8, pixels=64, size=64)
    table, history = displayed(outputs, "text/markdown")
    assert "washer" in table
    assert "gear" in table
    assert "learned star" in history.splitlines()[-1]
    for name in ("washer", "gear", "star"):
        assert f"good {name}: taken for {name}" in printed(outputs)
    assert len(displayed(outputs, "image/jpeg")) == 2
    assert (home / "runs" / "own_objects" / "report.html").exists()


def test_kernels(execute):
    _, outputs = execute("kernels", batch=1, channels=16, states=4, lengths=[8, 16], rounds=1)
    assert printed(outputs).count(sentences.NOTEBOOK_DIFFERENCE) == 3
    assert sentences.NOTEBOOK_POSITIONS.format(positions=16, name="selective_scan") in printed(outputs)
    assert len(displayed(outputs, "image/png")) == 1
