"""Files that a run cannot write are reported in a sentence; the resumed run then writes all of them."""

import pytest

from iumad_jax import config as configs
from iumad_jax import experiment
from iumad_jax.errors import UserError
from tests import sentences

OBJECTS = "CandyCane,GummyBear"


@pytest.fixture(scope="module")
def home(tmp_path_factory, candies):
    """Create a dataset of two objects and an uninterrupted run."""
    home = tmp_path_factory.mktemp("home")
    candies(home / "candies", OBJECTS, train=2, val=1, test=2)
    experiment.run(config(home), home / "run")
    return home


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Return the workdir of a run that is stopped repeatedly."""
    return tmp_path_factory.mktemp("stopped") / "run"


def config(home):
    """Return the config of a baseline, which writes the same files as other methods without training."""
    config = configs.small("1-1")
    config.method, config.baselines, config.modality = "feature_norm", "", "rgb"
    config.dataset.update(name="eyecandies", root=str(home / "candies"), objects=OBJECTS)
    config.input.size, config.backbone.grid, config.report.pictures_per_object = 64, 4, 1
    return config


def assert_run_completes(home, workdir):
    """Resume a run and require the ledger and the files of the uninterrupted run."""
    experiment.run(config(home), workdir)
    assert (workdir / "ledger.jsonl").read_bytes() == (home / "run" / "ledger.jsonl").read_bytes()
    written = {path.relative_to(home / "run") for path in (home / "run").glob("*")}
    assert {path.relative_to(workdir) for path in workdir.glob("*")} == written


@pytest.mark.parametrize(
    "name",
    [  # in the order in which a run writes them
        "pictures",
        "lock",
        "config.json.unfinished",
        "snapshots",
        "snapshots_within_step",
        "ledger.jsonl",
        "prepared",
        "live.jsonl",
        "pictures/step0_CandyCane.jpg.unfinished",
        "samples",
        "samples/step0_CandyCane.npz.unfinished",
        "pictures/matrix_aupro.png.unfinished",
        "report.html.unfinished",
        "results.csv.unfinished",
        "results.json.unfinished",
    ],
)
def test_paths_that_cannot_be_written_are_reported(home, stopped, name, capfd):
    """A folder takes the place of a file, or a file that of a folder, which also stops the user root."""
    path = stopped / name
    path.parent.mkdir(parents=True, exist_ok=True)
    original = path.rename(stopped.with_name("original")) if path.exists() else None
    path.touch() if (home / "run" / name).is_dir() else path.mkdir()
    with pytest.raises(UserError) as error:
        experiment.run(config(home), stopped)
    message = str(error.value)
    in_workdir = str(stopped) in message and name in ("lock", "pictures")
    assert str(path).removesuffix(".unfinished") in message or in_workdir
    assert "\n" not in message
    assert capfd.readouterr().err.count("Traceback") == 0
    path.rmdir() if path.is_dir() else path.unlink()
    if original:
        original.rename(path)
    assert not (stopped / "results.json").exists()


def test_a_run_completes_once_all_paths_can_be_written(home, stopped):
    assert_run_completes(home, stopped)


def test_a_full_disk_is_reported_for_every_file(home, tmp_path, capfd, files_no_larger_than):
    assert max(path.stat().st_size for path in (home / "run").glob("*.*")) > 100_000
    for size in (0, 1_000, 5_000, 30_000, 100_000):
        with files_no_larger_than(size), pytest.raises(UserError, match=sentences.MAKE_ROOM):
            experiment.run(config(home), tmp_path / "run")
    assert_run_completes(home, tmp_path / "run")
    assert "Traceback" not in capfd.readouterr().err
