"""The base of the Hugging Face hosts: save_pretrained and from_pretrained keep the sampler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adamae_sampler.integrations.host import AdaptiveHost
from adamae_sampler.integrations.patched import HostInterfaceError, Patched
from adamae_sampler.mask import MaskSample
from adamae_sampler.networks import OLD_NAMES
from adamae_sampler.sampler import AdaptiveTokenSampler, TokenSampler

SETTINGS = "adaptive_masking"  # attribute of the model's config


class HuggingFaceHost(AdaptiveHost):
    """Base of the Hugging Face hosts. Modifications:

    - save_pretrained writes the sampler's settings into the configuration;
    - from_pretrained of the patched class builds the sampler and loads its weights.
    """

    overrides = ("from_pretrained", "save_pretrained")
    mask_hint = (
        ' Trainer.evaluate takes the mask from the items of the data set, under the key "mask":\n'
        "    masks = model.eval().draw_mask(pixel_values).mask  # [items, N], once\n"
        '    items = [{"pixel_values": x, "mask": mask} for x, mask in zip(pixel_values, masks)]'
    )
    config: Any
    _settings: Mapping[str, Any] | None = None

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """Called by from_pretrained, not by `patch`.

        Raises:
            ValueError: the configuration does not describe a sampler.
        """
        settings = getattr(config, SETTINGS, None)
        plain = f"{self.host_class.__name__}.from_pretrained"
        if settings is None:
            raise ValueError(
                f"the configuration has no {SETTINGS}, so these weights come from a model that was not patched. Use "
                f"{plain}, then patch(model)."
            )
        if "network" not in settings:
            raise ValueError(
                f"these weights were saved with a sampler that the user built, a {settings.get('sampler')}, and the "
                f"configuration cannot describe it. Use {plain}, delete model.config.{SETTINGS}, then patch(model, "
                "sampler=...) with a sampler like it, and load the file's sampler.* with "
                "model.sampler.load_state_dict."
            )
        super(Patched, self).__init__(config, *args, **kwargs)
        shape = self.host_shape(self)
        sampler = AdaptiveTokenSampler(shape.embed_dim, shape.grid_size, settings["mask_ratio"], settings["network"])
        self.install(sampler, settings["sampling_weight"], settings)
        del self.config.adaptive_masking

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """The host's from_pretrained, which also loads the sampler.

        Raises:
            ValueError: the file lacks weights of the sampler.
        """
        old_names = {rf"^sampler\.network\.{old}": f"sampler.network.{new}" for old, new in OLD_NAMES.items()}
        kwargs["key_mapping"] = {**old_names, **(kwargs.get("key_mapping") or {})}
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        if conversions := getattr(model, "_weight_conversions", None):
            # transformers 5 undoes the renaming of a load in the next save; the old names are not to come back.
            model._weight_conversions = [
                each for each in conversions if not old_names.keys() & set(getattr(each, "source_patterns", ()))
            ]
        if missing := sorted(name for name in info["missing_keys"] if name.startswith("sampler.")):
            raise ValueError(
                f"the file lacks {len(missing)} weights of the sampler, such as {missing[0]}, so it comes from a model "
                f"that was not patched. Use model = {cls.host_class.__name__}.from_pretrained(folder), then "
                f"del model.config.{SETTINGS} and patch(model): its configuration still describes a sampler."
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """The host's save_pretrained, which also saves the sampler and its settings. `self.config` does not change."""
        settings = self._settings or {"sampler": type(self.sampler).__name__}
        setattr(self.config, SETTINGS, {**settings, "sampling_weight": self.sampling_weight})
        try:
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        finally:
            delattr(self.config, SETTINGS)

    @staticmethod
    def probe(model: Any) -> None:
        """Raises ValueError if the weights were saved with a sampler, since a fresh one would silently replace it."""
        if getattr(model.config, SETTINGS, None) is not None:
            raise ValueError(
                f"this {type(model).__name__} was saved with a sampler, and its from_pretrained left the sampler out. "
                f"Load it with patched_class({type(model).__name__}).from_pretrained(folder). To start with a fresh "
                f"sampler, del model.config.{SETTINGS}, then patch(model)."
            )

    def install(self, sampler: TokenSampler, sampling_weight: float, settings: Mapping[str, Any] | None = None) -> None:
        """Does what `AdaptiveHost.install` does, and keeps the settings for save_pretrained."""
        super().install(sampler, sampling_weight, settings)
        self._settings = settings

    def host_output(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor, Tensor]:
        """The output of the host's own forward, a ModelOutput or a dictionary; and its loss and logits.

        Raises:
            HostInterfaceError: it has no loss or no logits.
        """
        output = super().forward(*args, return_dict=True, **kwargs)
        loss, logits = (
            getattr(output, name, None) if hasattr(output, "to_tuple") else output.get(name)
            for name in ("loss", "logits")
        )
        if loss is None or logits is None:
            raise HostInterfaceError(
                f"the forward of {self.host_class.__name__} was expected to compute a loss and logits, and returned "
                f"{', '.join(output)}. The sampler learns from both. unpatch(model), or leave the option out."
            )
        return output, loss, logits

    def remove(self) -> None:
        """Does what `AdaptiveHost.remove` does, and drops the settings."""
        self.__dict__.pop("_settings", None)
        super().remove()

    def finish(self, output: Any, return_dict: bool | None) -> Any:
        """The output; as a tuple if the caller or the configuration asks for one, and the host knows such tuples."""
        if not hasattr(output, "to_tuple"):
            return output
        wanted = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if wanted else output.to_tuple()


def image_grid(config: Any) -> tuple[int, int]:
    """The number of tokens in height and width."""
    size, patch = (
        pair if isinstance(pair, (tuple, list)) else (pair, pair) for pair in (config.image_size, config.patch_size)
    )
    return size[0] // patch[0], size[1] // patch[1]


def one_of(mask: Tensor | MaskSample | None, other: Tensor | MaskSample | None) -> Tensor | MaskSample | None:
    """The mask, an argument with two names. Raises ValueError if both are given."""
    if mask is not None and other is not None:
        raise ValueError("got both mask and bool_masked_pos, two names of one argument; pass one of them.")
    return other if mask is None else mask


def check_no_noise(noise: None) -> None:
    """Raises ValueError if a call passes noise, by which a host chooses its random mask."""
    if noise is not None:
        raise ValueError("noise chooses the host's random mask, and a patched model has its own. Pass mask=.")


def normalized(target: Tensor) -> Tensor:
    """Patches [..., P] with mean 0 and standard deviation 1, all channels together, as MAE's norm_pix_loss."""
    variance, mean = target.var(dim=-1, keepdim=True), target.mean(dim=-1, keepdim=True)
    return (target - mean) / (variance + 1e-6).sqrt()
