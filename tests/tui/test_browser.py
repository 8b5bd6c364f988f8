"""The served interface in Chromium: opt in with `VRAMWISE_BROWSER_PYTHON=/path/to/python`, an interpreter
with PyQt6-WebEngine (in an environment of its own: nothing here needs Qt), and `[train]` for the demo.

With VRAMWISE_BROWSER_PICTURES the pictures are kept in that folder.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("textual_serve")

from launcher.web.server import HOST, WebServer, command_line

from .test_web import ESCAPES, FIGURE, serving

PYTHON = os.environ.get("VRAMWISE_BROWSER_PYTHON")
CHILD = Path(__file__).with_name("browser_child.py")
SECONDS = 120
DEMO_SECONDS = 500


class Browser:
    """A page in a browser of another process, and the text that its terminal was sent."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self._child = child
        self.text = ""

    async def do(self, what: str, value: Any = True) -> Any:
        """Have it do one thing."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write((json.dumps({what: value}) + "\n").encode())
        await self._child.stdin.drain()
        async with asyncio.timeout(SECONDS):
            line = await self._child.stdout.readline()
        assert line, "the browser is gone"
        return json.loads(line)

    async def until(self, wanted: str, seconds: float = SECONDS) -> re.Match[str]:
        """Wait until the text since the last find holds what is wanted."""
        async with asyncio.timeout(seconds):
            while (found := re.search(wanted, self.text)) is None:
                await asyncio.sleep(0.2)
                self.text += ESCAPES.sub("", await self.do("heard"))
        self.text = self.text[found.end() :]
        return found


@asynccontextmanager
async def browser(proxy: int) -> AsyncIterator[Browser]:
    """Chromium without a window, which asks a proxy for whatever is not on this machine."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {
        "QT_QPA_PLATFORM": "offscreen",
        "QTWEBENGINE_DISABLE_SANDBOX": "1",
        "QTWEBENGINE_CHROMIUM_FLAGS": f"--proxy-server=http://{HOST}:{proxy}",
    }
    child = await asyncio.create_subprocess_exec(
        str(PYTHON),
        str(CHILD),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=environment,
        limit=2**26,
    )
    try:
        yield Browser(child)
    finally:
        child.kill()
        await child.wait()


@asynccontextmanager
async def proxy() -> AsyncIterator[tuple[int, list[str]]]:
    """The port of a proxy that answers nothing, and the first line of each request to it."""
    asked: list[str] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readline()).decode())
        writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(take, HOST, 0)
    async with server:
        yield server.sockets[0].getsockname()[1], asked


async def picture(page: Browser, folder: Path, name: str) -> None:
    """Take a picture that is no empty page."""
    seen = await page.do("picture", str(folder / f"{name}.png"))
    assert seen["colours"] > 100, (name, seen)


async def elsewhere(page: Browser, served: WebServer, asked: list[str]) -> list[str]:
    """What was asked of other hosts than the served one."""
    own = f"{HOST}:{served.port}"
    urls = await page.do("asked")
    assert any(url.startswith(f"ws://{own}/") for url in urls), "sockets are seen too"
    return [url for url in urls if urlsplit(url).netloc not in (own, "")] + asked


@pytest.mark.slow
@pytest.mark.skipif(
    PYTHON is None,
    reason="no browser: VRAMWISE_BROWSER_PYTHON names no Python that has PyQt6-WebEngine",
)
async def test_a_browser_sizes_a_run_follows_the_demo_and_asks_no_other_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    folder = Path(os.environ.get("VRAMWISE_BROWSER_PICTURES", tmp_path))
    runs = str(tmp_path / "runs")
    words = ["--model", "llama-3.1-8b", "--gpu", "12GB", "--runs", runs]
    async with (
        serving(command_line(words)) as served,
        proxy() as (port, asked),
        browser(port) as page,
    ):
        assert await page.do("open", served.address)
        before = await page.until(FIGURE)
        await page.until(r"longest [\d,]+ tokens")
        await page.until("speed against memory")
        await picture(page, folder, "browser-sizing")
        # Onto the question, so that the page has the focus; then down to the length and four times on.
        await page.do("click", [300, 40])
        await page.do("keys", "→" * 4)
        after = before
        while float(after[1]) < 1.2 * float(before[1]):
            after = await page.until(FIGURE)
        demo = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "launcher.cli",
            "demo",
            "--gpu",
            "12GB",
            "--runs",
            runs,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            while not list(Path(runs).glob("*/events.jsonl")):
                await asyncio.sleep(0.2)
            await page.do("keys", "\x1b")
            # Closer together the two would be one key with Alt.
            await asyncio.sleep(1)
            await page.do("keys", "o")
            await page.until("demo")
            await page.do("keys", "\r")
            await page.until(r"step [1-9]\d* of", DEMO_SECONDS)
            await picture(page, folder, "browser-run")
            await page.until("FINISHED", DEMO_SECONDS)
            await picture(page, folder, "browser-finished")
            assert await demo.wait() == 0
        finally:
            if demo.returncode is None:
                demo.kill()
                await demo.wait()
        assert not await elsewhere(page, served, asked)
        # That both would have seen it: a page of another host is asked of the proxy.
        await page.do("open", "http://elsewhere.example/")
        assert [urlsplit(url).netloc for url in await elsewhere(page, served, [])] == ["elsewhere.example"]
        assert asked
        assert "elsewhere.example" in asked[0]
