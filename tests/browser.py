"""A headless Chromium, driven over its DevTools protocol: what a page shows, what it asks for, what goes wrong in it.

Nothing is installed for it: the browser is the system's, the protocol is JSON over a websocket.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 30.0


def chromium() -> str | None:
    """The browser of this machine, if it has one."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One page; use as a context manager.

    Attributes:
        asked: addresses that the page asked for, but for pictures that it holds itself.
        problems: errors of scripts, and what the console says of refused content.
    """

    def __init__(self, width: int = 1280, height: int = 900):
        path = chromium()
        assert path is not None, "there is no Chromium"
        self.folder = tempfile.TemporaryDirectory(prefix="wam-browser-", ignore_cleanup_errors=True)
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio", "--hide-scrollbars", "--disable-background-networking", "--disable-component-update"]
        self.process = subprocess.Popen(
            [path, *flags, "--remote-debugging-port=0", f"--user-data-dir={self.folder.name}", f"--window-size={width},{height}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.asked: list[str] = []
        self.problems: list[str] = []
        self._number = 0
        port, where = self._port()
        self.socket = connect(f"ws://127.0.0.1:{port}{where}", max_size=None, compression=None).__enter__()
        target = next(t for t in self._send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self._send("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.size(width, height)

    def _port(self) -> tuple[int, str]:
        told, until = Path(self.folder.name) / "DevToolsActivePort", time.monotonic() + PATIENCE
        while not (told.is_file() and len(told.read_text().split()) == 2):
            assert time.monotonic() < until and self.process.poll() is None, "Chromium did not come up"
            time.sleep(0.05)
        port, where = told.read_text().split()
        return int(port), where

    def _send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        self.socket.send(json.dumps({"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}))
        while True:
            message = json.loads(self.socket.recv(PATIENCE))
            self._note(message)
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                return message["result"]

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent" and not params["request"]["url"].startswith("data:image/"):
            self.asked.append(params["request"]["url"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A method of the protocol, of this page."""
        return self._send(method, self.session, **params)

    def open(self, url: str) -> None:
        """Go there, and wait until the page is read."""
        told = self.call("Page.navigate", url=url)
        assert "errorText" not in told, told
        self.until('location.href !== "about:blank" && document.readyState === "complete"')

    def size(self, width: int, height: int) -> None:
        """Of the window, in pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def theme(self, name: str) -> None:
        """What the system prefers: light or dark."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def run(self, script: str) -> Any:
        """The value of an expression in the page, awaited."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str, seconds: float = PATIENCE) -> Any:
        """Wait until an expression is true; returns its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never came true: {script}\n{self.run('document.body.innerText')}\n{self.problems}"
            time.sleep(0.05)
        return value

    def press(self, key: str) -> None:
        """A key, such as " " or ArrowDown."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code="Space" if key == " " else key, text=" " if key == " " and kind == "keyDown" else "")

    def picture(self, path: Path, whole: bool = True) -> None:
        """A PNG of the page."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]))

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        self.folder.cleanup()
