# SPDX-License-Identifier: Apache-2.0
from PIL import Image

import contact_sheet
from helpers.released import RELEASED, skip_without_released_model


def test_a_sheet_shows_what_a_model_says_and_draws(tmp_path, capsys, monkeypatch):
    skip_without_released_model()
    output = tmp_path / "sheet.png"
    arguments = ["--model", str(RELEASED), "--recipe", "recipes/emoji.yaml", "--images", "2", "--output", str(output)]
    monkeypatch.chdir(RELEASED.parents[1])
    contact_sheet.main(arguments)
    printed = capsys.readouterr().out
    assert "2 held-out images captioned" in printed and f"wrote {output}" in printed
    with Image.open(output) as sheet:
        assert min(sheet.size) > 128
