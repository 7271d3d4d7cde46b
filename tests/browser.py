"""A headless Chromium that tests drive, by its DevTools protocol over two pipes."""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt install chromium)")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--no-first-run", "--hide-scrollbars",
)  # fmt: skip
_PATIENCE = 60.0  # seconds


class Page:
    """The one page of a browser."""

    def __init__(self, orders: int, replies: int) -> None:
        self._orders, self._replies, self._numbers, self._session = orders, replies, itertools.count(1), ""
        self._read = b""
        self.complaints: list[str] = []  # exceptions, and what the console and the log say
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        order = {"id": number, "method": method, "params": parameters}
        order |= {"sessionId": self._session} if self._session else {}
        os.write(self._orders, json.dumps(order).encode() + b"\0")
        while True:
            reply = self._next()
            if reply.get("id") == number:
                assert "error" not in reply, reply
                return reply["result"]
            about = reply.get("params", {})
            match reply.get("method"):
                case "Runtime.exceptionThrown":
                    self.complaints.append(str(about["exceptionDetails"]))
                case "Runtime.consoleAPICalled" | "Log.entryAdded":
                    self.complaints.append(str(about))

    def _next(self) -> Any:
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._replies], [], [], _PATIENCE)
            more = os.read(self._replies, 1 << 16) if ready else b""
            assert more, "the browser has ended, or hangs"
            self._read += more
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def js(self, code: str) -> Any:
        """The value of an expression."""
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, code: str) -> Any:
        """Wait until an expression is true."""
        end = time.monotonic() + _PATIENCE
        while not (value := self.js(code)):
            assert time.monotonic() < end, (code, self.complaints)
            time.sleep(0.05)
        return value

    def choose(self, selector: str, path: Path) -> None:
        """Give a file to an input, as its dialog does."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def drop(self, x: int, y: int, path: Path) -> None:
        """Drag a file onto the page and let go."""
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def press(self, key: str) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        code = {"Enter": 13, "Tab": 9}[key]
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def look(self, width: int, height: int = 900, dark: bool = False, phone: bool = False) -> None:
        """The window, and what the person prefers."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)


@contextmanager
def browsing(folder: Path) -> Iterator[Page]:
    """A page in a browser whose profile is in ``folder``."""
    (out, orders), (replies, back) = os.pipe(), os.pipe()
    # the browser reads from descriptor 3 and writes to 4
    words = [str(CHROMIUM), *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}"]
    script = f'exec 3<&{out} 4>&{back}; exec "$0" "$@"'
    process = subprocess.Popen(
        ["bash", "-c", script, *words], pass_fds=(out, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(out)
    os.close(back)
    try:
        page = Page(orders, replies)
        yield page
        with suppress(AssertionError, OSError):
            page.call("Browser.close")
    finally:
        os.close(orders)
        os.close(replies)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
