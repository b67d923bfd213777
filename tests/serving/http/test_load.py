# SPDX-License-Identifier: Apache-2.0
"""A few seconds of `benchmarks.serving_load`: many clients, some of whom hang up or ask what cannot be answered."""

import pytest

from helpers.released import skip_without_released_model


for package in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(package, reason="`pip install transformers[serving]` is missing")

from benchmarks.serving_load import Held, leaks, main  # noqa: E402


def test_a_loaded_server_answers_right_refuses_by_name_and_leaks_nothing(tmp_path, capsys):
    skip_without_released_model()
    status = main(["--seconds", "2.5", "--clients", "16", "--new-tokens", "4", "--report", str(tmp_path)])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    (report,) = tmp_path.iterdir()
    assert report.read_text() == printed.out
    rows = [line.strip("| ").split(" | ") for line in report.read_text().splitlines() if line.startswith("| ")]
    figures = {row[0]: row[1] for row in rows if len(row) == 2}
    for name in ("answers, streamed", "answers, whole", "cancelled in the middle of the stream", "bad requests"):
        assert int(figures[name]) > 0, name
    assert figures["of them other than what `generate` gives alone"] == "0"
    assert figures["tracebacks in the log of the server"] == "0"


@pytest.mark.parametrize(
    ("after", "names"),
    [
        (Held(105, 9, 5), None),
        (Held(120, 9, 5), "memory grew from 100 to 120"),
        (Held(100, 40, 5), "open files"),
        (Held(100, 9, 20), "threads"),
    ],
)
def test_what_grows_is_named(after, names):
    found = leaks(Held(100, 9, 5), after)
    assert found == [] if names is None else len(found) == 1 and names in found[0]


@pytest.mark.parametrize("arguments", [["--clients", "0"], ["--new-tokens", "0"], ["--seconds", "nan"]])
def test_a_load_of_nothing_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert " ".join(arguments) in capsys.readouterr().err
