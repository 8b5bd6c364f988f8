"""Serve the terminal interface to a browser of this machine, and to nobody else.

Each connection starts a process of its own, which textual-serve joins to the page. Every path begins with a
token that is made anew each time: other users of this machine can reach the port, but not guess it. The page
asks for nothing but what this server has, which its content security policy holds a browser to.
"""

from __future__ import annotations

import hmac
import secrets
import shlex
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp_jinja2
import jinja2
from aiohttp import web
from textual_serve.server import Server

from planner.base.errors import InputError

HOST = "127.0.0.1"
TOKEN_BYTES = 24
_POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "font-src 'self'; img-src 'self' data: blob:; connect-src 'self' ws://{address}; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
"""xterm.js writes styles into the page and decodes pictures with WebAssembly (textual-serve's textual.js)."""
_HEADERS = {
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class WebServer(Server):  # type: ignore[misc]
    """Serves `command`, the words of a Textual application's command line, on a port of this machine."""

    def __init__(self, command: Sequence[str], *, port: int, token: str) -> None:
        super().__init__(
            shlex.join(command),
            host=HOST,
            port=port,
            title="vramwise",
            public_url=f"http://{HOST}:{port}/{token}",
            templates_path=Path(__file__).parent,
        )
        self._token = token

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"{self.public_url}/"

    async def make_app(self) -> web.Application:
        """The application: what textual-serve has, below the token; all else is forbidden."""
        app = web.Application(middlewares=[self._guarded])
        below = web.Application()
        aiohttp_jinja2.setup(below, loader=jinja2.FileSystemLoader(self.templates_path))
        below.add_routes(
            [
                web.get("/", self.show_page),
                web.get("/ws", self.handle_websocket),
                web.static("/static", self.statics_path),
            ]
        )
        app.add_subapp(f"/{self._token}", below)
        return app

    async def show_page(self, request: web.Request) -> web.Response:
        """The page that holds the terminal."""
        size = request.query.get("fontsize", "")
        values: dict[str, Any] = {
            "font_size": int(size) if size.isdecimal() and len(size) < 3 else 16,
            "app_websocket_url": f"ws{self.public_url.removeprefix('http')}/ws",
            "config": {"static": {"url": f"{self.public_url}/static/"}, "page": {"url": self.address}},
            "application": {"name": self.title},
        }
        return aiohttp_jinja2.render_template("page.html", request, values)

    @web.middleware  # type: ignore[untyped-decorator]
    async def _guarded(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        given = request.path.split("/")[1]
        if request.path == "/":
            given = request.query.get("token", "")
        # In constant time: how long a refusal takes tells nothing of the token.
        if not hmac.compare_digest(given.encode(), self._token.encode()):
            raise web.HTTPForbidden(text="the token is missing: open the address that `tui --web` printed\n")
        if request.path == "/":
            raise web.HTTPFound(self.address)
        # A page elsewhere that knows the address is still none of ours.
        origin = request.headers.get("Origin")
        if origin is not None and origin != f"http://{HOST}:{self.port}":
            raise web.HTTPForbidden(text="asked from another page\n")
        response = await handler(request)
        if not response.prepared:
            response.headers.update(_HEADERS)
            response.headers["Content-Security-Policy"] = _POLICY.format(address=f"{HOST}:{self.port}")
        return response


def new_token() -> str:
    """A token that nobody can guess."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def serve(command: Sequence[str], *, port: int, opened: Callable[[str], None]) -> None:
    """Serve until Ctrl-C; `opened` is told the address once the port is taken.

    Raises:
        InputError: the port is not free, or none that this user may take.
    """
    server = WebServer(command, port=port, token=new_token())

    async def application() -> web.Application:
        app = await server.make_app()

        async def told(_: web.Application) -> None:
            opened(server.address)

        app.on_startup.append(told)
        return app

    try:
        web.run_app(application(), host=HOST, port=port, print=None, access_log=None)
    except OSError as error:
        raise InputError(f"port {port} of {HOST} cannot be taken: {error.strerror}") from error


def command_line(arguments: Sequence[str]) -> list[str]:
    """The command that shows the interface in the process that the page is joined to."""
    return [sys.executable, "-m", "launcher.cli", "tui", *arguments]
