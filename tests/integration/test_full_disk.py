"""Wherever a run writes, what the system refuses is told in a sentence; once it no longer does, nothing is missing."""

import pytest

from iumad_jax import config as configs
from iumad_jax import experiment
from iumad_jax.data.candies import render
from iumad_jax.errors import UserError
from tests import sentences

OBJECTS = "CandyCane,GummyBear"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where two objects lie, and what a run leaves that nothing stands in the way of."""
    home = tmp_path_factory.mktemp("home")
    render(home / "candies", train=2, val=1, test=2, size=64, objects=OBJECTS, progress=False)
    experiment.run(config(home), home / "run")
    return home


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The workdir of a run that is stopped time and again."""
    return tmp_path_factory.mktemp("stopped") / "run"


def config(home):
    """A run of a baseline: it writes all that others do, and nothing has to be trained."""
    config = configs.small("1-1")
    config.method, config.baselines, config.modality = "feature_norm", "", "rgb"
    config.dataset.update(name="eyecandies", root=str(home / "candies"), objects=OBJECTS)
    config.input.size, config.backbone.grid, config.report.pictures_per_object = 64, 4, 1
    return config


def ends_well(home, workdir):
    """Whether the run now ends as the other did."""
    experiment.run(config(home), workdir)
    assert (workdir / "ledger.jsonl").read_bytes() == (home / "run" / "ledger.jsonl").read_bytes()
    written = {path.relative_to(home / "run") for path in (home / "run").glob("*")}
    assert {path.relative_to(workdir) for path in workdir.glob("*")} == written


@pytest.mark.parametrize(
    "name",
    [  # in the order in which a run comes to them
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
def test_what_cannot_be_written_is_told_wherever_it_is(home, stopped, name, capfd):
    """Where a file belongs there is a folder, and where a folder does a file, which stops root as well."""
    path = stopped / name
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = path.rename(stopped.with_name("kept")) if path.exists() else None
    path.touch() if (home / "run" / name).is_dir() else path.mkdir()
    with pytest.raises(UserError) as error:
        experiment.run(config(home), stopped)
    told = str(error.value)
    assert str(path).removesuffix(".unfinished") in told or (str(stopped) in told and name in ("lock", "pictures"))
    assert "\n" not in told
    assert capfd.readouterr().err.count("Traceback") == 0
    path.rmdir() if path.is_dir() else path.unlink()
    if kept:
        kept.rename(path)
    assert not (stopped / "results.json").exists()


def test_once_it_can_be_written_nothing_is_missing(home, stopped):
    ends_well(home, stopped)


def test_a_full_disk_is_told_whatever_does_not_fit(home, tmp_path, capfd, files_no_larger_than):
    assert max(path.stat().st_size for path in (home / "run").glob("*.*")) > 100_000
    for room in (0, 1_000, 5_000, 30_000, 100_000):
        with files_no_larger_than(room), pytest.raises(UserError, match=sentences.MAKE_ROOM):
            experiment.run(config(home), tmp_path / "run")
    ends_well(home, tmp_path / "run")
    assert "Traceback" not in capfd.readouterr().err
