# SPDX-License-Identifier: Apache-2.0
"""The page of `moma demo` in a real Chromium, headless: what a visitor does, and what comes of it."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from helpers.released import skip_without_released_model
from page_images import PATIENCE, ROOT, browser, find_browser, served_page


EXAMPLES = ROOT / "model_cards" / "moma-icons-space" / "examples"
# writes down each image of the gallery, with what is said of its progress
WATCH = """() => {
    window.seen = [];
    const look = () => {
        const image = document.querySelector('#draw-gallery .grid-container img, #draw-gallery img');
        const said = document.querySelector('#draw-progress textarea, #draw-progress input').value;
        if (image && !window.seen.some(([source]) => source === image.src)) window.seen.push([image.src, said]);
    };
    new MutationObserver(look).observe(document.querySelector('#draw-gallery'), {
        subtree: true, childList: true, attributes: true, attributeFilter: ['src'],
    });
}"""
PROGRESS = "document.querySelector('#draw-progress textarea, #draw-progress input').value"
WORDS = "document.querySelector('#caption-words textarea').value"
PAPER = (226, 230, 232)
UPLOAD, EXAMPLE = EXAMPLES / "usb-off.png", EXAMPLES / "fire-off.png"
PLACE = sorted(EXAMPLES.glob("*.png")).index(EXAMPLE)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    pytest.importorskip("gradio", reason="`pip install 'modeling-moma[demo]'` is missing")
    pytest.importorskip("playwright", reason="`pip install playwright` is missing")
    if find_browser() is None:
        pytest.skip("no Chromium is installed: `make browser`, or `apt-get install chromium`")
    skip_without_released_model()
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        with served_page(log=folder / "log.txt") as address:
            yield address


@pytest.fixture(scope="module")
def says(address):
    """What the model says of an image, without a page."""
    from modeling_moma.demo.studio import load_studio

    studio = load_studio(ROOT / "model_cards" / "moma-icons")

    def caption_of(path):
        with Image.open(path) as image:
            return studio.caption(image.convert("RGB"))

    return caption_of


@pytest.fixture(scope="module")
def chromium(address):
    with browser() as chromium:
        yield chromium


@pytest.fixture
def visit(address, chromium):
    """Opens the page as a new visitor; gives the page and the addresses that it asked for."""
    contexts = []

    def open_page(**options):
        context = chromium.new_context(**options)
        contexts.append(context)
        return opened(context, address)

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def page(address, chromium):
    """A page for what one visitor does in one tab after the other."""
    with chromium.new_context() as context:
        yield opened(context, address)


def opened(context, address):
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(address)
    # a page is built part by part after it was loaded, and a script finds no part too early
    page.wait_for_selector("#caption-words textarea", state="attached", timeout=PATIENCE)
    return page


def open_tab(page, name: str):
    page.get_by_role("tab", name=name).click()


def start_drawing(page, words: str, seed: int = 0, count: int = 1, guidance: float = 1.0):
    open_tab(page, "Draw")
    page.locator("#draw-words textarea").fill(words)
    page.locator("#draw-seed input").fill(str(seed))
    page.locator("#draw-count input[type=number]").fill(str(count))
    page.locator("#draw-guidance input[type=number]").fill(str(guidance))
    # the tab is drawn after it was chosen
    for part in ("#draw-gallery", "#draw-progress textarea, #draw-progress input"):
        page.wait_for_selector(part, state="attached", timeout=PATIENCE)
    page.evaluate(WATCH)
    page.locator("#draw-button").click()


def wait_for_drawing(page) -> list[np.ndarray]:
    """The images that were shown while one was drawn, the last one whole."""
    # an earlier drawing may have ended with the same words
    page.wait_for_function(f"window.seen.length > 2 && {PROGRESS}.endsWith(' s')")
    page.wait_for_timeout(300)
    sources = [source for source, _ in page.evaluate("window.seen")]
    return [pixels_of(page, source) for source in sources]


def pixels_of(page, source: str) -> np.ndarray:
    answer = page.request.get(source)
    assert answer.ok, source
    return np.asarray(Image.open(io.BytesIO(answer.body())).convert("RGB"))


def share_of_paper(pixels: np.ndarray) -> float:
    return float((pixels == PAPER).all(-1).mean())


def test_an_image_is_drawn_while_the_visitor_looks_and_nobody_else_is_asked(address, visit):
    page = visit()
    start_drawing(page, "heart (ph, fill, red)", guidance=5.0)
    views = wait_for_drawing(page)
    shares = [share_of_paper(pixels) for pixels in views]
    assert shares[-1] == 0 and len(views) >= 4
    assert 0 < shares[1] < shares[0], "partial images come first, and grow"
    # red, on white
    whole = views[-1].reshape(-1, 3).astype(int)
    assert (whole[:, 0] - whole[:, 1] > 80).mean() > 0.2
    assert all(url.startswith((address, "data:", "blob:")) for url in page.asked), page.asked


def test_an_example_and_an_upload_are_captioned(page, says):
    open_tab(page, "Caption")
    page.get_by_role("tabpanel").locator(".gallery-item").nth(PLACE).click()
    page.wait_for_function(f"{WORDS} !== ''")
    assert page.evaluate(WORDS) == says(EXAMPLE) != says(UPLOAD)
    page.locator("#caption-seen img").wait_for()
    page.locator("#caption-image").get_by_label("Remove Image").click()
    page.locator("#caption-image input[type=file]").set_input_files(UPLOAD)
    page.locator("#caption-image img").wait_for()
    page.locator("#caption-button").click()
    page.wait_for_function(f"words => {WORDS} === words", arg=says(UPLOAD))


def test_an_image_is_named_and_found_by_words(page):
    open_tab(page, "Names")
    page.locator("#label-image input[type=file]").set_input_files(UPLOAD)
    page.locator("#label-image img").wait_for()
    page.locator("#label-button").click()
    page.locator("#label-names").get_by_text("usb off").first.wait_for()
    page.wait_for_function("document.querySelector('#label-tags textarea').value !== ''")
    page.locator("#find-words textarea").fill("usb")
    page.locator("#find-button").click()
    page.locator("#find-gallery img").first.wait_for()
    first = page.locator("#find-gallery .thumbnail-item, #find-gallery .gallery-item").first
    assert UPLOAD.name in first.inner_text()


def test_layers_of_the_routing_are_different_images(page, says):
    open_tab(page, "Routing")
    page.get_by_role("tabpanel").locator(".gallery-item").nth(PLACE).click()
    image = page.locator("#routing-patches img")
    image.wait_for()
    page.locator("#routing-legend", has_text="Layer 1 of 5").wait_for()
    assert page.locator("#routing-chips .moma-word").all_inner_texts()[-1] == says(EXAMPLE)[-1]
    first, style = pixels_of(page, image.get_attribute("src")), page.locator("#routing-chips").inner_html()
    page.locator("#routing-layer input[type=number]").fill("4")
    page.keyboard.press("Enter")
    page.locator("#routing-legend", has_text="Layer 4 of 5").wait_for()
    page.wait_for_timeout(300)
    fourth = pixels_of(page, image.get_attribute("src"))
    assert first.shape == fourth.shape and (first != fourth).any(-1).mean() > 0.1
    assert page.locator("#routing-chips").inner_html() != style


def test_words_are_answered_with_words_and_an_image_in_turn(page):
    open_tab(page, "Interleaved")
    page.locator("#interleaved-prompt textarea").fill("house (tabler, outline")
    page.locator("#interleaved-button").click()
    page.locator("#interleaved-answer .moma-whole img").wait_for()
    # words, then an image of them
    kinds = page.locator("#interleaved-answer .moma-answer > *").evaluate_all(
        "parts => parts.map(part => part.tagName)"
    )
    assert kinds == ["P", "IMG"]
    # an image with words after its place
    page.locator("#interleaved-prompt input[type=file]").set_input_files(UPLOAD)
    page.locator("#interleaved-prompt img").first.wait_for()
    page.locator("#interleaved-prompt textarea").fill("usb")
    page.locator("#interleaved-temperature input[type=number]").fill("0")
    page.locator("#interleaved-button").click()
    page.locator("#interleaved-answer .moma-whole p", has_text="(").wait_for()


# those that are shown before they are read come last
BAD_UPLOADS = [
    ("large.png", b"\x89PNG\r\n\x1a\n" + bytes(11 * 2**20), "maximum allowed size"),
    ("notes.txt", b"these are words", "Invalid file type"),
    ("broken.png", b"these are no pixels", "not an image that can be read"),
    ("cut.png", (UPLOAD).read_bytes()[:1500], "truncated or damaged"),
]


def test_bad_uploads_are_refused_on_the_page(visit, tmp_path):
    page = visit()
    for name, data, told in BAD_UPLOADS:
        (tmp_path / name).write_bytes(data)
        page.locator("#caption-image input[type=file]").set_input_files(tmp_path / name)
        if name in ("broken.png", "cut.png"):
            page.wait_for_function("document.querySelector('#caption-image img') !== null")
            page.locator("#caption-button").click()
        toast = page.locator(".toast-body", has_text=told).first
        toast.wait_for()
        said = toast.inner_text()
        assert "/" not in re.sub("image/", "", said), said
        assert page.evaluate(WORDS) == ""
        if name == "broken.png":
            page.locator("#caption-image").get_by_label("Remove Image").click()


def test_a_request_made_by_hand_reads_no_file_of_the_server(address, visit):
    page, calls = visit(), f"{address.rstrip('/')}/gradio_api/call/caption"
    for extra in ({}, {"meta": {"_type": "gradio.FileData"}}):
        body = {"data": [{"path": str(UPLOAD), **extra}]}
        event = page.request.post(calls, data=body).json()["event_id"]
        answer = page.request.get(f"{calls}/{event}").text()
        assert "event: error" in answer and "usb" not in answer, answer


def test_two_browsers_at_once_get_their_own_answers(visit):
    wishes = (("heart (ph, fill, red)", 0), ("cloud (mdi)", 1))

    pages, alone = [visit(), visit()], []
    for page, wish in zip(pages, wishes, strict=True):
        start_drawing(page, *wish)
        alone.append(wait_for_drawing(page)[-1])
    assert not np.array_equal(*alone)
    for page, wish in zip(reversed(pages), wishes, strict=True):
        start_drawing(page, *wish)
    for page, expected in zip(reversed(pages), alone, strict=True):
        assert np.array_equal(wait_for_drawing(page)[-1], expected)


def test_a_drawing_that_is_stopped_or_left_behind_makes_room_for_the_next(visit):
    page = visit()
    start_drawing(page, "house (tabler, outline, red)", count=2)
    page.wait_for_function("window.seen.length > 0")
    page.locator("#draw-stop").click()
    page.wait_for_timeout(500)
    assert not page.evaluate(PROGRESS).endswith(" s")
    start_drawing(page, "house (tabler, outline, red)", count=2)
    page.wait_for_function("window.seen.length > 0")
    page.context.close()
    page = visit()
    start_drawing(page, "heart (ph, fill, red)")
    assert share_of_paper(wait_for_drawing(page)[-1]) == 0
