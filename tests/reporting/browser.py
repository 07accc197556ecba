"""A headless Chromium that is told what to do through two pipes, in its own protocol.

https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
ANSWER_TIMEOUT_S = 60.0
# What the protocol has Chromium read from and write to.
_READS, _WRITES = 3, 4


def find_chromium() -> str | None:
    """Returns the path of a Chromium; None where there is none on PATH."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Tab:
    """A page that is open.

    Attributes:
        complaints: what stood in the console as an error or a warning, and what was not loaded.
        requests: URLs that were asked for, but for data: URLs.
    """

    commands: int
    answers: int
    session: str = ""
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    _number: int = 0
    _read: bytes = b""
    _seen: set[str] = field(default_factory=set)

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Returns the answer to a command."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(method)
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, path: Path, width: int, height: int = 844) -> None:
        """Loads a file as a device of that many CSS pixels shows it."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self._seen.discard("Page.loadEventFired")
        self.ask("Page.navigate", url=path.as_uri())
        while "Page.loadEventFired" not in self._seen:
            self._next("load")

    def evaluate(self, expression: str) -> Any:
        """Returns what a JavaScript expression gives, as JSON holds it."""
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Keeps the whole page as a PNG."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "scale": 1, "width": size["width"], "height": size["height"]}
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _next(self, awaited: str) -> dict[str, Any]:
        """Returns the next message, and notes it if it is an event."""
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while b"\0" not in self._read:
            ready, _, _ = select.select([self.answers], [], [], deadline - time.monotonic())
            assert ready, f"Chromium did not answer to {awaited} within {ANSWER_TIMEOUT_S} s"
            read = os.read(self.answers, 2**20)
            assert read, f"Chromium ended before it answered to {awaited}"
            self._read += read
        text, _, self._read = self._read.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, params: Any) -> None:
        self._seen.add(event)
        if event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.complaints.append(json.dumps(params["args"]))
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif event == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith("data:"):
                self.requests.append(url)


def _high(pipe: tuple[int, int]) -> list[int]:
    """Returns the two ends under numbers that are not among those of the protocol."""
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in pipe]
    for end in pipe:
        os.close(end)
    return high


@contextmanager
def tab(chromium: str, profile: Path) -> Iterator[Tab]:
    """Yields an empty tab of a Chromium of its own, which reaches no network.

    Args:
        chromium: of ``find_chromium``.
        profile: an empty folder.
    """
    their_commands, our_commands = _high(os.pipe())
    our_answers, their_answers = _high(os.pipe())
    words = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    words += ["--hide-scrollbars", "--proxy-server=127.0.0.1:9", f"--user-data-dir={profile}"]
    # A shell moves the pipes to the numbers that the protocol has; here these may be taken.
    move = f'exec {_READS}<&"$0" {_WRITES}>&"$1"; shift; exec "$@"'
    process = subprocess.Popen(
        ["bash", "-c", move, str(their_commands), str(their_answers), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(their_commands, their_answers),
        start_new_session=True,
    )
    os.close(their_commands)
    os.close(their_answers)
    try:
        opened = Tab(our_commands, our_answers)
        target = opened.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = opened.ask("Target.attachToTarget", targetId=target, flatten=True)
        opened.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            opened.ask(f"{domain}.enable")
        yield opened
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait(timeout=ANSWER_TIMEOUT_S)
        os.close(our_commands)
        os.close(our_answers)
