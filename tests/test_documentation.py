"""The documentation: links, commands, Python and config keys of all pages, and the API documentation by pdoc."""

import ast
import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from absl import flags

from configs.benchmark import get_config
from iumad_jax import benchmark
from iumad_jax import config as configs
from iumad_jax.runtime import workdir as workdirs

ROOT = Path(__file__).parents[1]
ROOMS = ("configs", "iumad_jax", "kernels", "notebooks", "tests")
PAGES = {
    str(file.relative_to(ROOT)): file.read_text()
    for file in [*ROOT.glob("*.md"), *sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.md"))]
}
DESCRIPTION = "pyproject.toml"  # the wheel's, which package indexes show without this repository
PAGES[DESCRIPTION] = tomllib.loads((ROOT / DESCRIPTION).read_text())["project"]["readme"]["text"]
CLUSTER = ROOT / "configs" / "cluster"
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`+[^`]+`+")
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"python -m ([\w.]+)([^\n`;&|#]*)")  # after backslashes at the ends of lines are resolved
OTHERS = ("iumad_jax", "pytest", "venv")  # take other arguments than flags
SENTINEL = "no_such_flag"


def anchors(page):
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands():
    """Return the module and the arguments of every python -m command of the pages and of configs/cluster, once."""
    pods = [pod for pod in yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text()) if pod["kind"] == "Job"]
    command = " ".join(pods[0]["spec"]["template"]["spec"]["containers"][0]["command"])
    texts = [*PAGES.values(), (CLUSTER / "slurm.sh").read_text(), command]
    found = {match for text in texts for match in COMMAND.findall(re.sub(r"\\\n\s*", "", text))}
    return sorted((module, arguments.strip()) for module, arguments in found if module not in OTHERS)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings(name):
    for target in LINK.findall(CODE.sub("", FENCED.sub("", PAGES[name]))):
        if "://" in target:
            continue
        assert name != DESCRIPTION, target
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


@pytest.mark.parametrize(("module", "arguments"), commands())
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
def test_commands_are_accepted(module, arguments, monkeypatch, tmp_path, capsys):
    """Every flag and key is known and every value valid, so that an unknown flag after them is what is reported."""
    run = configs.paper("1-0").to_dict() | {"format": workdirs.FORMAT}
    (tmp_path / "config.json").write_text(json.dumps(run))
    arguments = re.sub(r"--workdir=\S+", f"--workdir={tmp_path}", arguments)
    arguments = arguments.replace("--config=FILE", "--config=configs/quickstart.py").replace("--data=DATA", "")
    arguments = re.sub(r"\$\(\w+\)", "0", arguments)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [module, *shlex.split(arguments), f"--{SENTINEL}"])
    with pytest.raises((SystemExit, flags.Error)) as refused:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert SENTINEL in f"{refused.value}{capsys.readouterr().err}"


@pytest.mark.parametrize("name", PAGES)
def test_code_blocks_parse(name):
    for language, block in FENCED.findall(PAGES[name]):
        if language == "python":
            ast.parse(f"{{{block}}}" if block.startswith(" ") else block)  # indented: a line of a dictionary
        elif language == "bash":
            subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def test_script_for_slurm_parses():
    subprocess.run(["bash", "-n", CLUSTER / "slurm.sh"], check=True)


@pytest.mark.parametrize("name", PAGES)
def test_config_keys_exist(name):
    keys = [*configs.flat(configs.paper("1-0").to_dict()), *(f"benchmark.{key}" for key in benchmark._KEYS)]
    groups = {key[:end] for key in keys for end in range(len(key)) if key[end] == "."}
    for key in re.findall(r"--config\.([a-z_.\d]*[a-z_\d])(?![A-Z])", PAGES[name]):
        assert key in keys or key in groups, key


def test_table_of_keys_is_that_of_the_package():
    """It has every key, the values of `paper`, and those of `small` where they differ."""
    paper, small = (configs.flat(values("1-0").to_dict()) for values in (configs.paper, configs.small))
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \| (.*?) ?\| .+ \|$", PAGES["configs/README.md"], re.MULTILINE)
    table = {key: (value, other) for key, value, other in rows if key in paper}

    def shown(value):
        return "empty" if value == "" else f"`{value:g}`" if isinstance(value, float) else f"`{value}`"

    assert table == {
        key: (shown(value), shown(small[key]) if small[key] != value else "")
        for key, value in paper.items()
        if key != "protocol"
    }


def test_table_of_benchmark_keys_is_that_of_its_config():
    rows = re.findall(r"^\| `benchmark\.(\w+)` \| `(.*?)` \|", PAGES["configs/README.md"], re.MULTILINE)
    assert dict(rows) == {key: str(value) for key, value in get_config().benchmark.items()}


def test_the_front_page_is_short():
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 200
    assert max(map(len, lines)) <= 120
    assert len(PAGES["README.md"].split()) <= 1500


@pytest.mark.slow
def test_docstrings_render_without_warnings(tmp_path):
    command = [sys.executable, "-m", "pdoc", "-d", "google", "-o", tmp_path, "iumad_jax", "iumad_kernels"]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Warn" not in rendered.stderr
    detector = (tmp_path / "iumad_jax" / "inference" / "detector.html").read_text()
    assert "Detector.load" in detector
