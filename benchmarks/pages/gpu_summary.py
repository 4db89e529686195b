"""The table at the end of gpu.py: prediction, floor, measured, ratio to the official formulation; and what is missing.

    python -m benchmarks.pages.gpu_summary --output runs/gpu           # prints it; the page is summary_<device>.md
    python -m benchmarks.pages.gpu_summary --output runs/gpu --left    # names the stages that lack rows

Ends with code 1 if a test failed or something could not be measured.
"""

from __future__ import annotations

import sys

from benchmarks.core.rows import device_slug
from benchmarks.pages.gpu import section, summary
from benchmarks.stages.common import Told, parser, told
from benchmarks.stages.gpu_run import missing_rows, not_measured, read_run


def main(where: Told) -> int:
    """Prints the table and writes the page; 1 if something failed."""
    run = read_run(where.output, device_slug(where.device))
    missing = not_measured(run, where.device, where.quick)
    end = "Everything has been measured."
    if missing:
        end = f"Not measured yet: {'; '.join(missing)}. A call with the same --output goes on from here."
    path = where.file("summary").with_suffix(".md")
    path.write_text(f"{section(run)}\n\n{end}\n", encoding="utf-8")
    print(f"\n{summary(run)}\n\n{end}\n\nRows, log and all tables ({path.name}) are in {where.output}", flush=True)
    return 1 if run.failures or any(each.outcome == "failed" for each in run.tests) else 0


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--left", action="store_true", help="print the stages that there are too few rows of")
    given = arguments.parse_args()
    where = told(given)
    if given.left:
        print(*missing_rows(read_run(where.output, device_slug(where.device)), where.device, where.quick))
        sys.exit()
    sys.exit(main(where))
