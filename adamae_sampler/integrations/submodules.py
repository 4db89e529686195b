"""Mixins of a host's submodules: a tokenizer that keeps its tokens, and a submodule that takes the mask."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from adamae_sampler.integrations.mask_use import MaskUse
from adamae_sampler.integrations.patched import Patched


class PatchedSubmodule(Patched):
    """Mixin of a host's submodule. During a forward of the host, `_use` has the mask and notes what is done with it."""

    _use: MaskUse | None = None


class MaskedSubmodule(PatchedSubmodule):
    """Mixin of a submodule that gets the mask as an argument. Modifications:

    - it notes that the mask came and that something was done with it, else it raises HostInterfaceError.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's arguments -> the host's result."""
        use = self._use
        got_mask = use is not None and any(use.is_handed(each) for each in (*args, *kwargs.values()))
        result = super().forward(*args, **kwargs)
        if use is not None:
            if not got_mask or (use.looked_at is False and not torch.compiler.is_compiling()):
                raise use.unmasked()
            use.note_mask()
        return result


class CachedTokenizer(PatchedSubmodule):
    """Mixin of a host's tokenizer. Modifications:

    - the tokens made for the sampler are cached, and the host's forward gets them from the cache.

    Forward hooks are called twice, once for the sampler and once for the host. The cache holds tokens from before the
    hooks, so a hook that changes tokens changes them once.
    """

    _keep = False  # True while tokens are made for the sampler
    _kept: tuple[Any, Tensor] | None = None  # the cache: the input, and its tokens

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The host's arguments -> the host's tokens."""
        kept, self._kept = self._kept, None
        if kept is not None:
            if kept[0] is x:
                return kept[1]
            if not torch.compiler.is_compiling():
                warnings.warn(
                    f"the forward of a patched model passed its {type(self).__name__} another tensor than the model's "
                    "input (does it normalise?). Tokens are computed twice, and the sampler scores those of the input.",
                    stacklevel=2,
                )
        tokens: Tensor = super().forward(x, *args, **kwargs)
        if self._keep:
            self._kept = x, tokens
        return tokens
