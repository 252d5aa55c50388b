"""A real browser, driven over the Chrome DevTools Protocol through a pair of pipes."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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

    def screenshot(self, path: Path, whole: bool = False):
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

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
