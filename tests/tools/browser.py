"""Drives a headless Chromium over its debugging pipe, without a network: JSON messages, each ended by a zero byte."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page. `requests` holds the addresses it asked for, `messages` its errors and console output."""

    def __init__(self, write: int, read: int):
        self.write, self.read, self.number, self.session, self.unread = write, read, 0, None, b""
        self.requests: list[str] = []
        self.messages: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)

    def receive(self) -> dict[str, Any]:
        parts = [self.unread]
        while b"\0" not in parts[-1]:
            parts.append(os.read(self.read, 2**20))
            assert parts[-1], "the browser is gone"
        message, _, self.unread = b"".join(parts).partition(b"\0")
        event = json.loads(message)
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(event["params"]["request"]["url"])
        if event.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.messages.append(json.dumps(event["params"]))
        return event

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            event = self.receive()
            if event.get("id") == self.number:
                assert "error" not in event, event
                return event["result"]

    def open(self, path: Path, width: int, height: int, dark: bool = False) -> None:
        """Loads a file at a size; a narrow one is a phone's."""
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1 + phone, mobile=phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.requests.clear()
        self.call("Page.navigate", url=path.absolute().as_uri())
        while self.receive().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, *keys: str) -> None:
        codes = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9, "Home": 36, "End": 35}
        for key in keys:
            for kind in ("rawKeyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def screenshot(self, path: Path) -> None:
        """The whole page, as PNG."""
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(picture))


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    ours_read, theirs_write = os.pipe()
    theirs_read, ours_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:  # the browser may still write there
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        command += [f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe"]
        shell = f"exec {' '.join(map(repr, command))} 3<&{theirs_read} 4>&{theirs_write}"
        process = subprocess.Popen(
            ["bash", "-c", shell], pass_fds=(theirs_read, theirs_write), stderr=subprocess.DEVNULL
        )
        os.close(theirs_read)
        os.close(theirs_write)
        try:
            page = Browser(ours_write, ours_read)
            yield page
            page.session = None
            page.call("Browser.close")
        finally:
            process.kill()
            process.wait()
            os.close(ours_write)
            os.close(ours_read)
