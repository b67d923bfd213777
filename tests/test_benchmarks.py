# Copyright 2026 The modeling-moma authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from benchmarks.depth_step import main


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
