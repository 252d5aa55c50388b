"""Workdirs: they belong to one config, one run format, and one process at a time."""

import json
import re
import signal
import subprocess
import sys

import pytest

from iumad_jax import config as configs
from iumad_jax.config import paper
from iumad_jax.errors import UserError
from iumad_jax.runtime import workdir as workdirs
from tests import sentences


def changed_config(**changes):
    config = paper("6-1")
    config.update_from_flattened_dict(changes)
    return config


def claim(folder, config):
    with workdirs.claimed(folder, config):
        pass


def begin(folder, config):
    """Claim a workdir, and begin its first step."""
    claim(folder, config)
    (folder / "plan.json").write_text("[]")


def test_a_new_workdir_accepts_any_config_until_it_is_claimed(tmp_path):
    folder = tmp_path / "runs" / "new"
    workdirs.check(folder, paper("6-1"))
    workdirs.check(folder, changed_config(seed=1))
    assert not folder.exists()  # checking writes nothing
    claim(folder, paper("6-1"))
    claim(folder, paper("6-1"))
    workdirs.check(folder, paper("6-1"))
    assert json.loads((folder / "config.json").read_text())["model"]["jitter"] == {"scale": 20.0, "probability": 1.0}
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "lock", "pictures"]


@pytest.mark.parametrize("file", ["plan.json", "dataset.json", "snapshots/0/sha256.json"])
def test_a_config_may_be_corrected_until_the_first_step_begins(tmp_path, file):
    claim(tmp_path, paper("6-1"))
    claim(tmp_path, changed_config(seed=1))
    assert workdirs.read(tmp_path).seed == 1
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(UserError, match=sentences.KEY_DIFFERS.format(key="config.seed", stored=1, now=0)):
        claim(tmp_path, paper("6-1"))


@pytest.mark.parametrize("key", ["backbone.weights", "diffusion.weights", "diffusion.autoencoder"])
def test_files_of_weights_may_move(tmp_path, key):
    begin(tmp_path, changed_config(**{key: "before"}))
    assert workdirs.moved_files(tmp_path, changed_config(**{key: "before"})) == {}
    assert workdirs.moved_files(tmp_path, changed_config(**{key: "after"})) == {key: "after"}
    claim(tmp_path, changed_config(**{key: "after"}))
    assert configs.flat(workdirs.read(tmp_path).to_dict())[key] == "after"


def test_a_run_may_trust_other_folders_when_it_is_continued(tmp_path):
    begin(tmp_path, paper("6-1"))
    claim(tmp_path, changed_config(**{"dataset.trust": "/nas"}))
    assert workdirs.read(tmp_path).dataset.trust == "/nas"
    with pytest.raises(UserError, match=sentences.KEY_DIFFERS.format(key="dataset.root", stored=".*", now="x")):
        workdirs.check(tmp_path, changed_config(**{"dataset.trust": "/nas", "dataset.root": "x"}))


HOLDER = """
import sys
from pathlib import Path
from iumad_jax.runtime import workdir
from iumad_jax.config import paper

with workdir.claimed(Path(sys.argv[1]), paper("6-1")):
    print("claimed", flush=True)
    input()
"""


def test_one_process_holds_a_workdir_until_it_ends(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], **pipes) as process:
        assert process.stdout.readline() == b"claimed\n"
        with pytest.raises(UserError) as error:
            claim(tmp_path, paper("6-1"))
        assert str(error.value) == sentences.WORKDIR_IN_USE.format(tmp_path)
        process.send_signal(signal.SIGKILL)
    claim(tmp_path, paper("6-1"))
    (tmp_path / "config.json.unfinished").mkdir()
    with pytest.raises(UserError, match=sentences.CANNOT_WRITE.format("")):
        claim(tmp_path, paper("6-1"))
    (tmp_path / "config.json.unfinished").rmdir()
    claim(tmp_path, paper("6-1"))  # the error released the lock


@pytest.mark.parametrize(
    ("changes", "differences"),
    [
        ({"seed": 3}, [sentences.KEY_DIFFERS.format(key="config.seed", stored=0, now=3)]),
        (
            {"train.epochs": 5, "dataset.render.size": 64, "modality": "rgb"},
            [
                sentences.KEY_DIFFERS.format(key="config.train.epochs", stored=800, now=5),
                sentences.KEY_DIFFERS.format(key="config.dataset.render.size", stored=256, now=64),
                sentences.KEY_DIFFERS.format(key="config.modality", stored="rgb+depth", now="rgb"),
            ],
        ),
    ],
)
def test_another_config_is_refused_naming_every_key_that_differs(tmp_path, changes, differences):
    begin(tmp_path, paper("6-1"))
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError) as error:
        workdirs.check(tmp_path, changed_config(**changes))
    message = str(error.value)
    assert message.startswith(sentences.WORKDIR_OF_ANOTHER_CONFIG.format(tmp_path))
    assert message.endswith(sentences.WORKDIR_REMEDY)
    assert all(difference in message for difference in differences)
    assert message.count(sentences.KEY_DIFFERS_PART) == len(differences)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_key_that_only_one_config_has_differs(tmp_path):
    config = paper("6-1")
    begin(tmp_path, config)
    del config.report.pictures_per_object
    config.unlock()
    config.train.momentum = 0.9
    with pytest.raises(UserError) as error:
        workdirs.check(tmp_path, config)
    assert sentences.KEY_DIFFERS.format(key="config.report.pictures_per_object", stored=6, now=None) in str(error.value)
    assert sentences.KEY_DIFFERS.format(key="config.train.momentum", stored=None, now=0.9) in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "\xff", '{"seed": 0', "5", "[]", '"config"'])
def test_a_damaged_config_is_reported(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("latin1"))
    with pytest.raises(UserError, match=sentences.WORKDIR_CONFIG_DAMAGED.format(r"config\.json")):
        workdirs.check(tmp_path, paper("6-1"))


def test_an_unwritable_workdir_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=re.escape(sentences.WORKDIR_NOT_WRITABLE.format(folder="file/run", reason="Not a directory"))
    ):
        claim(tmp_path / "file" / "run", paper("6-1"))


def test_a_full_disk_leaves_the_workdir_unclaimed(tmp_path, files_no_larger_than):
    with (
        files_no_larger_than(100),
        pytest.raises(
            UserError, match=sentences.FILE_NOT_WRITTEN.format(file=r"config\.json", reason="File too large")
        ),
    ):
        claim(tmp_path, paper("6-1"))
    assert not (tmp_path / "config.json").exists()
    workdirs.check(tmp_path, changed_config(seed=1))


@pytest.mark.parametrize(
    ("format_", "sentence"),
    [
        (None, sentences.RUN_BY_OLDER_VERSION),
        (1, sentences.RUN_BY_OLDER_VERSION),
        (workdirs.FORMAT + 1, sentences.RUN_BY_ANOTHER_VERSION),
        ("x", sentences.RUN_BY_ANOTHER_VERSION),
    ],
)
def test_a_run_of_another_format_is_refused(tmp_path, format_, sentence):
    claim(tmp_path, paper("6-1"))
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    assert content.pop("format") == workdirs.FORMAT
    file.write_text(json.dumps(content if format_ is None else content | {"format": format_}))
    with pytest.raises(UserError) as error:
        workdirs.check(tmp_path, paper("6-1"))
    assert str(error.value) == sentence.format(file=file, found=format_ or 0, read=workdirs.FORMAT)
