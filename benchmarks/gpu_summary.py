"""The table at the end of gpu.py: prediction, floor, measured, ratio to the official formulation; and what is missing.

    python -m gpu_summary --output runs/gpu

Ends with code 1 if a test failed or something could not be measured.
"""

from __future__ import annotations

import sys

from gpu_tables import not_measured, read_run, summary
from rows import device_slug
from stages.common import Told, parser, told


def main(where: Told) -> int:
    """Prints, and writes summary_<device>.md; 1 if something failed."""
    run = read_run(where.output, device_slug(where.device))
    text = summary(run)
    missing = not_measured(run, where.device, where.quick)
    if missing:
        text += f"\n\nNot measured yet: {'; '.join(missing)}. The same command goes on from here."
    where.file("summary").with_suffix(".md").write_text(f"{text}\n", encoding="utf-8")
    print(f"\n{text}\n\nRows, log and this table are in {where.output}", flush=True)
    return 1 if run.failures or any(each.outcome == "failed" for each in run.tests) else 0


if __name__ == "__main__":
    sys.exit(main(told(parser(__doc__).parse_args())))
