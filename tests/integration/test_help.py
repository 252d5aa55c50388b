"""The list of commands and their --help: every example works as it stands."""

import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module

import pytest

from iumad_jax import __main__ as commands
from iumad_jax import cli
from iumad_jax.errors import CLOSED_OUTPUT
from tests import sentences
from tests.integration.trained import QUICKSTART, in_process

ROOT = QUICKSTART.parents[1]
ENTRY_POINT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["iumad"]
NAMES = [module.removesuffix(".__main__") for module in commands.COMMANDS.values()]
ON_OBJECTS = ("learn", "calibrate", "retire")  # their examples name objects that the quickstart lacks
ON_A_RUN = (*ON_OBJECTS, "history", "evaluate", "predict", "latency", "export", "robustness", "choose")


def example(name):
    """Return the flags of a command's example, checking that it starts the command."""
    module = import_module(f"iumad_jax.{dict(zip(NAMES, commands.COMMANDS.values(), strict=True))[name]}")
    python, option, called, *flags = shlex.split(cli.summary_and_example(module.__doc__)[1])
    assert (python, option, called) == ("python", "-m", f"iumad_jax.{name}")
    return flags


def test_every_command_is_listed_in_two_lines():
    out = subprocess.run([sys.executable, "-m", "iumad_jax"], capture_output=True, text=True, check=True).stdout
    lines = out.splitlines()[2:]
    assert [line.split()[2].removeprefix("iumad_jax.") for line in lines[::2]] == NAMES
    assert all(line.startswith("    ") and line.endswith(".") for line in lines[1::2])
    modules = {file.stem for file in (ROOT / "iumad_jax").glob("*.py") if "cli.execute(" in file.read_text()}
    assert set(NAMES) == modules - {"cli"} | {"export", "data.synthetic"}


@pytest.mark.parametrize("arguments", [["iumad_jax"], ["iumad_jax.history", "--help"]])
def test_a_command_ends_silently_if_its_output_is_closed(arguments):
    """As in `python -m iumad_jax | head -0`."""
    process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", CLOSED_OUTPUT)
    process.stderr.close()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["evaluate", "--workdir=run"], sentences.NO_RUN_IN_WORKDIR.format("run")),
        (["synthetic"], sentences.CONFIG_MISSING),
        (["predic"], sentences.UNKNOWN_COMMAND.format("predic", "predict or retire")),
        (["data.synthetic"], sentences.UNKNOWN_COMMAND.format("data.synthetic", "synthetic")),
        (["--config=folder"], sentences.NO_COMMAND.format("--config=folder")),
    ],
)
def test_a_command_is_run_by_its_name(tmp_path, arguments, sentence):
    """As by the console command, whose entry point is the same function."""
    code = f"import sys; from {ENTRY_POINT.replace(':', ' import ')} as main; sys.exit(main())"
    for python in (["-m", "iumad_jax"], ["-c", code]):
        process = subprocess.run([sys.executable, *python, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert (process.returncode, process.stdout) == (2, "")
        assert process.stderr.startswith(f"iumad_jax: {sentence}")


@pytest.mark.parametrize("name", NAMES)
def test_help_begins_with_the_example(capsys, name):
    module = import_module(f"iumad_jax.{dict(zip(NAMES, commands.COMMANDS.values(), strict=True))[name]}")
    assert module.main([name, "--help"]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert (first, shlex.split(second)[3:]) == ("Example:", example(name))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ON_A_RUN])
def test_the_example_is_accepted_from_the_repository_root(name):
    """All its flags are valid, so a wrong value added to them is what is reported."""
    if name == "benchmark":
        wrong, message = "--config.benchmark.variants=draem", sentences.UNKNOWN_VARIANTS.format(found="draem", known="")
    else:
        wrong, message = "--config.seed=-1", re.escape(sentences.SEED_OUT_OF_RANGE.format(found=-1, most=4000000))
    code, _, err = in_process(ROOT, name, *example(name), wrong)
    assert code == 2
    assert re.match(f"iumad_jax: {message}", err)


OTHERS = [
    "iumad_jax.data.candies",
    *(f"kernels.benchmarks.{name}" for name in ("selective_scan", "training_step", "pytorch_uniad", "tables", "gpu")),
    *(f"tests.harness.{name}" for name in ("growth", "input_pipeline", "metrics", "saving", "scaling", "survival")),
    "tests.fuzz",
]


@pytest.mark.slow
@pytest.mark.parametrize("module", OTHERS)
@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
def test_help_of_tools_begins_with_an_example(module, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert not ended.value.code
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert f"python -m {module}" in (second if first == "Example:" else first.removeprefix("usage: "))


@pytest.mark.slow
@pytest.mark.usefixtures("compile_quickly")
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize("name", [name for name in ON_A_RUN if name not in ("robustness", *ON_OBJECTS)])
def test_the_example_runs_after_the_quickstart(home, command, name):
    """Its workdir is the default workdir of the quickstart, here a link to another run."""
    (workdir,) = [flag.removeprefix("--workdir=") for flag in example(name) if flag.startswith("--workdir=")]
    values = cli.flags.FlagValues()
    cli.define_config(values)
    cli.define_workdir(values)
    values(["main", f"--config={QUICKSTART}"])
    assert workdir == str(cli.config_and_workdir(values)[1])
    run = home / workdir
    run.parent.mkdir(exist_ok=True)
    if not run.exists():
        run.symlink_to(home / "run")
    code, out, err = command(name, *example(name))
    assert code == 0, err
    assert out
