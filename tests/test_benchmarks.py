# SPDX-License-Identifier: Apache-2.0
import copy
from pathlib import Path

import pytest

from benchmarks.depth_step import main
from helpers.tiny import tiny_model, tiny_processor


EMOJI = Path(__file__).resolve().parent.parent / "data" / "emoji"


def test_depth_step_runs_both_models_and_reports(tmp_path, capsys):
    sizes = "--rows 2 --length 128 --hidden-size 32 --width 24 --layers 2 --vocab-size 1100 --repeats 1 --profiled 1"
    main([*sizes.split(), "--device", "cpu", "--report", str(tmp_path)])
    (report,) = tmp_path.iterdir()
    assert report.read_text() == capsys.readouterr().out
    cells = dict(line.strip("| ").split(" | ", 1) for line in report.read_text().splitlines() if line.startswith("| "))
    ratio = float(cells["FLOPs of forward and backward, 1e12"].rsplit(" | ", 1)[1])
    assert 0.25 < ratio < 1
    shares = cells["share of operations' time not in them"].split(" | ")[:2]
    assert all(0 < float(share.rstrip("% ")) < 100 for share in shares)


def test_quantization_runs_every_way_and_reports(tmp_path, capsys):
    for package in ("torchao", "bitsandbytes"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from benchmarks.quantization import WAYS
    from benchmarks.quantization import main as compare

    model, reports, processor = tmp_path / "model", tmp_path / "reports", tiny_processor()
    tiny_model(processor).save_pretrained(model)
    processor.save_pretrained(model)
    reports.mkdir()
    sizes = "--pictures 2 --batch-size 2 --rounds 1".split()
    compare(["--model", str(model), "--data", str(EMOJI), *sizes, "--report", str(reports)])
    (report,) = reports.iterdir()
    assert report.read_text() == capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in report.read_text().splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == list(WAYS)
    shares = {row[0]: float(row[1].rstrip("%")) for row in rows[1:]}
    assert shares["fp32"] == 0 and min(share for way, share in shares.items() if way != "fp32") > 5


@pytest.mark.parametrize("part", ["lm_head", "embed_tokens", "router", "norm"])
def test_quantization_refuses_a_way_that_changes_what_has_to_stay(part):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from benchmarks.quantization import check_kept

    full = tiny_model(tiny_processor())
    model = copy.deepcopy(full)
    check_kept(model, full)
    name = next(name for name, _ in model.named_parameters() if name.endswith(f"{part}.weight"))
    model.get_parameter(name).data += 1
    with pytest.raises(RuntimeError, match=name):
        check_kept(model, full)
