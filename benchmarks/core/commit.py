"""The commit that is measured."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def current_commit() -> str:
    """This repository's commit, as git describes it; "unknown" without git."""
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
