# SPDX-License-Identifier: Apache-2.0
"""The page of `moma demo` in a real Chromium, headless: what a visitor does, and what comes of it."""

import io

import numpy as np
import pytest
from PIL import Image

from helpers.released import skip_without_released_model
from helpers.slow import slow
from page_images import PATIENCE, ROOT, browser, find_browser, served_page


EXAMPLES = ROOT / "model_cards" / "moma-icons-space" / "examples"
# writes down each image of the gallery
WATCH = """() => {
    window.seen = [];
    const look = () => {
        const image = document.querySelector('#draw-gallery .grid-container img, #draw-gallery img');
        if (image && !window.seen.includes(image.src)) window.seen.push(image.src);
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
def page(address):
    """A page for what one visitor does in one tab after the other, with the addresses that it asked for."""
    with browser() as chromium, chromium.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(address)
        # a page is built part by part after it was loaded, and a script finds no part too early
        page.wait_for_selector("#caption-words textarea", state="attached", timeout=PATIENCE)
        yield page


def open_tab(page, name: str):
    page.get_by_role("tab", name=name).click()


def pixels_of(page, source: str) -> np.ndarray:
    answer = page.request.get(source)
    assert answer.ok, source
    return np.asarray(Image.open(io.BytesIO(answer.body())).convert("RGB"))


def test_an_image_is_drawn_while_the_visitor_looks_and_nobody_else_is_asked(address, page):
    open_tab(page, "Draw")
    page.locator("#draw-words textarea").fill("heart (ph, fill, red)")
    for name, number in (("count", "1"), ("guidance", "5")):
        page.locator(f"#draw-{name} input[type=number]").fill(number)
    page.locator("#draw-seed input").fill("0")
    # the tab is drawn after it was chosen
    for part in ("#draw-gallery", "#draw-progress textarea, #draw-progress input"):
        page.wait_for_selector(part, state="attached", timeout=PATIENCE)
    page.evaluate(WATCH)
    page.locator("#draw-button").click()
    page.wait_for_function(f"window.seen.length > 2 && {PROGRESS}.endsWith(' s')")
    page.wait_for_timeout(300)
    views = [pixels_of(page, source) for source in page.evaluate("window.seen")]
    shares = [float((pixels == PAPER).all(-1).mean()) for pixels in views]
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


@slow
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


@slow
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
