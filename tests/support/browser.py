"""A headless Chromium, driven over its DevTools pipe: NUL-ended JSON on two file descriptors."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--mute-audio",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# Chromium reads its orders from descriptor 3 and answers on 4.
_ONTO_3_AND_4 = (
    "import fcntl, os, sys; high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]; "
    "[os.dup2(fd, onto) for fd, onto in zip(high, (3, 4))]; os.execvp(sys.argv[3], sys.argv[3:])"
)


def chromium() -> str | None:
    """The browser's program, or None. CHROME names another one."""
    names = (os.environ.get("CHROME"), "chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if name and (found := shutil.which(name))), None)


class Page:
    """One tab."""

    def __init__(self, orders: int, answers: int) -> None:
        self._orders, self._answers, self._rest, self._last, self._session = orders, answers, b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """One order and its result; events on the way are kept."""
        self._last += 1
        order = {"id": self._last, "method": method, "params": params}
        order |= {"sessionId": self._session} if self._session else {}
        os.write(self._orders, json.dumps(order).encode() + b"\0")
        while True:
            message = self._message()
            if message.get("id") == self._last:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def _message(self) -> dict[str, Any]:
        end = time.monotonic() + 30
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], max(0, end - time.monotonic()))
            got = os.read(self._answers, 1 << 20) if ready else b""
            assert got, "the browser doesn't answer"
            self._rest += got
        message, self._rest = self._rest.split(b"\0", 1)
        return dict(json.loads(message))

    def show(self, path: Path, *, width: int = 1200, height: int = 900, scheme: str = "light") -> None:
        """Open a file, and wait until it and its media are there."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=path.as_uri())
        ready = "document.readyState == 'complete' && [...document.querySelectorAll('audio')].every(a => a.readyState)"
        end = time.monotonic() + 20
        while not self.value(ready):
            assert time.monotonic() < end, "the page doesn't finish loading"
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives; the page's own policy doesn't bind it."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path: Path) -> Path:
        """The whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path


@contextlib.contextmanager
def browser(program: str, folder: Path) -> Iterator[Page]:
    """A fresh browser whose profile lies in `folder`."""
    orders_out, orders_in = os.pipe()
    answers_out, answers_in = os.pipe()
    command = [sys.executable, "-c", _ONTO_3_AND_4, str(orders_out), str(answers_in), program, *_FLAGS]
    process = subprocess.Popen(
        [*command, f"--user-data-dir={folder}"],
        pass_fds=(orders_out, answers_in),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(orders_out)
    os.close(answers_in)
    try:
        yield Page(orders_in, answers_out)
    finally:
        os.close(orders_in)  # it ends when its orders do
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(answers_out)
