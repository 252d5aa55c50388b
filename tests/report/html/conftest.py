"""A real browser, driven over the Chrome DevTools Protocol through a pair of pipes, and a run to look at."""

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
_START = "import os, sys; os.dup2({}, 3); os.dup2({}, 4); os.execv(sys.argv[1], sys.argv[1:])"  # it reads 3, writes 4


class Browser:
    """One tab; `errors` holds whatever a page complained about."""

    def __init__(self, program: str, profile: Path):
        ours, theirs = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (ours[0], theirs[1])]
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START.format(*ends), program, *flags, f"--user-data-dir={profile}"],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (ours[0], theirs[1], *ends):
            os.close(end)
        self._to, self._from = os.fdopen(ours[1], "wb", buffering=0), os.fdopen(theirs[0], "rb")
        self._unread, self._number, self._session = b"", 0, None
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params):
        """The result of a method of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        self._to.write(json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path: Path, width: int = 1280, height: int = 900):
        """Loads a file in a window of a size, on a light screen."""
        self.errors.clear()
        self.call("Emulation.setEmulatedMedia", media="", features=[{"name": "prefers-color-scheme", "value": "light"}])
        self.resize(width, height)
        self.call("Page.navigate", url=path.as_uri())
        while (event := self._read()).get("method") != "Page.loadEventFired":
            self._note(event)
        self.settle()

    def resize(self, width: int, height: int):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def run(self, script: str):
        """The value of an expression in the page, awaited."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def settle(self):
        """Waits until the page has drawn what it was told to."""
        frames = "requestAnimationFrame(() => requestAnimationFrame(done))"
        self.run(f"new Promise(done => {frames}).then(() => new Promise(done => setTimeout(() => {frames}, 50)))")

    def click(self, selector: str):
        """A click of the mouse in the middle of an element."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center', behavior: 'instant'});"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def press(self, key: str, code: int, times: int = 1):
        """A key, pressed where the focus is."""
        for _ in range(times):
            text = {"text": "\r"} if key == "Enter" else {}
            for kind, more in (("keyDown", text), ("keyUp", {})):
                self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)
        self.settle()

    def choose(self, select: str, value: str):
        """An option of a <select>, as a user's choice is told to the page."""
        self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(select)}); e.value = {json.dumps(value)};"
            " e.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )
        self.settle()

    def rows(self, table: str):
        """The text of every cell of a table, row by row."""
        return self.run(
            f"[...document.querySelectorAll('{table} tr')].map(r => [...r.cells].map(c => c.innerText.trim()))"
        )

    def close(self):
        self._session = None
        self.call("Browser.close")
        self._process.wait(20)
        self._to.close()
        self._from.close()

    def _read(self):
        while b"\0" not in self._unread:
            more = os.read(self._from.fileno(), 1 << 20)
            assert more, "the browser ended"
            self._unread += more
        message, self._unread = self._unread.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event):
        """Errors and warnings, and any request that leaves the file."""
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(str(params["args"]))
        if method == "Log.entryAdded":
            self.errors.append(str(params["entry"]))
        if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("data:", "file:")):
            self.errors.append(f"asked for {params['request']['url']}")


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    found = [program for name in NAMES if (program := shutil.which(name))]
    if not found:
        pytest.skip(f"no browser is installed: none of {', '.join(NAMES)} is in PATH")
    browser = Browser(found[0], tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


# ---- a run made up, with names that try to be more than names ----

EVIL = "</script><img src=x onerror=document.title='evil'>\"'&"
OBJECTS = ["ant", "bee", "cat"]  # the protocol learns the cat and the ant, then the bee
STEPS = [["cat", "ant"], ["bee"]]
VARIANTS = ("ib_iumad", "feature_norm", "nearest_neighbours")
KINDS = ["good"] * 4 + ["bump"] * 3 + [EVIL] * 2
SIZE = 32


def truth(name):
    """Red photographs with a green square, a bump of 2 cm on a plane, and defects in the corner."""
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
    """By method: scores and maps, of which the run's own method sees most."""
    rng = np.random.default_rng([OBJECTS.index(name), step])
    *_, masks = truth(name)
    maps = {
        method: (rng.random(masks.shape) + (2 - place) * masks * rng.random((len(masks), 1, 1))).astype(np.float32)
        for place, method in enumerate(VARIANTS)
    }
    return {method: values.max(axis=(1, 2)) for method, values in maps.items()}, maps


def kept(name, step, marked=True):
    scores, maps = predictions(name, step)
    ids = [f"{row:03}" for row in range(len(KINDS))]
    anomalous = [kind != "good" for kind in KINDS]
    image, pixel = thresholds(name, step)
    masks = truth(name)[2] if marked else None
    alarm = scores[VARIANTS[0]] > image
    return samples.summarise(ids, KINDS, anomalous, masks, scores, maps, alarm, np.full(len(KINDS), pixel))


def thresholds(name, step):
    """Of images and of pixels: half of the good images pass."""
    scores, maps = predictions(name, step)
    good = np.array(KINDS) == "good"
    return np.median(scores[VARIANTS[0]][good]), np.quantile(maps[VARIANTS[0]][good], 0.9)


def matrix(method):
    rng = np.random.default_rng(VARIANTS.index(method))
    values = rng.uniform(0.4, 0.99, (2, 3))
    values[0, OBJECTS.index("bee")] = math.nan
    metrics = {metric: values ** (1 + place / 4) for place, metric in enumerate(tables.METRICS)}
    metrics["p_auroc_object"] = np.where(np.arange(3) == 0, np.nan, metrics["p_auroc_object"])  # undefined for the ant
    return {"matrix": metrics, "summary": tables.summarise(metrics), "bytes": 1_500_000}


def run(**others):
    own, *baselines = VARIANTS
    return {
        "config": {"method": own, "dataset": {"name": EVIL}, "modality": "rgb+depth", "seed": 3},
        "protocol": "2-1",
        "objects": OBJECTS,
        "steps": STEPS,
        **matrix(own),
        "baselines": {method: matrix(method) for method in baselines},
        "decisions": decisions(),
        "seconds": 75.0,
        "versions": {"jax": "0.11"},
        **others,
    }


def decisions():
    """As after both steps: half of the good images pass."""

    def limit(value):
        return {"threshold": value, "interval": [value - 0.1, value + 0.1], "images": 7, "false_alarm_bound": 0.125}

    def of(name, step):
        scores, _ = predictions(name, step)
        good = np.array(KINDS) == "good"
        image, pixel = thresholds(name, step)
        alarm = scores[VARIANTS[0]] > image
        test = {"false_alarms": alarm[good].mean(), "misses": (~alarm[~good]).mean(), "recognised": 1.0}
        return {"image": limit(float(image)), "pixel": limit(float(pixel)), "test": test | {"taken_as_unknown": 0.25}}

    learned = [["cat", "ant"], ["cat", "ant", "bee"]]
    return [{"quantile": 0.5, "objects": {name: of(name, step) for name in learned[step]}} for step in (0, 1)]


def write(workdir, **others):
    results = run(**others)
    for step, name in ((0, "cat"), (0, "ant"), (1, "cat"), (1, "ant"), (1, "bee")):
        samples.save(workdir, step, name, kept(name, step))
        samples.save_pictures(workdir, name, *truth(name), height_scale=0.02)
    ledger = Ledger(workdir / "ledger.jsonl")
    for step in (0, 1):
        for epoch in range(5):
            ledger.append(
                "epoch", step=step, epoch=epoch, loss=10.0 / (1 + epoch), fusion=5.0 / (1 + epoch), kl=0.01, idle=0.0
            )
    html.write(workdir, results)
    return results


def best_bump(name):
    """The number of its image."""
    scores = predictions(name, 1)[0][VARIANTS[0]]
    return max((row for row, kind in enumerate(KINDS) if kind == "bump"), key=lambda row: scores[row])


def upsampled(name, row, step=1):
    """A kept map at the size of the image, by an independent route."""
    of_step = kept(name, step)
    small = of_step.low + of_step.maps[row] / 255 * (of_step.high - of_step.low)
    return np.asarray(Image.fromarray(small.astype(np.float32)).resize((SIZE, SIZE), Image.Resampling.BILINEAR))


@pytest.fixture(scope="session")
def zoo():
    """The run above: its constants, and what makes its parts."""
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
