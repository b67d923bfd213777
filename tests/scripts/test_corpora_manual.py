# SPDX-License-Identifier: Apache-2.0
"""Pages of a manual become segments of text and images, and a folder of documents that `datasets` opens."""

import pytest
from datasets import load_dataset
from PIL import Image

from corpora_recipe.folder import SPLITS, split_of, write_corpus
from corpora_recipe.manual import copy_images, count_table, read_manual
from corpora_recipe.page import read_page


PAGE = """<?xml version="1.0" encoding="UTF-8"?>
<html xmlns="http://www.w3.org/1999/xhtml"><head><title>1.2.  Zoom</title></head><body>
<div class="navheader"><a href="x.html"><img src="images/prev.png" alt="Prev" /></a> Other tools</div>
<div class="sect1"><h2 class="title"><a id="z"></a>1.2. Zoom</h2><a id="i" class="indexterm"></a>
<p>
   Changes the <em>size</em> of
   what you see<a href="#f" class="footnote"><sup>[1]</sup></a> → all, see
   <a class="xref" href="bibliography.html#b">[<abbr>WKPD</abbr>]</a>.
</p>
<div class="tip"><table><tr><td><img alt="[Tip]" src="images/tip.png" /></td><th>Tip</th></tr>
<tr><td><p>Hold the key.</p></td></tr></table></div>
<div class="toc"><ul><li>Contents</li></ul></div>
<ul><li><p>The icon <span><img src="images/icon.png" /></span> in the box.</p></li><li><p>The menu.</p></li></ul>
<ol start="3"><li>Open</li><li>Close</li></ol>
<dl><dt>Mode</dt><dd><p>In or out.</p></dd></dl>
<div class="figure"><p class="title">Figure 1. Options</p><div><img src="images/sub/options.png" /></div>
<div class="caption"><p>All &lt;options&gt;.</p></div></div>
<table class="table"><tr><th>Key</th><th>Action</th></tr><tr><td>A</td><td>Add</td></tr></table>
<pre>
if x:
    y()
</pre>
<p>The line ends here<br />and goes on<img src="images/dot.png" /> after a dot.</p>
<!-- a comment --></div>
<div class="navfooter">Next</div></body></html>"""


def read(text, leave_out=()):
    return read_page(text.encode(), lambda source: None if source in leave_out else source)


def image(path, size, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path, **kwargs)


def test_page_is_read_in_order_without_navigation():
    page = read(PAGE, leave_out=["images/dot.png"])
    assert page.title == "1.2. Zoom" and page.has_text
    assert page.segments == [
        {
            "type": "text",
            "text": "1.2. Zoom\n\nChanges the size of what you see → all, see.\n\nTip\nHold the key.\n\n- The icon",
        },
        {"type": "image", "image": "images/icon.png"},
        {
            "type": "text",
            "text": "in the box.\n- The menu.\n\n3. Open\n4. Close\n\nMode\nIn or out.\n\nFigure 1. Options",
        },
        {"type": "image", "image": "images/sub/options.png"},
        {
            "type": "text",
            "text": "All <options>.\n\nKey | Action\nA | Add\n\nif x:\n    y()\n\n"
            "The line ends here\nand goes on after a dot.",
        },
    ]


def test_headings_alone_are_no_text():
    assert not read("<html><body><h1>Filters</h1><div class='toc'><p>Blur</p></div><p> </p></body></html>").has_text


@pytest.fixture
def pages(tmp_path):
    folder = tmp_path / "pages"
    image(folder / "images/sub/options.png", (40, 30))
    image(folder / "images/icon.png", (16, 16))
    image(folder / "images/dot.png", (16, 15))
    (folder / "images/cut.png").write_bytes((folder / "images/sub/options.png").read_bytes()[:60])
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="32" height="16"><rect width="16" height="16"/></svg>'
    (folder / "images/wide.svg").write_text(svg)
    (folder / "zoom.html").write_text(PAGE)
    more = "".join(
        f'<img src="{name}"/>' for name in ("images/cut.png", "images/none.png", "../x.png", "images/wide.svg")
    )
    (folder / "more.html").write_text(
        f"<html><head><title>More</title></head><body><p>Text {more} end</p></body></html>"
    )
    (folder / "empty.html").write_text("<html><body><h1>Nothing</h1><img src='images/icon.png'/></body></html>")
    (folder / "plain.html").write_text("<html><head><title>Plain</title></head><body><p>Words</p></body></html>")
    return folder


def test_what_is_left_out_is_counted(pages):
    manual = read_manual(pages, validation_share=0)
    assert [row["title"] for row in manual.rows["train"]] == ["More", "Plain", "1.2. Zoom"]
    assert manual.rows["validation"] == []
    assert manual.left_out == {
        "pages without text": 1,
        "images below 16 pixels": 1,
        "images that cannot be read": 1,
        "images without a file": 2,
    }
    assert set(manual.images) == {"images/icon.png", "images/sub/options.png", "images/wide.svg.png"}
    assert "| train | 3 | 2 | 3 | 3 |" in count_table(manual, "1-1")


def test_folder_is_what_datasets_opens_and_is_built_equal_twice(pages, tmp_path):
    def build(output):
        manual = read_manual(pages, validation_share=0.5)
        write_corpus(output, manual.rows, "card", lambda folder: copy_images(manual, folder))
        return {path.relative_to(output): path.read_bytes() for path in output.rglob("*") if path.is_file()}

    output = tmp_path / "manual"
    files = build(output)
    assert build(output) == files and build(tmp_path / "other") == files
    with Image.open(output / "images/wide.svg.png") as image:
        assert image.size == (64, 32) and image.convert("RGB").getpixel((60, 10)) == (255, 255, 255)
    assert (output / "images/icon.png").read_bytes() == (pages / "images/icon.png").read_bytes()

    data = {split: str(output / f"{split}.jsonl") for split in SPLITS}
    opened = load_dataset("json", data_files=data, cache_dir=str(tmp_path / "cache"))
    rows = [row for split in SPLITS for row in opened[split]]
    assert sorted(row["title"] for row in rows) == ["1.2. Zoom", "More", "Plain"]
    images = [part["image"] for row in rows for part in row["segments"] if part["type"] == "image"]
    assert images and all((output / image).is_file() for image in images)


def test_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="thesis.tex"):
        write_corpus(tmp_path, {split: [] for split in SPLITS}, "card")
    assert (tmp_path / "thesis.tex").exists()


def test_split_depends_on_the_name_alone_and_has_about_the_share():
    names = [f"page-{number}.html" for number in range(2000)]
    held_out = [name for name in names if split_of(name, {"validation": 0.05}) == "validation"]
    assert 60 < len(held_out) < 140
    assert all(split_of(name, {"validation": 0.1}) == "validation" for name in held_out)
