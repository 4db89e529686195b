"""A hatch hook: the package's URLs and the links of its README, from the repository that builds a release.

The release workflow states its repository in the environment. Elsewhere the README stays as it is, without URLs.
GitHub's own variables would not do: in somebody else's workflow they name another repository.
"""

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?://|#)([^)\s]+)\)")


class ReleaseMetadata(MetadataHookInterface):
    """Sets `readme` and `urls`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling with the [project] table."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        if home := os.environ.get("ADAMAE_SAMPLER_REPOSITORY"):
            ref = os.environ.get("ADAMAE_SAMPLER_REF", "main")
            metadata["urls"] = {
                "Repository": home,
                "Documentation": f"{home}/blob/{ref}/README.md",
                "Changelog": f"{home}/blob/{ref}/CHANGELOG.md",
                "Issues": f"{home}/issues",
            }
            text = absolute(text, home, ref)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def absolute(text: str, home: str, ref: str) -> str:
    """A page whose links and pictures within the repository are addresses that work anywhere."""

    def address(link: re.Match[str]) -> str:
        picture, label, path = link.groups()
        return f"{picture}[{label}]({home}/{'raw' if picture else 'blob'}/{ref}/{path})"

    return _LINK.sub(address, text)
