"""A real browser, controlled by the Chrome DevTools Protocol through two pipes, and an invented run."""

import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from iumad_jax.report import html, samples, tables
from iumad_jax.runtime.ledger import Ledger

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# The browser reads commands from file descriptor 3 and writes answers to 4.
_START = "import os, sys; os.dup2({}, 3); os.dup2({}, 4); os.execv(sys.argv[1], sys.argv[1:])"


class Browser:
    """A browser with one tab; `errors` collects the errors and warnings of the page."""

    def __init__(self, program: str, profile: Path):
        commands, answers = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands[0], answers[1])]
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START.format(*ends), program, *flags, f"--user-data-dir={profile}"],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (commands[0], answers[1], *ends):
            os.close(end)
        self._commands, self._answers = os.fdopen(commands[1], "wb", buffering=0), os.fdopen(answers[0], "rb")
        self._unread, self._number, self._session = b"", 0, None
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params):
        """Call a method of the protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        self._commands.write(
            json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0"
        )
        while (answer := self._read()).get("id") != self._number:
            self._record(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path: Path, width: int = 1280, height: int = 900):
        """Load a file in a window of the given size, with a light colour scheme."""
        self.errors.clear()
        self.call("Emulation.setEmulatedMedia", media="", features=[{"name": "prefers-color-scheme", "value": "light"}])
        self.resize(width, height)
        self.call("Page.navigate", url=path.as_uri())
        while (event := self._read()).get("method") != "Page.loadEventFired":
            self._record(event)
        self.settle()

    def resize(self, width: int, height: int):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def run(self, script: str):
        """Evaluate an expression in the page, await it and return its value."""
        response = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in response, response["exceptionDetails"]
        return response["result"].get("value")

    def settle(self):
        """Wait until the page is drawn."""
        frames = "requestAnimationFrame(() => requestAnimationFrame(done))"
        self.run(f"new Promise(done => {frames}).then(() => new Promise(done => setTimeout(() => {frames}, 50)))")

    def click(self, selector: str):
        """Click in the middle of an element."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center', behavior: 'instant'});"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def press(self, key: str, code: int, times: int = 1):
        """Press a key on the focused element."""
        for _ in range(times):
            text = {"text": "\r"} if key == "Enter" else {}
            for kind, extra in (("keyDown", text), ("keyUp", {})):
                self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **extra)
        self.settle()

    def choose(self, select: str, value: str):
        """Choose an option of a <select> and notify the page, like a choice by a user."""
        self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(select)}); e.value = {json.dumps(value)};"
            " e.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )
        self.settle()

    def rows(self, table: str):
        """Return the text of every cell of a table, row by row."""
        return self.run(
            f"[...document.querySelectorAll('{table} tr')].map(r => [...r.cells].map(c => c.innerText.trim()))"
        )

    def close(self):
        self._session = None
        self.call("Browser.close")
        self._process.wait(20)
        self._commands.close()
        self._answers.close()

    def _read(self):
        while b"\0" not in self._unread:
            data = os.read(self._answers.fileno(), 1 << 20)
            assert data, "the browser ended"
            self._unread += data
        message, self._unread = self._unread.split(b"\0", 1)
        return json.loads(message)

    def _record(self, event):
        """Record errors, warnings and requests to anything but the file."""
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(str(params["args"]))
        if method == "Log.entryAdded":
            self.errors.append(str(params["entry"]))
        if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("data:", "file:")):
            self.errors.append(f"requested {params['request']['url']}")


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    programs = [program for name in NAMES if (program := shutil.which(name))]
    if not programs:
        pytest.skip(f"no browser is installed: none of {', '.join(NAMES)} is in PATH")
    browser = Browser(programs[0], tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


# ---- an invented run, with names that try to inject code ----

EVIL = "</script><img src=x onerror=document.title='evil'>\"'&"
OBJECTS = ["ant", "bee", "cat"]  # the protocol learns the cat and the ant, then the bee
STEPS = [["cat", "ant"], ["bee"]]
VARIANTS = ("ib_iumad", "feature_norm", "memory_bank")
KINDS = ["good"] * 4 + ["bump"] * 3 + [EVIL] * 2
SIZE = 32


def truth(name):
    """Return red images with a green square, heights with a bump of 2 cm, and masks of defects in a corner."""
    rng = np.random.default_rng(OBJECTS.index(name))
    rgb = np.full((len(KINDS), SIZE, SIZE, 3), (150, 60, 40), np.uint8)
    rgb[:, 8:24, 8:24] = (40, 120, 60)
    heights = np.zeros((len(KINDS), SIZE, SIZE), np.float32)
    heights[:, 8:24, 8:24] = 0.02
    masks = np.zeros((len(KINDS), SIZE, SIZE), bool)
    for row, kind in enumerate(KINDS):
        if kind != "good":
            y, x = rng.integers(4, 20, 2)
            masks[row, y : y + 8, x : x + 8] = True
    return rgb, heights, masks


def predictions(name, step):
    """Return scores and maps by method. The run's method responds most to defects."""
    rng = np.random.default_rng([OBJECTS.index(name), step])
    *_, masks = truth(name)
    maps = {
        method: (rng.random(masks.shape) + (2 - index) * masks * rng.random((len(masks), 1, 1))).astype(np.float32)
        for index, method in enumerate(VARIANTS)
    }
    return {method: values.max(axis=(1, 2)) for method, values in maps.items()}, maps


def summary(name, step, with_masks=True):
    scores, maps = predictions(name, step)
    ids = [f"{row:03}" for row in range(len(KINDS))]
    anomalous = [kind != "good" for kind in KINDS]
    image, pixel = thresholds(name, step)
    masks = truth(name)[2] if with_masks else None
    alarm = scores[VARIANTS[0]] > image
    return samples.summarise(ids, KINDS, anomalous, masks, scores, maps, alarm, np.full(len(KINDS), pixel))


def thresholds(name, step):
    """Return the thresholds of images and of pixels; half of the good images are below the former."""
    scores, maps = predictions(name, step)
    good = np.array(KINDS) == "good"
    return np.median(scores[VARIANTS[0]][good]), np.quantile(maps[VARIANTS[0]][good], 0.9)


def matrix(method):
    rng = np.random.default_rng(VARIANTS.index(method))
    values = rng.uniform(0.4, 0.99, (2, 3))
    values[0, OBJECTS.index("bee")] = math.nan
    metrics = {metric: values ** (1 + index / 4) for index, metric in enumerate(tables.METRICS)}
    metrics["p_auroc_object"] = np.where(np.arange(3) == 0, np.nan, metrics["p_auroc_object"])  # undefined for the ant
    return {
        "matrix": metrics,
        "summary": tables.summarise(metrics),
        "intervals": {metric: intervals(rows[-1]) for metric, rows in metrics.items()},
        "kinds": {
            name: {kind: {"images": 3, "alarms": 1 / 3} | dict.fromkeys(metrics, 0.5 + column / 10) for kind in kinds}
            for column, (name, kinds) in enumerate([("ant", ["bump", EVIL]), ("cat", ["bump"])])
        },
        "bytes": 1_500_000,
    }


def intervals(values):
    """Return invented intervals of all objects and of their mean."""
    mean = np.nanmean(values) if not np.isnan(values).all() else math.nan
    return {"objects": np.stack([values - 0.1, values + 0.01], axis=1), "mean": (mean - 0.05, mean + 0.005)}


def run(**others):
    trained, *baselines = VARIANTS
    return {
        "config": {"method": trained, "dataset": {"name": EVIL}, "modality": "rgb+depth", "seed": 3},
        "protocol": "2-1",
        "objects": OBJECTS,
        "steps": STEPS,
        "acts": [{"act": "learn", "objects": names, "before": {}} for names in STEPS],
        **matrix(trained),
        "baselines": {method: matrix(method) for method in baselines},
        "decisions": decisions(),
        "seconds": 75.0,
        "versions": {"jax": "0.11"},
        **others,
    }


def decisions():
    """Return the decisions after both steps; half of the good images are false alarms."""

    def threshold(value):
        return {"threshold": value, "interval": [value - 0.1, value + 0.1], "images": 7, "false_alarm_bound": 0.125}

    def decisions_of_object(name, step):
        scores, _ = predictions(name, step)
        good = np.array(KINDS) == "good"
        image, pixel = thresholds(name, step)
        alarm = scores[VARIANTS[0]] > image
        test = {"false_alarms": alarm[good].mean(), "misses": (~alarm[~good]).mean(), "recognised": 1.0}
        return {
            "image": threshold(float(image)),
            "pixel": threshold(float(pixel)),
            "test": test | {"taken_as_unknown": 0.25},
        }

    learned = [["cat", "ant"], ["cat", "ant", "bee"]]
    return [
        {"quantile": 0.5, "objects": {name: decisions_of_object(name, step) for name in learned[step]}}
        for step in (0, 1)
    ]


def write(workdir, **others):
    results = run(**others)
    for step, name in ((0, "cat"), (0, "ant"), (1, "cat"), (1, "ant"), (1, "bee")):
        pictures = samples.save_pictures(workdir, name, *truth(name), height_scale=0.02)
        samples.save(workdir, step, name, summary(name, step)._replace(pictures=pictures))
    ledger, live = Ledger(workdir / "ledger.jsonl"), Ledger(workdir / "live.jsonl")
    for step in (0, 1):
        ledger.append("step", step=step, images=8 + step, changes={"dataset.root": EVIL} if step else {})
        live.append("snapshot", time=f"2026-11-28T12:0{step}:59.000+00:00", step=step)
        for epoch in range(5):
            ledger.append(
                "epoch", step=step, epoch=epoch, loss=10.0 / (1 + epoch), fusion=5.0 / (1 + epoch), kl=0.01, idle=0.0
            )
    html.write(workdir, results)
    return results


def best_bump(name):
    """Return the index of the bump image with the highest score."""
    scores = predictions(name, 1)[0][VARIANTS[0]]
    return max((row for row, kind in enumerate(KINDS) if kind == "bump"), key=lambda row: scores[row])


def upsampled(name, row, step=1):
    """Decode a stored map and resize it to the size of the image, with PIL."""
    stored = summary(name, step)
    small = stored.low + stored.maps[row] / 255 * (stored.high - stored.low)
    return np.asarray(Image.fromarray(small.astype(np.float32)).resize((SIZE, SIZE), Image.Resampling.BILINEAR))


@pytest.fixture(scope="session")
def zoo():
    """Return the constants and functions of the invented run."""
    return SimpleNamespace(**globals())


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write(folder, unknown={"objects": {"yak": 0.75}, "taken_as_unknown": 0.25})
    return folder


@pytest.fixture
def page(browser, workdir):
    browser.open(workdir / "report.html")
    yield browser
    assert browser.errors == []
