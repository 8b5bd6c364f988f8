"""A page in Chromium without a window: `python browser_child.py`, told on stdin what to do, in JSON, by line.

Runs on an interpreter of its own that has PyQt6-WebEngine, and imports nothing of vramwise. Answers each line
with one:

- {"open": URL}: whether it could be loaded.
- {"keys": TEXT}: typed into what has the focus.
- {"click": [X, Y]}: clicked there, in pixels.
- {"heard": true}: what came over the page's WebSockets since the last time, as text.
- {"picture": PATH}: how wide and high the picture is that was written, and how many colours are in it.
- {"asked": true}: every URL that the browser has asked for, of whatever kind, with its host and port.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from typing import Any

from PyQt6.QtCore import QEvent, QEventLoop, QObject, QPointF, Qt, QUrl, pyqtSignal
from PyQt6.QtGui import QKeyEvent, QMouseEvent
from PyQt6.QtWebEngineCore import (
    QWebEngineProfile,
    QWebEngineScript,
    QWebEngineUrlRequestInfo,
    QWebEngineUrlRequestInterceptor,
)
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

WIDTH, HEIGHT = 1280, 800
HEAR = """
window.heard = [];
const decoder = new TextDecoder();
window.WebSocket = class extends window.WebSocket {
  constructor(...words) {
    super(...words);
    this.addEventListener("message", (event) => {
      const told = event.data;
      window.heard.push(typeof told === "string" ? told : decoder.decode(told));
    });
  }
};
"""
"""Run before the page's own scripts: keeps what its sockets hear."""
ARROWS = {"→": Qt.Key.Key_Right, "←": Qt.Key.Key_Left}
CODES = {"\x1b": Qt.Key.Key_Escape, "\r": Qt.Key.Key_Return, **ARROWS}


class Asked(QWebEngineUrlRequestInterceptor):
    """Notes every request before it is made, those of sockets too."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def interceptRequest(self, info: QWebEngineUrlRequestInfo) -> None:
        self.urls.append(info.requestUrl().toString())


class Told(QObject):
    """Brings lines of stdin to the browser's thread."""

    line = pyqtSignal(str)

    def read(self) -> None:
        for line in sys.stdin:
            self.line.emit(line)
        self.line.emit("")


def awaited(begin: Callable[[Callable[[Any], None]], None]) -> Any:
    """What a call tells its callback."""
    loop, found = QEventLoop(), []

    def done(value: Any = None) -> None:
        found.append(value)
        loop.quit()

    begin(done)
    if not found:
        loop.exec()
    return found[0]


def main() -> None:
    app = QApplication(sys.argv)
    profile, asked = QWebEngineProfile(), Asked()
    profile.setUrlRequestInterceptor(asked)
    script = QWebEngineScript()
    script.setSourceCode(HEAR)
    script.setInjectionPoint(QWebEngineScript.InjectionPoint.DocumentCreation)
    script.setWorldId(QWebEngineScript.ScriptWorldId.MainWorld)
    profile.scripts().insert(script)
    view = QWebEngineView(profile)
    view.resize(WIDTH, HEIGHT)
    view.show()

    def loaded(url: str) -> bool:
        def begin(done: Callable[[Any], None]) -> None:
            view.loadFinished.connect(done, type=Qt.ConnectionType.SingleShotConnection)
            view.load(QUrl(url))

        return bool(awaited(begin))

    def typed(keys: str) -> None:
        place = view.focusProxy() or view
        for key in keys:
            code = CODES.get(key) or ord(key.upper())
            text = "" if key in ARROWS else key
            for kind in (QEvent.Type.KeyPress, QEvent.Type.KeyRelease):
                app.sendEvent(place, QKeyEvent(kind, code, Qt.KeyboardModifier.NoModifier, text))

    def clicked(x: float, y: float) -> None:
        place, at = view.focusProxy() or view, QPointF(x, y)
        left, none = Qt.MouseButton.LeftButton, Qt.MouseButton.NoButton
        for kind, held in ((QEvent.Type.MouseButtonPress, left), (QEvent.Type.MouseButtonRelease, none)):
            there = QPointF(view.mapToGlobal(at.toPoint()))
            app.sendEvent(place, QMouseEvent(kind, at, there, left, held, Qt.KeyboardModifier.NoModifier))

    def picture(path: str) -> dict[str, int]:
        image = view.grab().toImage()
        image.save(path)
        seen = {image.pixel(x, y) for x in range(0, image.width(), 3) for y in range(0, image.height(), 3)}
        return {"width": image.width(), "height": image.height(), "colours": len(seen)}

    def heard() -> str:
        taken = "(window.heard || []).splice(0).join('')"
        return str(awaited(lambda done: view.page().runJavaScript(taken, done)))

    def answer(line: str) -> None:
        if not line.strip():
            app.quit()
            return
        ((what, value),) = json.loads(line).items()
        found: Any = None
        if what == "open":
            found = loaded(value)
        elif what == "keys":
            typed(value)
        elif what == "click":
            clicked(*value)
        elif what == "picture":
            found = picture(value)
        elif what == "heard":
            found = heard()
        elif what == "asked":
            found = asked.urls
        print(json.dumps(found), flush=True)

    told = Told()
    told.line.connect(answer)
    threading.Thread(target=told.read, daemon=True).start()
    app.exec()


if __name__ == "__main__":
    main()
