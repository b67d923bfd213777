# SPDX-License-Identifier: Apache-2.0
"""
Writes the tables and the figures of docs/study.md from the study's rows and the times of its steps.

    python scripts/study_report.py

What stands between `<!-- study: start -->` and `<!-- study: end -->` of the page is replaced.
"""

import argparse
import json
import sys
from pathlib import Path

from modeling_moma.utils.atomic_files import atomic_write
from study_recipe.reporting import (
    cost_table,
    coverage_table,
    draw_gaps,
    draw_savings,
    experts_table,
    fresh_table,
    lever_table,
    loss_table,
    opened,
    plan_table,
    repetition_table,
    saving_table,
    seed_table,
    slope_table,
    time_table,
)
from study_recipe.rows import read_rows


REPOSITORY = Path(__file__).resolve().parent.parent
START, END = "<!-- study: start -->", "<!-- study: end -->"
# recipes are chosen by the first and claimed by the second
CHOOSING, CLAIMING = "validation", "test"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=REPOSITORY / "docs" / "study" / "runs.parquet")
    parser.add_argument("--times", type=Path, default=REPOSITORY / "docs" / "study" / "step-times.json")
    parser.add_argument("--page", type=Path, default=REPOSITORY / "docs" / "study.md")
    parser.add_argument("--figures", type=Path, default=REPOSITORY / "docs" / "images", help="folder of the figures")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    rows = [opened(row) for row in read_rows(args.results)]
    if not rows:
        print(f"--results {str(args.results)!r} has no rows: scripts/study.py writes them.", file=sys.stderr)
        return 1
    text = args.page.read_text()
    if START not in text or END not in text:
        print(f"--page {str(args.page)!r} lacks {START} or {END}.", file=sys.stderr)
        return 1
    times = json.loads(args.times.read_text()) if args.times.is_file() else None
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    draw_savings(rows, CLAIMING, args.figures / "study-eta.svg")
    draw_gaps(rows, args.figures / "study-gaps.svg", "all")
    draw_gaps(rows, args.figures / "study-levers.svg", "shipped")
    page = f"{before}{START}\n{tables(rows, times)}\n{END}{after}"
    atomic_write(args.page, lambda path: path.write_text(page))
    print(f"{args.page}: {len(rows)} rows")
    return 0


def tables(rows: list[dict], times: dict | None) -> str:
    """Return all tables, each under its heading."""
    parts = {
        "Cost of a token": cost_table(rows),
        f"Causal losses on `{CHOOSING}`": loss_table(rows, CHOOSING),
        f"Causal losses on `{CLAIMING}`": loss_table(rows, CLAIMING),
        f"Fresh seeds on `{CLAIMING}`, causal": fresh_table(rows, CLAIMING),
        f"Eta on `{CHOOSING}`": saving_table(rows, CHOOSING, times),
        f"Eta on `{CLAIMING}`": saving_table(rows, CLAIMING, times),
        f"Eta of each seed on `{CLAIMING}`, causal": seed_table(rows, CLAIMING),
        f"Levers on `{CHOOSING}`, causal": lever_table(rows, CHOOSING),
        f"A twelfth of the icons on `{CHOOSING}`, causal": repetition_table(rows, CHOOSING),
        "Eta over tokens by active parameter": slope_table(rows, CLAIMING),
        "Time of a step": time_table(times),
        "Tokens that no expert took": coverage_table(rows),
        "Routed experts that a token meets": experts_table(rows),
        "What the law asks for": plan_table(),
    }
    return "\n".join(f"### {title}\n\n{content}\n" for title, content in parts.items())


if __name__ == "__main__":
    sys.exit(main())
