"""Fuzz targets that read weights, flags and files of runs, and all targets by name."""

import contextlib
import io
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl import flags

from iumad_jax import cli, continual, methods, protocol
from iumad_jax import config as configs
from iumad_jax.data import readers
from iumad_jax.data.prepared import inventory
from iumad_jax.inference import thresholds
from iumad_jax.models.state_dict import map_file, parse
from iumad_jax.report import history, result_files, samples, tables
from iumad_jax.report.history import History
from iumad_jax.runtime import ledger, live, snapshots
from iumad_jax.runtime import workdir as workdirs
from iumad_jax.runtime.progress import BEGINNING, Position
from iumad_jax.runtime.snapshots import Snapshots
from iumad_jax.shapes import Calibration
from iumad_jax.training.optimization import learning_rates, make_optimizer, step_config
from tests.fuzz.datasets import (
    Target,
    aligned,
    archive,
    depth,
    eyecandies,
    folder,
    folder_files,
    height_maps,
    images,
    layout,
    mvtec3d,
    store,
    visa,
    write,
)
from tests.models import pth

CONFIG = Path(__file__).parents[2] / "configs" / "folder.py"


def weights(folder: Path) -> Target:
    """Return a target that reads both formats of .pth, .safetensors, and a training checkpoint."""
    stored = {"0": np.arange(24, dtype=np.float32).tobytes()}
    whole = pth.storage("0", 24)
    views = {
        "rows": pth.tensor(whole, 0, (4, 6), (6, 1)),
        "turned": pth.tensor(whole, 2, (2, 3), (1, 6)),
        "scalar": pth.tensor(whole, 5, (), ()),
    }
    content = pth.state_dict(**views)
    body = content[len(pth.HEAD) : -1]
    optimizer = b"}" + pth.number(3) + b"ctorch.optim\nAdamW\n)\x81s"
    entries = pth.text("state_dict") + body + pth.text("optimizer") + optimizer
    checkpoint = pth.HEAD + b"}(" + entries + b"u."
    seeds = {
        "zip.pth": pth.zipped(content, stored),
        "legacy.pth": pth.legacy(content, stored),
        "x.ckpt": pth.zipped(checkpoint, stored),
        "x.safetensors": safetensors.numpy.save({"a": np.ones((2, 3), np.float32), "b": np.arange(4)}),
    }

    def read(name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)
        for array in parse(map_file(folder / name), folder / name, checkpoint=name.endswith(".ckpt")).values():
            array.sum()  # a read beyond the buffer would crash

    return Target(seeds, read)


# ---- flags and files of runs ----


def config(folder: Path) -> Target:
    """Return a target that reads flags --config.KEY=VALUE, one per line, and makes the early checks of a run."""
    root, files = folder / "dataset", folder_files()
    write(root, files)
    for number in range(4):  # one batch
        for kind in ("rgb", "depth"):
            write(root, {f"bolt/train/good/{kind}/{number}.png": files[f"bolt/train/good/{kind}/a b.png"]})
    keys = list(_flat(configs.paper("1-0").to_dict()).items())
    lines = [
        f"--config.{key}={value}"
        for key, value in keys
        if key not in ("dataset.root", "dataset.name", "train.batch_size")
    ]
    seeds = {str(i): "\n".join(lines[i : i + 3]).encode() for i in range(0, len(lines), 3)}
    always = (f"--config={CONFIG}:1-0", f"--config.dataset.root={root}", "--config.train.batch_size=4")

    def define(values: flags.FlagValues) -> None:
        cli.define_config(values)
        cli.define_workdir(values)

    def act(values: flags.FlagValues) -> str:
        config, _ = cli.config_and_workdir(values)
        if config.dataset.name not in ("candies", "sweets"):  # would be rendered
            configs.check(config)
            objects = readers.objects(config)
            protocol.steps(config.protocol, objects)
            method = methods.with_baselines(config)[config.method]
            continual.build(config, method)
            for step in (0, 1):
                make_optimizer(step_config(config, step))
            learning_rates(config.train, updates_per_epoch=1)
            readers.open_reader(config)
            live.check(config.report.tensorboard)
        return ""

    def read(name: str, content: bytes) -> None:
        lines = content.decode("utf8", "surrogateescape").split("\n")
        config_flags = [line for line in lines if line.startswith("--config.") and "\0" not in line]
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            sys.argv, before = ["main", *always, *config_flags], sys.argv  # ml_collections searches sys.argv for keys
            try:
                with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # raised by ml_collections
                    code = cli.execute("", sys.argv, define, act)
            finally:
                sys.argv = before
        if code:
            raise cli.UserError(errors.getvalue().removesuffix("\n"))

    return Target(seeds, read)


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def ledger_(folder: Path) -> Target:
    """Return a target that reads a ledger and then continues it."""
    file = folder / "ledger.jsonl"
    written = ledger.Ledger(file)
    written.append("step", step=0, act="learn", objects=["bolt"], images=3)
    for epoch in range(4):
        written.append("epoch", step=0, epoch=epoch, loss=0.1 * epoch, gradient_norm=1.0)
    written.append("evaluation", step=0, object="bolt", method="ib_iumad", i_auroc=0.9, aupro=None)

    def read(name: str, content: bytes) -> None:
        file.write_bytes(content)
        opened = ledger.Ledger(file)
        events = ledger.read(file)
        assert len(opened) == len(events)
        opened.append("end")
        assert ledger.read(file)[:-1] == events or events != events  # NaN

    return Target({file.name: file.read_bytes()}, read)


