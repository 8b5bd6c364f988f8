"""The interface in a browser, as far as a client without one sees it: what is served, to whom, and what the
terminal that a page holds shows and answers. No browser is part of the tests' stack: that the pages name no
other host, and the policy that browsers hold them to, stand for what one would ask. Where there is one,
tests/tui/test_browser.py asks it.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from launcher.cli import main
from tests.tui import synthetic

pytest.importorskip("textual_serve")

import aiohttp
from aiohttp import web

from launcher.web.server import HOST, WebServer, command_line, new_token

ELSEWHERE = re.compile(
    r"""(?:src|href|action)\s*=\s*["']?(?:https?:)?//|@import|url\(\s*["']?(?:https?:)?//"""
)
ESCAPES = re.compile(r"\x1b(?:\[[0-9;?<>=]*[ -/]*[@-~]|\][^\x07]*\x07|[@-Z\\-_])")
FIGURE = r"needs\s+([\d.]+) GiB"
SECONDS = 60


@asynccontextmanager
async def serving(command: Sequence[str]) -> AsyncIterator[WebServer]:
    """Serves a command on a port that is free."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    found = WebServer(command, port=port, token=new_token())
    runner = web.AppRunner(await found.make_app())
    await runner.setup()
    await web.TCPSite(runner, HOST, port).start()
    yield found
    await runner.cleanup()


@pytest.fixture
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[WebServer]:
    """Serves the interface following a run that stands at step 240."""
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    folder = synthetic.half_way(tmp_path / "run")
    words = ["--model", "qwen2.5-0.5b", "--gpu", "16GB", "--run", str(folder.path)]
    async with serving(command_line(words)) as found:
        yield found


class Terminal:
    """The text that came over a page's socket."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.text = ""

    async def until(self, wanted: str) -> re.Match[str]:
        """Read on until the text since the last find holds what is wanted."""
        async with asyncio.timeout(SECONDS):
            while (found := re.search(wanted, self.text)) is None:
                message = await self.socket.receive()
                assert message.type is aiohttp.WSMsgType.BINARY, message
                self.text += ESCAPES.sub("", message.data.decode("utf-8", "replace"))
        self.text = self.text[found.end() :]
        return found

    async def type(self, keys: str) -> None:
        """Press keys."""
        await self.socket.send_json(["stdin", keys])


async def test_who_has_the_address_follows_a_run_and_sizes_one_and_nobody_else(server: WebServer) -> None:
    root, address = f"http://{HOST}:{server.port}", server.address
    async with aiohttp.ClientSession() as session:
        for path in ("/", "/?token=x", "/static/js/textual.js", "/ws", f"{server.address[len(root) : -3]}/"):
            async with session.get(root + path) as answer:
                assert answer.status == 403, path
        async with session.get(address, headers={"Origin": "http://evil.example"}) as answer:
            assert answer.status == 403
        token = address.split("/")[-2]
        async with session.get(f"{root}/?token={token}") as answer:
            assert str(answer.url) == address
            page, policy = await answer.text(), answer.headers["Content-Security-Policy"]
        assert not re.findall(r"https?:(?!//127\.0\.0\.1)", policy)
        assert policy.startswith("default-src 'none'")
        pages, seen = [page], set()
        for url in re.findall(rf"{address}static/[\w./-]+", page):
            async with session.get(url) as answer:
                assert answer.status == 200, url
                seen.add(url.rsplit(".", 1)[-1])
                if not url.endswith("ttf"):
                    pages.append(await answer.text())
        assert seen == {"css", "js", "ttf"}
        # textual-serve's own page loads a font from elsewhere, so the pattern sees what it is to see.
        assert ELSEWHERE.search((server.statics_path.parent / "templates" / "app_index.html").read_text())
        for text in pages:
            assert not ELSEWHERE.search(text.replace(root, ""))
        socket = re.search(r'data-session-websocket-url="([^"]+)"', page)
        assert socket is not None
        async with session.ws_connect(f"{socket[1]}?width=120&height=40", max_msg_size=0) as joined:
            terminal = Terminal(joined)
            await terminal.until(r"step 240 of 400")
            await terminal.type("\x1b")
            before = await terminal.until(FIGURE)
            await terminal.until("speed against memory")
            # Of several times the length more than refining the first answer could change.
            await terminal.type("\x1b[C" * 4)
            after = before
            while float(after[1]) < 1.5 * float(before[1]):
                after = await terminal.until(FIGURE)
            await terminal.type("\x11")
            async with asyncio.timeout(SECONDS):
                while not (await joined.receive()).type.name.startswith("CLOS"):
                    pass


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--port", "8000"], "--port is of --web"),
        (["--web", "--port", "70000"], "port: 70000 is not accepted"),
        (["--web", "--run", "/nowhere"], "/nowhere: not a run folder"),
    ],
)
def test_what_cannot_be_served_is_said_in_a_line(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["tui", *words])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
