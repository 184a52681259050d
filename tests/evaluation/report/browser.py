"""Opens pages in the Chromium of Qt WebEngine and prints, as a line of JSON a page and width, what is wrong with it.

    python tests/evaluation/report/browser.py FOLDER light page.html...

Run by `test_browser.py`. The folder gets a picture of each page as a person would see its beginning.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"QT_QPA_PLATFORM": "offscreen", "QT_LOGGING_RULES": "*=false"}
# Pages are the test's own; Chromium refuses its sandbox to root, and there is no GPU to draw with.
FLAGS = "--no-sandbox --disable-gpu --blink-settings=preferredColorScheme={}"
WIDTHS = (1440, 390)
HEIGHT = 900
SECONDS = 120


def main(folder: Path, pages: list[Path], is_dark: bool) -> None:
    """Opens every page at every width."""
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = FLAGS.format(0 if is_dark else 1)
    from PyQt6 import QtWebEngineWidgets  # Before there is an application.
    from PyQt6.QtWidgets import QApplication

    assert QtWebEngineWidgets
    application = QApplication(sys.argv[:1])  # It lives as long as its windows.
    assert application is not None
    for path in pages:
        for width in WIDTHS:
            picture = folder / f"{path.parent.name}-{width}{'-dark' if is_dark else ''}.png"
            print(json.dumps({"page": path.parent.name, "width": width, **looked_at(path, width, picture)}), flush=True)
    os._exit(0)  # Qt's own end crashes now and then.


def looked_at(path: Path, width: int, picture: Path) -> dict[str, Any]:
    """Opens one page, saves a picture of its beginning, and returns what the browser and axe-core say of it."""
    from PyQt6.QtCore import QTimer, QUrl
    from PyQt6.QtWebEngineCore import QWebEnginePage
    from PyQt6.QtWebEngineWidgets import QWebEngineView

    console: list[str] = []

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level: Any, message: Any, lineNumber: int, sourceID: Any) -> None:
            console.append(f"{message} ({sourceID}:{lineNumber})")

    view = QWebEngineView()
    page = Page(view)
    settings = page.settings()
    assert settings is not None
    settings.setAttribute(settings.WebAttribute.ShowScrollBars, False)
    view.setPage(page)
    view.resize(width, HEIGHT)
    view.show()

    def run(code: str) -> Any:
        return waited(lambda done: page.runJavaScript(code, done))

    def load(done: Callable[[Any], None]) -> None:
        page.loadFinished.connect(done)
        page.load(QUrl.fromLocalFile(str(path.resolve())))

    seen: dict[str, Any] = {"loaded": waited(load), "console": console}
    run(axe())
    run("axe.run().then(found => { window.found = JSON.stringify(found.violations) }); 0")
    while (found := run("window.found || null")) is None:
        waited(lambda done: QTimer.singleShot(100, lambda: done(0)))
    seen["violations"] = [
        [each["impact"], each["id"], each["help"], [node["html"][:200] for node in each["nodes"]]]
        for each in json.loads(found)
    ]
    seen["scroll_width"], seen["inner_width"] = run("[document.documentElement.scrollWidth, innerWidth]")
    seen["dark"] = run("matchMedia('(prefers-color-scheme: dark)').matches")
    view.grab().save(str(picture))
    return seen


def waited(begin: Callable[[Callable[[Any], None]], object]) -> Any:
    """Returns what a call hands to its callback; fails if nothing comes."""
    from PyQt6.QtCore import QEventLoop, QTimer

    loop, found = QEventLoop(), []

    def done(value: Any) -> None:
        found.append(value)
        loop.quit()

    begin(done)
    if not found:
        QTimer.singleShot(1000 * SECONDS, loop.quit)
        loop.exec()
    return found[0]


def axe() -> str:
    """Returns the source of axe-core."""
    spec = importlib.util.find_spec("axe_playwright_python")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "axe.min.js").read_text()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[3:]], sys.argv[2] == "dark")
