"""The browser of these tests: a Chromium that is installed here, without a window and without the network.

Environment variables:
    BLIP3O_CHROMIUM         the program to run (default: the first of NAMES on PATH)
    BLIP3O_REQUIRE_BROWSER  1: the tests fail where there is no Chromium; otherwise they are skipped
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

from ..server.comfy_server import ADDRESS

NAMES = ("chromium", "chromium-browser", "google-chrome")
ADVICE = (f"no Chromium: none of {', '.join(NAMES)} is on PATH and BLIP3O_CHROMIUM names none. On Debian and Ubuntu: "
          "apt-get install chromium")  # fmt: skip
ARGUMENTS = [
    "--no-sandbox",  # root, as in containers, can't have one
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    f"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {ADDRESS}",  # whatever is asked for, only this machine is found
]  # fmt: skip


def find() -> str | None:
    """The Chromium to run; None where there is none. Raises FileNotFoundError if BLIP3O_CHROMIUM names nothing that runs."""
    named = os.environ.get("BLIP3O_CHROMIUM")
    if named and not shutil.which(named):
        raise FileNotFoundError(f"BLIP3O_CHROMIUM={named} is not a program. Unset it to look for one on PATH.")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


def is_required() -> bool:
    return os.environ.get("BLIP3O_REQUIRE_BROWSER") == "1"


@contextmanager
def launch(program: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield browser
        browser.close()
