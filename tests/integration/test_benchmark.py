"""The benchmark command: interrupted cells are resumed, and one table compares all cells."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from iumad_jax.benchmark import cells
from iumad_jax.config import small
from iumad_jax.errors import UserError
from iumad_jax.report import comparison
from tests import sentences
from tests.integration.conftest import SMALL, as_flags

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[2] / "configs" / "benchmark.py"
OBJECTS = "CandyCane,GummyBear"
KEYS = SMALL | {
    "dataset.name": "eyecandies",
    "dataset.root": "candies",
    "dataset.objects": OBJECTS,
    "baselines": "feature_norm",
    "model.states": 1,
    "model.class_grid": 8,
    "train.epochs": 1,
    "report.pictures_per_object": 0,
    "benchmark.variants": "uniad,iuf",
    "benchmark.modalities": "rgb",
    "benchmark.protocols": "1-1",
}


def plan(**changes):
    config = small("6-4")
    keys = {"variants": "uniad,ib_iumad", "modalities": "rgb,rgb+depth", "protocols": "6-4,6-1"}
    config.benchmark = ConfigDict(keys | {"seeds": 3, "seeds_of_one_modality": 1} | changes)
    return config


def test_cells():
    """Both variants and protocols have one seed with one modality and three with both; baselines run once per input."""
    configs = {comparison.name(*key): config for config, key in cells(plan())}
    assert len(configs) == 2 * 2 * (1 + 3)
    config = configs["ib_iumad_rgb+depth_6-1_seed2"]
    assert (config.method, config.modality, config.protocol, config.seed) == ("ib_iumad", "rgb+depth", "6-1", 2)
    assert config.continual.strategy == "iuf"
    assert configs["uniad_rgb_6-4_seed0"].continual.strategy == "finetune"
    assert "uniad_rgb_6-4_seed1" not in configs
    assert {name for name, config in configs.items() if config.baselines} == {
        name for name in configs if "uniad" in name
    }
    assert all("benchmark" not in config for config in configs.values())


def test_an_unknown_variant_is_refused():
    with pytest.raises(
        UserError, match=sentences.UNKNOWN_VARIANTS.format(found="uniad,draem", known="uniad, uniad-iuf")
    ):
        list(cells(plan(variants="uniad,draem")))


def test_failed_cells_are_reported_after_all_cells_were_tried(tmp_path):
    """The exit code shows the failure to scripts."""
    for name in ("uniad_rgb_1-1_seed0", "iuf_rgb_1-1_seed0"):
        (tmp_path / "cells" / name).mkdir(parents=True)
        (tmp_path / "cells" / name / "config.json").write_text("{")
    flags = [f"--config={CONFIG}", "--workdir=.", *as_flags(KEYS)]
    command = [sys.executable, "-m", "iumad_jax.benchmark", *flags]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2
    *messages, last = process.stderr.splitlines()
    for line, name in zip(messages, ("uniad_rgb_1-1_seed0", "iuf_rgb_1-1_seed0"), strict=True):
        assert line.startswith(sentences.CELL_STOPPED.format(name))
    assert last.startswith(
        f"iumad_jax: {sentences.CELLS_STOPPED.format(count=2, all=2, cells='uniad_rgb_1-1_seed0, iuf_rgb_1-1_seed0')}"
    )


def test_an_interrupted_benchmark_is_resumed(tmp_path, candies):
    candies(tmp_path / "candies", OBJECTS, train=2, val=1, test=2)
    flags = [f"--config={CONFIG}", "--workdir=runs", *as_flags(KEYS)]

    def start():
        command = [sys.executable, "-m", "iumad_jax.benchmark", *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, **pipes)

    first, second = (tmp_path / "runs" / "cells" / f"{variant}_rgb_1-1_seed0" for variant in ("uniad", "iuf"))
    with start() as process:
        while not (second / "ledger.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
    assert process.returncode == 75, err
    assert sentences.STOPPING.format("SIGTERM") in err
    assert sentences.CELL_STOPPED_PART not in err  # this is reported only for cells that cannot be trained
    table = (tmp_path / "runs" / "comparison.md").read_text()
    assert "| uniad " in table
    assert "| iuf " not in table
    assert json.loads((first / "results.json").read_text())["baselines"].keys() == {"feature_norm"}
    before = (first / "results.json").stat().st_mtime_ns
    with start() as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert sentences.RUN_FINISHED.format("uniad_rgb_1-1_seed0") in out
    table = (tmp_path / "runs" / "comparison.md").read_text()
    assert out.endswith(table + "\n")
    for variant in ("uniad", "iuf", "feature_norm"):
        assert f"| {variant} " in table
    assert (first / "results.json").stat().st_mtime_ns == before
