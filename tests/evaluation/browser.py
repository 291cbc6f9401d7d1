"""A headless Chromium, driven over the pipe of its DevTools protocol: no library, no port.

https://chromedevtools.github.io/devtools-protocol/; messages are JSON, each ended by a zero byte, on descriptors 3
(commands) and 4 (answers).
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

PROGRAM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # no name resolves and no connection gets out, whatever a page asks for
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--proxy-server=http://127.0.0.1:9",
    "--remote-debugging-pipe",
)
WEBGL = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
NO_WEBGL = ("--disable-gpu", "--disable-3d-apis")


class Browser:
    """One page of one Chromium; a context manager.

    Args:
        profile: an empty folder for it.
        flags: `WEBGL` or `NO_WEBGL`.
        timeout_s: for each answer; a loaded machine renders slowly.
    """

    def __init__(self, profile: Path, flags: tuple[str, ...] = WEBGL, timeout_s: float = 240) -> None:
        assert PROGRAM is not None
        self.timeout_s = timeout_s
        self.events: list[dict[str, Any]] = []
        self._number = 0
        self._buffer = b""
        read_commands, self._commands = os.pipe()
        self._answers, write_answers = os.pipe()
        # a shell puts the pipes where Chromium looks for them; what is numbered above 9 it cannot name itself
        script = 'exec "$0" "$@" 3<&%d 4>&%d' % (read_commands, write_answers)  # noqa: UP031
        self._process = subprocess.Popen(
            ["bash", "-c", script, PROGRAM, *_FLAGS, *flags, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(read_commands, write_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(profile)},
            start_new_session=True,
        )
        os.close(read_commands)
        os.close(write_answers)
        self._session: str | None = None

    def __enter__(self) -> Browser:
        target = next(one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(Exception):
            self._session, self.timeout_s = None, 10
            self.call("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events on the way are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + self.timeout_s
        while True:
            answer = self._message(end)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _message(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, end - time.monotonic()))
            assert ready, "Chromium does not answer"
            data = os.read(self._answers, 1 << 20)
            assert data, "Chromium has ended"
            self._buffer += data
        text, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(text)

    def evaluate(self, expression: str) -> Any:
        """A JavaScript expression's value; promises are awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Until an expression is true."""
        end = time.monotonic() + self.timeout_s
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"{expression} did not come true; {self.messages()}"
            time.sleep(0.1)
        return value

    def open(self, page: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Show a local file."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.as_uri())
        self.wait("document.readyState === 'complete'")

    def screenshot(self, selector: str) -> np.ndarray:
        """uint8 (height, width, 3) of an element, which must fit into the window."""
        box = self.evaluate(
            f"(() => {{ const element = document.querySelector({json.dumps(selector)});"
            " element.scrollIntoView({block: 'center'}); const b = element.getBoundingClientRect();"
            " return [b.x + scrollX, b.y + scrollY, b.width, b.height] })()"
        )
        clip = dict(zip(("x", "y", "width", "height"), box, strict=True), scale=1)
        # not beyond the window: that would resize the page for a moment, and everything draws itself again
        answer = self.call("Page.captureScreenshot", clip=clip)
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["data"]))).convert("RGB"))

    def drag(self, selector: str, start: float, end: float, down: float = 0.5) -> None:
        """Press the mouse on an element at a share of its width and height, move, release; as a hand does."""
        left, top, width, height = self.evaluate(
            f"(() => {{ const element = document.querySelector({json.dumps(selector)});"
            " element.scrollIntoView({block: 'center'}); const b = element.getBoundingClientRect();"
            " return [b.x, b.y, b.width, b.height] })()"
        )
        places = [left + width * (start + (end - start) * n / 4) for n in range(5)]
        kinds = ["mousePressed", *["mouseMoved"] * 4, "mouseReleased"]
        for kind, x in zip(kinds, [*places, places[-1]], strict=True):
            y = top + height * down
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def click(self, selector: str, across: float = 0.5, down: float = 0.5) -> None:
        """Click an element at a share of its width and height."""
        self.drag(selector, across, across, down)

    def messages(self) -> list[str]:
        """What the page wrote to its console, exceptions and refusals of its policy."""
        found = []
        for event in self.events:
            parameters = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                found.append(f"exception {details.get('exception', {}).get('description', details['text'])}")
            elif event.get("method") == "Log.entryAdded":
                found.append(f"{parameters['entry']['level']} {parameters['entry']['text']}")
            elif event.get("method") == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
                found.append(" ".join(str(argument.get("value", "")) for argument in parameters["args"]))
        return found

    def requests(self) -> list[str]:
        """Every address that the page asked for."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]
