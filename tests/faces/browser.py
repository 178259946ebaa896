"""A headless Chromium driven over a pipe with the standard library: for tests that must look at a page.

Its protocol is JSON with a zero byte behind each message, read from descriptor 3 and written to descriptor 4.
"""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = Path("/usr/bin/chromium")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip
_LOOK = """(async () => {
    document.querySelectorAll('details').forEach((each) => { each.open = true; });
    const images = [...document.images];
    await Promise.allSettled(images.map((image) => image.decode()));
    const pictures = images.map((image) => {
        const levels = new Set();
        try {
            const canvas = document.createElement('canvas');
            canvas.width = 32; canvas.height = 32;
            const ink = canvas.getContext('2d');
            ink.drawImage(image, 0, 0, 32, 32);
            const pixels = ink.getImageData(0, 0, 32, 32).data;
            for (let i = 0; i < pixels.length; i += 4) levels.add(pixels[i] + 256 * pixels[i + 1] + 65536 * pixels[i + 2]);
        } catch (error) { }  // a broken image cannot be drawn: no levels
        const box = image.getBoundingClientRect();
        return {alt: image.alt, complete: image.complete, natural: [image.naturalWidth, image.naturalHeight],
                shown: [box.width, box.height], levels: levels.size};
    });
    const root = document.documentElement;
    return JSON.stringify({pictures, width: root.clientWidth, scroll: Math.max(root.scrollWidth, document.body.scrollWidth),
                           background: getComputedStyle(document.body).backgroundColor, sections: document.querySelectorAll('section').length});
})()"""


class Browser:
    """One page of a running Chromium.

    Args:
        to_browser: descriptor that it reads.
        from_browser: descriptor that it writes.
        seconds: how long any single answer may take.
    """

    def __init__(self, to_browser: int, from_browser: int, seconds: float) -> None:
        self._out, self._in, self._seconds = to_browser, from_browser, seconds
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _message(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError("the browser did not answer")
            part = os.read(self._in, 1 << 20)
            if not part:
                raise ConnectionError("the browser has ended")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def call(self, method: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
        """One command and its result; events that come meanwhile are kept."""
        self._number += 1
        wanted: dict[str, Any] = {"id": self._number, "method": method, "params": parameters or {}}
        if self._session is not None:
            wanted["sessionId"] = self._session
        data = json.dumps(wanted).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        until = time.monotonic() + self._seconds
        while True:
            message = self._message(until)
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    def open(self, page: Path, width: int, *, dark: bool = False, height: int = 1000) -> dict[str, Any]:
        """Load a file at a width in CSS pixels, open every fold, and tell what is there."""
        self.events.clear()
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.call("Page.navigate", {"url": page.resolve().as_uri()})
        until = time.monotonic() + self._seconds
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message(until))
        wanted = {"expression": _LOOK, "awaitPromise": True, "returnByValue": True}
        found: dict[str, Any] = json.loads(self.call("Runtime.evaluate", wanted)["result"]["value"])
        return found

    def screenshot(self, target: Path) -> None:
        """The whole page as PNG."""
        wanted = {"format": "png", "captureBeyondViewport": True}
        target.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", wanted)["data"]))

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, uncaught exceptions, and anything the browser logged."""
        said = []
        for event in self.events:
            method, parameters = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                said.append(str(parameters["exceptionDetails"].get("text")))
            elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
                said.append(str(parameters["args"]))
            elif method == "Log.entryAdded":
                said.append(str(parameters["entry"]["text"]))
        return said

    def requests(self) -> list[str]:
        """Addresses asked for, without the pictures inside the page."""
        asked = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [address for address in asked if not address.startswith("data:")]


@contextmanager
def chromium(profile: Path, *, seconds: float = 30.0) -> Iterator[Browser]:
    """A browser with a profile of its own; it has ended when the block ends."""
    their_in, to_browser = os.pipe()
    from_browser, their_out = os.pipe()
    command = [str(CHROMIUM), *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
    # The shell puts the two ends where the browser looks for them, whatever their numbers are here.
    script = f'exec "$@" 3<&{their_in} 4>&{their_out}'
    process = subprocess.Popen(
        ["/bin/bash", "-c", script, "bash", *command], pass_fds=(their_in, their_out),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "DBUS_SESSION_BUS_ADDRESS": "disabled:"},
    )  # fmt: skip
    os.close(their_in)
    os.close(their_out)
    try:
        yield Browser(to_browser, from_browser, seconds)
    finally:
        os.close(to_browser)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        os.close(from_browser)
