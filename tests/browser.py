"""The browser that pages are looked at with: Chromium or Chrome, or playwright's own.

``python -m tests.browser`` makes sure that there is one; ``make test`` calls it.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Playwright, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_HINT = (
    "the tests look at pages in a browser, and there is none\n"
    "hint: install one, such as: apt install chromium\n"
    f"      or: {sys.executable} -m playwright install --with-deps chromium"
)


def _installed(playwright: Playwright) -> str | None:
    """Path of a browser; None if there is none."""
    own = playwright.chromium.executable_path
    return next(filter(None, map(shutil.which, _NAMES)), own if Path(own).exists() else None)


@contextmanager
def browser() -> Iterator[Browser]:
    """A headless browser."""
    with sync_playwright() as playwright:
        path = _installed(playwright)
        assert path, _HINT
        started = playwright.chromium.launch(executable_path=path)
        try:
            yield started
        finally:
            started.close()


def main() -> None:
    """Install playwright's own browser unless there is one; the tests tell if that failed."""
    with sync_playwright() as playwright:
        if _installed(playwright):
            return
    print("installing a browser for the tests")
    done = subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=False)
    if done.returncode:
        print(f"warning: {_HINT}", file=sys.stderr)


if __name__ == "__main__":
    main()
