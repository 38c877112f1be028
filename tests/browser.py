"""Chromium without a window, over the pipe of its DevTools protocol: no driver and no package, `chromium` on the PATH is enough.

Messages are JSON, ended by a zero byte, on file descriptors 3 (to the browser) and 4 (from it).
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
# --no-sandbox: the pages are our own files, and a container's root has no sandbox
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic", "--remote-debugging-pipe",
)  # fmt: skip
MOVE = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
SHIFT = 8  # Input.dispatchKeyEvent's modifiers


class Browser:
    """One browser with one page; `directory` gets its profile and its downloads."""

    def __init__(self, directory: Path):
        self.downloads = directory / "downloads"
        self.downloads.mkdir(parents=True)
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (to_read, to_write)]  # not in the way of 3 and 4, whatever these are here
        self._process = subprocess.Popen(
            [sys.executable, "-c", MOVE, *map(str, ends), PROGRAM, *FLAGS, f"--user-data-dir={directory / 'profile'}", "about:blank"],
            pass_fds=ends, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in (to_read, to_write, *ends):
            os.close(fd)
        self._rest, self._number, self._session = b"", 0, None
        self.events: list[dict] = []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.call(f"{domain}.enable")
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))

    def call(self, method: str, **params) -> dict:
        """Result of a command of the protocol; what the browser tells meanwhile goes to `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None and not method.startswith(("Browser.", "Target.")):
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict:
        while b"\0" not in self._rest:
            read = os.read(self._from, 1 << 16)
            assert read, f"{PROGRAM} ended with code {self._process.wait()}"
            self._rest += read
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, path: Path) -> None:
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._until_complete()

    def reload(self) -> None:
        self.js("window.old = true")
        self.call("Page.reload")
        self.wait("!window.old")
        self._until_complete()

    def _until_complete(self) -> None:
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def js(self, expression: str):
        """The value of an expression on the page, which JSON can hold."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not self.js(expression):
            assert time.monotonic() < end, f"never came true: {expression}"
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        """Keys as a person types them: 'ArrowRight', 'Enter', 'a', '1', 'Shift+1'."""
        for name in keys:
            shift, name = name.startswith("Shift+"), name.removeprefix("Shift+")
            code = f"Digit{name}" if name.isdigit() else f"Key{name.upper()}" if len(name) == 1 and name.isalpha() else name
            key = {"1": "!", "2": "@"}[name] if shift and name in "12" else name
            text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
            virtual = {"Enter": 13, "Tab": 9, "Backspace": 8}.get(name, 0)
            event = {"key": key, "code": code, "modifiers": SHIFT * shift, "windowsVirtualKeyCode": virtual}
            self.call("Input.dispatchKeyEvent", type="keyDown", **event, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """A click with the mouse in the middle of an element."""
        box = f"document.querySelector({json.dumps(selector)})"
        self.js(f"{box}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        x, y = self.js(f"(b => [b.left + b.width / 2, b.top + b.height / 2])({box}.getClientRects()[0])")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def choose(self, selector: str, path: Path) -> None:
        """Choose a file for an input."""
        found = self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")["result"]
        self.call("DOM.setFileInputFiles", files=[str(path)], objectId=found["objectId"])

    def download(self, name: str, seconds: float = 20) -> Path:
        """A file the page offered, when it is complete."""
        path, end = self.downloads / name, time.monotonic() + seconds
        while not path.exists():
            assert time.monotonic() < end, f"{name} was never downloaded; there is {[p.name for p in self.downloads.iterdir()]}"
            time.sleep(0.02)
        return path

    def close(self) -> None:
        os.close(self._to)
        os.close(self._from)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
