"""The prepare command: it makes a store, a table and contact sheets from an archive."""

import hashlib
import re
import sys
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from iumad_jax import prepare
from tests import sentences
from tests.integration.conftest import SMALL, as_flags

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections reads a config
CONFIG = Path(__file__).parents[2] / "configs" / "eyecandies.py"
KEYS = SMALL | {
    "backbone.grid": 4,
    "dataset.objects": "GummyBear,Lollipop",
    "dataset.prepared": "prepared",
}


@pytest.fixture(scope="module", autouse=True)
def _compiled_without_optimisation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def home(tmp_path_factory, candies):
    """Create a folder with rendered sweets and an archive of them."""
    home = tmp_path_factory.mktemp("home")
    candies(home / "sweets", KEYS["dataset.objects"], train=2, val=1, test=4)
    with tarfile.open(home / "sweets.tar.gz", "w:gz") as archive:
        for folder in (home / "sweets").iterdir():
            if folder.is_dir():
                archive.add(folder, folder.name)
    return home


@pytest.fixture
def run(home, monkeypatch, capfd):
    """Run the command in this folder and return its exit code, standard output and standard error."""

    def run(*flags, **changes):
        monkeypatch.chdir(home)
        keys = KEYS | {key.replace("__", "."): value for key, value in changes.items()}
        config = f"--config={CONFIG}:1-1"
        arguments = ["prepare", config, *flags, *as_flags(keys)]
        monkeypatch.setattr(sys, "argv", arguments)  # config_flags reads the keys from here
        return prepare.main(arguments), *capfd.readouterr()

    return run


def times_of_prepared_files(home):
    return {file: file.stat().st_mtime_ns for file in home.glob("prepared/*/rows-*/*")}


@pytest.mark.slow
def test_an_archive_becomes_a_store_with_a_table_and_contact_sheets(home, run):
    code, out, err = run("--archive=sweets.tar.gz", dataset__root="unpacked")
    assert code == 0, err
    digest = hashlib.sha256((home / "sweets.tar.gz").read_bytes()).hexdigest()
    assert out.startswith(
        f"{sentences.ARCHIVE_UNPACKED.format(archive='sweets.tar.gz', digest=digest, root='unpacked')}\n"
    )
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if "64x64" in line]
    assert [row[:3] for row in cells] == [
        [name, split, count]
        for name in ("GummyBear", "Lollipop")
        for split, count in [("train", "2"), ("calibration", "1"), ("test", "4")]
    ]
    for name, row in (("GummyBear", cells[2]), ("Lollipop", cells[5])):
        files = (home / "sweets" / name / "test_public" / "data").glob("*_mask.png")
        masks = [np.asarray(Image.open(file)) > 0 for file in files if re.fullmatch(r"\d+_mask\.png", file.name)]
        areas = [100 * mask.mean() for mask in masks if mask.any()]
        percentages = [float(number) for number in re.findall(r"[\d.]+(?= %)", row[6])]
        np.testing.assert_allclose(percentages, np.quantile(areas, [0.5, 0.05, 0.95]), rtol=0.05)
        assert sum(int(number) for number in re.findall(r"\d+", row[3])) == 4
        assert row[5] == "0.0 %"
        assert row[3].startswith("2 good, ")
    for name in ("GummyBear", "Lollipop"):
        sheet = np.asarray(Image.open(home / "prepared" / "contact_sheets" / f"{name}.jpg").convert("RGB"), float)
        first = Image.open(min((home / "sweets" / name / "train" / "data").glob("*_image_4.png"))).convert("RGB")
        expected = np.asarray(first.resize((160, 160), Image.Resampling.BILINEAR), float)
        errors = [np.abs(sheet[top : top + 156, 3:157] - expected[2:158, 3:157]).mean() for top in range(60, 90)]
        assert min(errors) < 5  # the first training image is in a corner

    before = times_of_prepared_files(home)
    repeated = run("--archive=sweets.tar.gz", dataset__root="unpacked")
    assert (repeated[0], repeated[1]) == (0, out)
    assert times_of_prepared_files(home) == before


def test_mistakes_are_reported_in_a_sentence(home, run):
    for flags, changes, message in [
        (
            ["--archive=none.tar"],
            {},
            sentences.ARCHIVE_UNREADABLE.format(archive="none.tar", reason="No such file or directory"),
        ),
        (
            ["--archive=sweets.tar.gz", "--archive_gb=0.0001"],
            {"dataset__root": "new"},
            sentences.ARCHIVE_TOO_LARGE.format(0.0001),
        ),
        (
            ["--archive=sweets.tar.gz"],
            {"dataset__root": "sweets"},
            sentences.ARCHIVE_ROOT_NOT_EMPTY.format(root="sweets", archive="sweets.tar.gz"),
        ),
        (["--archive_gb=lots"], {}, "flag --archive_gb=lots"),
        ([], {"dataset__root": "nowhere"}, sentences.ROOT_NOT_A_FOLDER.format("nowhere")),
        (
            [],
            {"input__resident": "maybe"},
            sentences.UNKNOWN_RESIDENT.format(found="maybe", known="auto, always or never"),
        ),
    ]:
        code, out, err = run(*flags, **changes)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
    assert not (home / "new").exists()
