# SPDX-License-Identifier: Apache-2.0
"""Images of the page of `moma demo` for the documentation, from the page itself in Debian's Chromium.

python scripts/page_images.py --output docs/images

It needs the extras `demo` and `dev`, and Chromium (`apt-get install chromium`).
"""

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from modeling_moma.utils.atomic_files import atomic_write


ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# works for root and without a network
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
START_SECONDS = 120
# milliseconds that an answer may take on a busy machine
PATIENCE = 60_000
VIEW = {"width": 1100, "height": 760}
# of the example that is taken, `cloud-drizzle`
EXAMPLE = 3


def find_browser() -> str | None:
    """Path of an installed Chromium, or `None`."""
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


@contextmanager
def served_page(*arguments: str, cwd: Path = ROOT, log: Path) -> Iterator[str]:
    """
    The address of a page that the command `moma demo` serves, until the context ends.

    Args:
        arguments: of the command; the port is any free one.
        cwd: its working folder.
        log: file for what it prints.

    Raises:
        RuntimeError: it ends, or says no address in time.
    """
    command = [sys.executable, "-m", "modeling_moma", "demo", *arguments, "--port", "0"]
    with log.open("w") as errors:
        server = subprocess.Popen(
            command, cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=errors, text=True
        )
    timer = threading.Timer(START_SECONDS, server.kill)
    timer.start()
    try:
        said = ""
        for line in server.stdout or ():
            said += line
            if found := re.search(r"http://\S+", line):
                break
        else:
            raise RuntimeError(f"`moma demo` ended or took too long: {said}{log.read_text()}")
        timer.cancel()
        yield found[0]
    finally:
        timer.cancel()
        server.terminate()
        server.wait(timeout=30)


def environment() -> dict[str, str]:
    """Variables of a server that asks nobody: no Hub, and no proxy between the browser and this machine."""
    own = {"HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    return {**os.environ, **own, "PYTHONPATH": str(ROOT)}


@contextmanager
def browser() -> Iterator:
    """A headless Chromium of Playwright's, which has downloaded none."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_browser(), args=FLAGS, env=dict(environment()))
        try:
            yield chromium
        finally:
            chromium.close()


def photograph(address: str, output: Path) -> list[Path]:
    """Uses each tab as a visitor would, and writes an image of it."""
    with browser() as chromium:
        page = chromium.new_page(viewport=VIEW)
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        written = []
        for name in ("caption", "names", "draw", "interleaved", "routing"):
            use(page, name)
            written.append(shoot(page, output / f"page-{name}.png"))
    return written


def use(page, name: str) -> None:
    """Opens a tab and lets the model answer in it."""
    page.get_by_role("tab", name=name.capitalize()).click()
    if name == "caption":
        page.get_by_role("tabpanel").locator(".gallery-item").nth(EXAMPLE).click()
        page.wait_for_function("document.querySelector('#caption-words textarea').value != ''")
        page.locator("#caption-seen img").wait_for()
    elif name == "names":
        page.get_by_role("tabpanel").locator(".gallery-item").nth(EXAMPLE).click()
        page.wait_for_function("document.querySelector('#label-tags textarea').value != ''")
        page.locator("#find-words textarea").fill("arrow")
        page.locator("#find-button").click()
        page.locator("#find-gallery img").first.wait_for()
    elif name == "draw":
        page.locator("#draw-words textarea").fill("heart (typical)")
        page.locator("#draw-count input[type=number]").fill("4")
        page.locator("#draw-button").click()
        page.wait_for_function(
            "document.querySelector('#draw-progress textarea, #draw-progress input').value.includes(' s')"
        )
    elif name == "interleaved":
        page.locator("#interleaved-prompt textarea").fill("red")
        page.locator("#interleaved-button").click()
        page.locator("#interleaved-answer .moma-whole").wait_for()
    else:
        page.get_by_role("tabpanel").locator(".gallery-item").nth(EXAMPLE).click()
        page.locator("#routing-patches img").wait_for()
        page.locator("#routing-layer input[type=number]").fill("3")
        page.keyboard.press("Enter")
        page.wait_for_timeout(2000)


def shoot(page, path: Path) -> Path:
    """Writes what the page shows."""
    page.mouse.move(0, 0)
    # images of a gallery come after what is said of them
    page.wait_for_function(
        "[...document.images].filter(image => image.offsetParent).every(image => image.complete && image.naturalWidth)"
    )
    page.wait_for_timeout(500)
    content = page.screenshot(full_page=True)

    def write(aside: Path):
        with Image.open(io.BytesIO(content)) as shot:
            # smaller than the browser's own
            shot.convert("RGB").save(aside, format="PNG", optimize=True)

    return atomic_write(path, write)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images", help="folder for the images")
    args = parser.parse_args(arguments)
    if find_browser() is None:
        print("error: no Chromium is installed: apt-get install chromium", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    with served_page(log=args.output / "server.log") as address:
        for path in photograph(address, args.output):
            print(path)
    (args.output / "server.log").unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
