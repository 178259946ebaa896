"""A headless Chromium driven over a pipe, for tests of pages.

The protocol is JSON with a zero byte after each message, read from descriptor 3 and written to descriptor 4.
"""

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
_INSPECT = """(async () => {
    document.querySelectorAll('details').forEach((each) => { each.open = true; });
    const images = [...document.images];
    await Promise.allSettled(images.map((image) => image.decode()));
    const pictures = images.map((image) => {
        const levels = new Set();
        try {
            const canvas = document.createElement('canvas');
            canvas.width = 32; canvas.height = 32;
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0, 32, 32);
            const pixels = context.getImageData(0, 0, 32, 32).data;
            for (let i = 0; i < pixels.length; i += 4) levels.add(pixels[i] + 256 * pixels[i + 1] + 65536 * pixels[i + 2]);
        } catch (error) { }  // a broken image cannot be drawn and has no levels
        return {natural: [image.naturalWidth, image.naturalHeight], levels: levels.size};
    });
    const figures = [...document.querySelectorAll('svg')].map((svg) => {
        const box = svg.getBoundingClientRect();
        const title = [...svg.querySelectorAll('text')].find((text) => /--ink/.test(text.getAttribute('style')));
        return {label: svg.getAttribute('aria-label'), shown: [box.width, box.height], ink: title && getComputedStyle(title).fill};
    });
    const root = document.documentElement;
    return JSON.stringify({pictures, figures, width: root.clientWidth,
                           scroll: Math.max(root.scrollWidth, document.body.scrollWidth),
                           background: getComputedStyle(document.body).backgroundColor,
                           sections: document.querySelectorAll('section').length});
})()"""


class Browser:
    """One page of a running Chromium.

    Args:
        to_browser: Descriptor that the browser reads.
        from_browser: Descriptor that the browser writes.
        seconds: Time limit of a single answer.
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
        parsed: dict[str, Any] = json.loads(message)
        return parsed

    def call(self, method: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send one command and return its result; events that arrive meanwhile are stored."""
        self._number += 1
        command: dict[str, Any] = {"id": self._number, "method": method, "params": parameters or {}}
        if self._session is not None:
            command["sessionId"] = self._session
        data = json.dumps(command).encode() + b"\0"
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
        """Load a file at a width in CSS pixels, open all details, and describe the page."""
        self.events.clear()
        self._resize(width, dark, height)
        self.go(page.resolve().as_uri())
        return self._describe()

    def show(self, width: int, *, dark: bool = False, height: int = 1000) -> dict[str, Any]:
        """Describe the open page at another width or in the other theme, without loading it again."""
        self._resize(width, dark, height)
        return self._describe()

    def go(self, address: str) -> None:
        """Load an address and wait until it is complete."""
        self.events.clear()
        self.call("Page.navigate", {"url": address})
        until = time.monotonic() + self._seconds
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message(until))

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression; a Promise is awaited."""
        parameters = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        return self.call("Runtime.evaluate", parameters)["result"]["value"]

    def _resize(self, width: int, dark: bool, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", {"features": [scheme]})

    def _describe(self) -> dict[str, Any]:
        described: dict[str, Any] = json.loads(self.evaluate(_INSPECT))
        return described

    def screenshot(self, target: Path) -> None:
        """Write the whole page as PNG."""
        parameters = {"format": "png", "captureBeyondViewport": True}
        target.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", parameters)["data"]))

    def errors(self) -> list[str]:
        """Errors and warnings of the console, uncaught exceptions and log entries of the browser."""
        messages = []
        for event in self.events:
            method, parameters = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                messages.append(str(parameters["exceptionDetails"].get("text")))
            elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
                messages.append(str(parameters["args"]))
            elif method == "Log.entryAdded":
                messages.append(str(parameters["entry"]["text"]))
        return messages

    def requests(self) -> list[str]:
        """Requested addresses, without the pictures inside the page."""
        addresses = [
            e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"
        ]
        return [address for address in addresses if not address.startswith("data:")]


@contextmanager
def chromium(profile: Path, *, seconds: float = 30.0) -> Iterator[Browser]:
    """A browser with its own profile, stopped at the end of the block."""
    their_in, to_browser = os.pipe()
    from_browser, their_out = os.pipe()
    command = [str(CHROMIUM), *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
    # The browser uses descriptors 3 and 4, so the shell moves the two ends there.
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
