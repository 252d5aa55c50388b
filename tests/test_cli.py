"""Configs by name, from any folder."""

from pathlib import Path

import pytest

from iumad_jax import cli
from iumad_jax.config import paper
from iumad_jax.runtime import workdir as workdirs
from tests import sentences

CONFIGS = Path(__file__).parents[1] / "configs"
OWN = "from iumad_jax import config\ndef get_config(protocol='3-0'): return config.small(protocol)"


def run(monkeypatch, *arguments):
    """Run a command with --config; return its exit code, protocol, dataset and workdir."""
    found = []

    def define(values):
        cli.define_config(values)
        cli.define_workdir(values)

    def act(values):
        config, workdir = cli.config_and_workdir(values)
        found.extend([config.protocol, config.dataset.name, str(workdir)])
        return ""

    monkeypatch.setattr("sys.argv", ["command", *arguments])  # ml_collections reads the keys from here
    return cli.execute("", ["command", *arguments], define, act), *found


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize(
    ("arguments", "protocol", "dataset"),
    [
        (["--config=folder"], "open", "folder"),
        (["--config=folder.py"], "open", "folder"),
        (["--config=folder:1-0"], "1-0", "folder"),
        (["--config", "quickstart:2-1"], "2-1", "candies"),
        ([f"--config={CONFIGS}/folder.py:1-0"], "1-0", "folder"),
        (["--config=mine.py"], "3-0", "eyecandies"),
        (["--config=best.py"], "3-0", "eyecandies"),  # a file here, though the package has a config of this name
        (["--config=best"], "open", "folder"),
    ],
)
def test_a_config_is_found_by_name(tmp_path, monkeypatch, arguments, protocol, dataset):
    """Its name is in that of the run, however it was found."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine.py", "best.py"):
        (tmp_path / name).write_text(OWN)
    (tmp_path / "folder").mkdir()  # no file
    name = Path(arguments[-1].removeprefix("--config=")).name.split(":")[0].removesuffix(".py")
    code, *found = run(monkeypatch, *arguments, "--config.seed=7")
    assert (code, found[:2]) == (0, [protocol, dataset])
    assert found[2].startswith(f"runs/{name}_{protocol}_")
    assert found[2].endswith("_seed7")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("fodler:1-0", sentences.CONFIG_UNKNOWN.format("fodler:1-0")),
        (".", sentences.CONFIG_UNKNOWN.format(".")),
        ("configs/nowhere.py", sentences.CONFIG_UNKNOWN.format("configs/nowhere.py")),
        ("configs/folder.py:1-0", sentences.CONFIG_NOT_THERE.format("configs/folder.py:1-0", "folder:1-0")),
        ("x" * 300, sentences.CONFIG_UNREADABLE.format("[Errno 36] File name too long")),
    ],
)
def test_a_config_that_does_not_exist_is_named(tmp_path, monkeypatch, capsys, value, sentence):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, f"--config={value}") == (2,)
    assert capsys.readouterr().err.startswith(f"iumad_jax: {sentence}")


def test_what_is_trusted_holds_for_the_run_and_is_no_change_of_a_step(tmp_path, monkeypatch):
    began = paper("6-1")
    began.dataset.trust = "/first"
    with workdirs.claimed(tmp_path, began):
        pass
    found = []
    arguments = ["command", f"--workdir={tmp_path}", "--config.dataset.trust=/nas", "--config.dataset.root=later"]
    monkeypatch.setattr("sys.argv", arguments)

    def act(values):
        found.extend(cli.run_and_changes(values))
        return ""

    assert cli.execute("", arguments, cli.define_trained, act, changeable=("dataset",)) == 0
    config, changes = found
    assert (config.dataset.trust, config.dataset.root) == ("/first,/nas", "data/eyecandies")
    assert changes == {"dataset.root": "later"}


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize(
    ("flag", "key"),
    [
        ("--epochs=5", "train.epochs=5"),
        ("--train.epochs=5", "train.epochs=5"),
        ("--batch-size=2", "train.batch_size=2"),
        ("--root=a=b", "dataset.root=a=b"),
        ("--epochs", "train.epochs=VALUE"),
        ("--seed=1", "seed=1"),  # a key as a whole, though others end in it
    ],
)
def test_a_key_without_its_prefix_is_named(monkeypatch, capsys, flag, key):
    assert run(monkeypatch, "--config=folder", flag) == (2,)
    assert capsys.readouterr().err == f"iumad_jax: {flag.partition('=')[0]} is no flag; use --config.{key}.\n"


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize("flag", ["--heads=2", "--nothing=1"])  # several keys end in heads, none in nothing
def test_a_flag_that_means_no_single_key_is_refused(monkeypatch, capsys, flag):
    assert run(monkeypatch, "--config=folder", flag) == (2,)
    unknown = f"Unknown command line flag '{flag[2:-2]}'"
    assert capsys.readouterr().err == f"iumad_jax: {sentences.SEE_HELP.format(unknown)}\n"


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_the_names_that_a_shell_put_for_a_pattern_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("b.png").touch()
    assert run(monkeypatch, "--config=folder", "--workdir=a.png", "b.png") == (2,)
    assert "b.png is not a flag; each flag takes one file or folder, and shells replace * by" in capsys.readouterr().err
    assert run(monkeypatch, "--config=folder", "--workdir=a.png", "c.png") == (2,)
    assert capsys.readouterr().err == f"iumad_jax: {sentences.NOT_A_FLAG.format('c.png')}\n"


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_a_key_of_another_group_is_named(monkeypatch, capsys):
    assert run(monkeypatch, "--config=folder", "--config.epochs=5") == (2,)
    assert capsys.readouterr().err == "iumad_jax: --config has no key 'epochs'; use --config.train.epochs.\n"


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--trust=/nas", "--trust is no flag; use --config.dataset.trust=/nas."),
        ("--epochs=5", sentences.SEE_HELP.format("Unknown command line flag 'epochs'")),  # fixed by training
    ],
)
def test_only_a_key_that_a_run_may_change_is_named(tmp_path, monkeypatch, capsys, flag, sentence):
    with workdirs.claimed(tmp_path, paper("6-1")):
        pass
    arguments = ["command", f"--workdir={tmp_path}", flag]
    monkeypatch.setattr("sys.argv", arguments)
    assert cli.execute("", arguments, cli.define_trained, lambda _: "", changeable=("dataset",)) == 2
    assert capsys.readouterr().err == f"iumad_jax: {sentence}\n"


def test_the_package_has_the_configs_of_the_repository():
    """One copy of each, which wheels take along as a part of the package."""
    shipped = Path(cli.__file__).with_name("configs")
    assert shipped.is_symlink()
    assert shipped.resolve() == CONFIGS
    assert {file.stem for file in CONFIGS.glob("*.py")} == set(cli._configs())
