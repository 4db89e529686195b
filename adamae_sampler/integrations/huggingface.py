"""What the Hugging Face hosts share: a sampler that save_pretrained and from_pretrained keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adamae_sampler.integrations.host import AdaptiveHost
from adamae_sampler.sampler import AdaptiveTokenSampler, TokenSampler

SETTINGS = "adaptive_masking"  # of the model's config


class HuggingFaceHost(AdaptiveHost):
    """Modifications:

    - the configuration says how to build the sampler, and from_pretrained of the patched class builds it.
    """

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """As from_pretrained calls it; `patch` does not.

        Raises:
            ValueError: the configuration does not describe a sampler.
        """
        settings = getattr(config, SETTINGS, None)
        if not settings or "mask_ratio" not in settings:
            raise ValueError(
                f"the configuration's {SETTINGS} is {settings!r}: these weights were saved from a model that was not "
                f"patched, or with a sampler of its own making. Use {self.host_class.__name__}.from_pretrained, then "
                "patch(model), and load a sampler of your own with model.sampler.load_state_dict."
            )
        super().__init__(config, *args, **kwargs)
        shape = self.describe(self)
        sampler = AdaptiveTokenSampler(shape.embed_dim, shape.grid_size, settings["mask_ratio"], settings["network"])
        self.install(sampler, settings["sampling_weight"], settings)

    @staticmethod
    def probe(model: Any) -> None:
        """Weights that were saved with a sampler must not get a fresh one without a word."""
        if getattr(model.config, SETTINGS, None) is not None:
            raise ValueError(
                f"this {type(model).__name__} was saved with a sampler, which its from_pretrained left out. Load it "
                f"with patched_class({type(model).__name__}).from_pretrained(folder), or start with a fresh sampler: "
                f"del model.config.{SETTINGS}, then patch(model)."
            )

    def install(self, sampler: TokenSampler, sampling_weight: float, settings: Mapping[str, Any] | None = None) -> None:
        """As for every host, and noted in the configuration."""
        super().install(sampler, sampling_weight, settings)
        noted = {**(settings or {"sampler": type(sampler).__name__}), "sampling_weight": sampling_weight}
        setattr(self.config, SETTINGS, noted)

    def remove(self) -> None:
        """As for every host, and deleted from the configuration."""
        super().remove()
        self.config.__dict__.pop(SETTINGS, None)

    def finish(self, output: Any, return_dict: bool | None) -> Any:
        """The output as the caller wants it."""
        wanted = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if wanted else output.to_tuple()


def image_grid(config: Any) -> tuple[int, int]:
    """Tokens in height and width."""
    size, patch = (
        pair if isinstance(pair, (tuple, list)) else (pair, pair) for pair in (config.image_size, config.patch_size)
    )
    return size[0] // patch[0], size[1] // patch[1]