def workdir(folder: Path) -> Target:
    """Return a target that reads the files of a finished run: config, data record, results and report samples."""
    config = configs.small("1-1")
    with workdirs.claimed(folder, config):
        pass
    matrix = {metric: [[0.9, float("nan")], [0.8, 0.7]] for metric in tables.METRICS}
    scores = np.float32([0.5, 0.25])
    calibration = Calibration(scores, scores, np.float32([[1, 1, 2]] * 2))
    decisions = thresholds.describe({"a": calibration, "b": calibration}, 0.95)
    matrices = dict.fromkeys(("ib_iumad", "feature_norm"), matrix)
    interval = {"objects": [[0.7, 0.9], [None, None]], "mean": [0.6, 0.8]}
    intervals = {name: dict.fromkeys(tables.METRICS, interval) for name in matrices}
    of_kind = {"images": 2, "alarms": 0.5} | dict.fromkeys(tables.METRICS, 0.75)
    kinds = {name: {"a": {"dent": of_kind, "stain": of_kind}} for name in matrices}
    steps = (("a",), ("b",))
    acts = [{"act": "learn", "objects": list(learned), "before": {}} for learned in steps]
    record = History(steps, acts, {}, matrices, intervals, kinds, [decisions] * 2, dict.fromkeys(matrices, 8), 0)
    results = history.results(config.to_dict(), record, 1.0)
    result_files.write(folder, results)
    rng = np.random.default_rng(0)
    maps, masks = rng.random((3, 224, 224)).astype(np.float32), np.zeros((3, 224, 224), bool)
    masks[1:, :9, :9] = True
    summary = samples.summarise(
        "abc", ("good", "x", "x"), [0, 1, 1], masks, {"m": [1.0, 2.0, 3.0]}, {"m": maps}, [0, 1, 0], [3] * 3
    )
    samples.save(folder, 0, "bolt", summary)
    dataset_record = {"bolt": {"train": {"000": "ab", "001": None}, "test": {}}}
    (folder / "dataset.json").write_text(json.dumps(dataset_record))
    names = ("config.json", "dataset.json", "results.json", "samples/step0_bolt.npz")
    seeds = {name: (folder / name).read_bytes() for name in names}

    def read(name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)
        match name:
            case "config.json":
                read_config = workdirs.read(folder)
                methods.with_baselines(read_config)
                workdirs.check(folder, config)
            case "dataset.json":
                inventory.NameChanges.compare(
                    inventory.read(folder), ["nut"], lambda names: readers.open_reader(config, names)
                )
            case "results.json":
                tables.console(result_files.read(folder), folder)
            case _:
                samples.load(folder, 0, "bolt")

    return Target(seeds, read)


def snapshot(folder: Path) -> Target:
    """Return a target that reads or refuses a snapshot, whether or not the hashes match the mutated file."""
    variables = {"ib_iumad": {"params": {"kernel": np.arange(600, dtype=np.float32)}, "statistics": {}}}
    scores = np.float32([0.5, 0.25])
    saved = BEGINNING._replace(
        position=Position(0, 0, finished=True),
        objects=("bolt", "nut"),
        variables=variables,
        recognition={"count": np.ones(1, np.float32)},
        calibration={"bolt": Calibration(scores, scores, np.float32([[1, 1, np.inf]] * 2))},
        strategy_state={"old": {"kernel": np.ones(3, jnp.bfloat16)}, "by_object": ({"mean": np.ones(4, np.float16)},)},
        seconds=2.5,
    )
    original = folder / "original"
    with contextlib.closing(Snapshots(original)) as written:
        written.save(saved)
    files = {str(file.relative_to(original)): file.read_bytes() for file in original.rglob("*") if file.is_file()}
    damaged = folder / "run"

    def read(name: str, content: bytes) -> None:
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(original, damaged)
        kind, _, file = name.partition(" ")
        (damaged / file).write_bytes(content)
        if kind == "forged":
            folder = damaged / "snapshots" / "0"
            (folder / snapshots.MANIFEST).write_text(json.dumps(snapshots.hashes(folder)))
            snapshots.read(damaged)
        else:
            jax.tree.map(np.testing.assert_array_equal, snapshots.read(damaged), saved)

    kinds = ("damaged", "forged")
    return Target({f"{kind} {name}": content for kind in kinds for name, content in files.items() if content}, read)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "images": images,
    "depth": depth,
    "eyecandies": eyecandies,
    "mvtec3d": mvtec3d,
    "folder": folder,
    "visa": visa,
    "height_maps": height_maps,
    "aligned": aligned,
    "layout": layout,
    "store": store,
    "archive": archive,
    "weights": weights,
    "config": config,
    "ledger": ledger_,
    "workdir": workdir,
    "snapshot": snapshot,
}
