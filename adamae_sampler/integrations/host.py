"""The base of all patched hosts: it draws a mask for the host's own forward, and adds the sampling loss.

The class of a patched model has two bases, a mixin of this package and the class of the host. The mixin holds only the
difference, so the forward of the host still runs, in whichever version is installed.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn

from adamae_sampler.integrations.mask_use import MaskUse
from adamae_sampler.integrations.patched import HostInterfaceError, Patched, patched_type
from adamae_sampler.integrations.submodules import CachedTokenizer, PatchedSubmodule
from adamae_sampler.integrations.token_errors import errors_by_gradient
from adamae_sampler.losses import ranking_loss, sampling_loss
from adamae_sampler.mask import MaskSample, target_valid
from adamae_sampler.sampler import GridSize, TokenSampler


class HostShape(NamedTuple):
    """The shape of a host's tokens and its mask ratio, from which a sampler is built.

    Attributes:
        embed_dim: D, width of its tokens.
        grid_size: (T, H, W) of its tokens; T is 1 for images.
        mask_ratio: share of tokens that the host masks by default; None if its data loader decides.
    """

    embed_dim: int
    grid_size: GridSize
    mask_ratio: float | None = None


class LastStep(NamedTuple):
    """The mask and losses of the latest forward of a patched model, without gradients.

    Attributes:
        sample: the mask.
        reconstruction: scalar, the host's own loss; None if the training engine computes the loss.
        sampling: scalar, L_S or the ranking loss before its weight; None in evaluation, for samplers that learn
            nothing, and if the training engine computes the loss.
    """

    sample: MaskSample
    reconstruction: Tensor | None = None
    sampling: Tensor | None = None


class AdaptiveHost(Patched):
    """Base of all mixins: the sampler, the mask of a forward, and the loss.

    Attributes:
        names: class names of the host; subclasses are taken too.
        expected_interface: the methods and attributes that a host must have. Keys are dotted names. A value is a tuple
            of the method's first parameters, or the type of the attribute.
        tokenizer: dotted name of the submodule that makes the tokens.
        patched_submodules: dotted names of the submodules that are patched too, with their mixins.
        sampler: the sampler, a submodule. Its parameters are trained and saved with those of the host.
        sampling_weight: weight of the sampling loss in training. In evaluation the loss is that of the host.
        masks_in: the method or submodule of the host that takes the mask, for messages.
        overrides: further methods of the host that the mixin overrides, beside those in `expected_interface`.
        mask_hint: a sentence for the error about a mask that is missing in evaluation.
        computes_loss: whether the host's forward computes the loss. If not, the training engine calls AdaMAELoss.
        last_step: the latest mask and losses, for logging and pictures.
    """

    names: ClassVar[tuple[str, ...]]
    expected_interface: ClassVar[Mapping[str, tuple[str, ...] | type]]
    tokenizer: ClassVar[str] = "patch_embed"
    patched_submodules: ClassVar[Mapping[str, type[PatchedSubmodule]]] = {"patch_embed": CachedTokenizer}

    masks_in: ClassVar[str] = "a method that its mixin overrides"
    overrides: ClassVar[tuple[str, ...]] = ()
    computes_loss: ClassVar[bool] = True
    mask_hint: ClassVar[str] = ""

    sampler: TokenSampler
    sampling_weight: float
    last_step: LastStep | None = None
    _use: MaskUse | None = None  # the mask of the forward that is under way
    _errors: list[Tensor] | None = None  # errors of the forward that is under way, for `token_errors`

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for old, new in _RENAMED_ATTRIBUTES.items():
            if old in vars(cls):
                raise TypeError(f"{cls.__name__}.{old} is now called {new}; rename it.")

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Whether a model of a matching class name is this host. Several hosts share a class name."""
        return True

    @staticmethod
    def host_shape(model: Any) -> HostShape:
        """The shape of an unpatched host. Every mixin defines it."""
        raise HostInterfaceError(
            f"the mixin for {type(model).__name__} has no host_shape(model). Define it, and return a HostShape."
        )

    @staticmethod
    def probe(model: Any) -> None:
        """Raises HostInterfaceError if a host has the expected interface and still cannot be patched."""

    def tokenize(self, video: Tensor) -> Tensor:
        """The host's input -> the tokens of its tokenizer, before the position embedding, as in the paper."""
        return cast(Tensor, self.get_submodule(self.tokenizer)(video))

    def scored(self, tokens: Tensor) -> Tensor:
        """The tokens of the tokenizer -> the tokens [B, N, D] that the sampler scores."""
        return tokens

    def draw_mask(
        self, video: Tensor, generator: torch.Generator | None = None, *, valid: Tensor | None = None
    ) -> MaskSample:
        """A mask for the host's input. For evaluation draw it once, then pass it to every forward.

        Args:
            video: the host's input.
            generator: source of randomness.
            valid: [B, N] bool, the tokens or mask units that count, see `TokenSampler.forward`.
        """
        return self.sampled(video, self.tokenize(video), valid, generator=generator)

    @torch.no_grad()
    def token_errors(self, inputs: Tensor, sample: MaskSample) -> Tensor:
        """The errors [B, M] of a mask's masked tokens, in evaluation mode, for hosts that compute their loss."""
        errors: list[Tensor] = []
        self._errors = errors
        try:
            self(inputs, mask=sample)
        finally:
            del self._errors
        return errors[0]

    def as_video(self, inputs: Tensor) -> Tensor:
        """The host's input -> its pixels [B, C, T, H, W], for samplers that look at them. Images have T = 1."""
        return inputs[:, :, None] if inputs.dim() == 4 else inputs

    def grid_of(self, inputs: Tensor) -> GridSize | None:
        """The grid (T, H, W) of an input's tokens; None for that of `host_shape`, if the host takes no other."""
        return None

    def sampled(self, inputs: Tensor, tokens: Tensor, valid: Tensor | None = None, **how: Any) -> MaskSample:
        """The sampler's result for the host's input and the tokens of its tokenizer, in training and in evaluation."""
        if valid is not None:
            how["valid"] = valid
        if self.sampler.uses_video:
            how["video"] = self.as_video(inputs)
        if (grid := self.grid_of(inputs)) is not None:
            how["grid_size"] = grid
        sample: MaskSample = self.sampler(self.scored(tokens), **how)
        return sample

    def install(self, sampler: TokenSampler, sampling_weight: float, settings: Mapping[str, Any] | None = None) -> None:
        """Adds the sampler and patches the submodules. The class of the model is exchanged already.

        Args:
            sampler: the sampler; it is moved to the device, dtype and mode of the tokenizer.
            sampling_weight: weight of the sampling loss.
            settings: mask_ratio and network, from which a new process can rebuild the sampler; None for a sampler that
                the user built.
        """
        for name, mixin in self.patched_submodules.items():
            module = self.get_submodule(name)
            module.__class__ = patched_type(type(module), mixin)
        weight = next(self.get_submodule(self.tokenizer).parameters())
        self.sampler = sampler.to(device=weight.device, dtype=weight.dtype).train(self.training)
        self.sampling_weight = sampling_weight

    def remove(self) -> None:
        """Undoes `install` and the exchange of classes."""
        for module in self.patched_modules():
            for attribute in ("_use", "_keep", "_kept"):
                module.__dict__.pop(attribute, None)
            module.__class__ = module.host_class  # type: ignore[assignment]
        self._modules.pop("sampler", None)
        for attribute in ("sampling_weight", "last_step", "_use"):
            self.__dict__.pop(attribute, None)
        self.__class__ = self.host_class  # type: ignore[assignment]

    @contextmanager
    def masking(
        self, video: Tensor, mask: Tensor | MaskSample | None, valid: Tensor | None = None
    ) -> Iterator[MaskSample]:
        """A context for one forward of the host: draws the mask, or takes the given one, and caches the tokens.

        Raises:
            ValueError: there is no mask in evaluation, or the mask does not fit.
            HostInterfaceError: a patched submodule was replaced; or the host's forward did not call the tokenizer, or
                did not use the mask or compute its loss exactly once.
            RuntimeError: another forward is under way, in another thread.
        """
        if mask is None and not self.training:
            raise ValueError(
                f"{type(self).__name__} is in evaluation mode and got no mask; a fresh mask for every call would give "
                "another result each time. Pass one, such as mask = model.draw_mask(inputs), or call model.train()."
                + self.mask_hint
            )
        if mask is not None and self.training and not torch.compiler.is_compiling():
            warnings.warn(
                f"a patched {type(self).__name__} got a mask in training, so this step uses it and not its sampler's "
                "mask. Leave the mask out of the batch.",
                stacklevel=6,  # the caller of model(...)
            )
        if self.training and not torch.compiler.is_compiling():
            self._warn_if_frozen()
        if self._use is not None:
            raise RuntimeError(
                f"a forward of this patched {type(self).__name__} is under way, in another thread or from within. The "
                "module holds the mask of one forward at a time. Give each thread a copy.deepcopy of the model."
            )
        submodules = [self._patched_submodule(name) for name in self.patched_submodules]
        tokenizers = [each for each in submodules if isinstance(each, CachedTokenizer)]  # one, or none
        try:
            for each in tokenizers:
                each._keep = True
            tokens = self.tokenize(video)
            for each in tokenizers:
                each._keep = False
            sample = self.sampled(video, tokens, valid, mask=mask)
            use = self._use = MaskUse(self.host_class, self.masks_in, sample, self.sampler.mask_ratio)
            use.handed = sample.mask
            for module in submodules:
                module._use = use
            self.remember(sample)
            yield sample
            if any(each._kept is not None for each in tokenizers):
                raise HostInterfaceError(
                    f"the forward of {self.host_class.__name__} was expected to call {self.tokenizer}, and did not. "
                    "The patch knows another version of this model."
                )
            use.check(self.computes_loss)
        finally:
            self._use = None
            for module in submodules:
                module._use = None
            for each in tokenizers:
                each._keep, each._kept = False, None

    def _warn_if_frozen(self) -> None:
        if self in _WARNED_OF_FROZEN or any(each.requires_grad for each in self.sampler.parameters()):
            return
        if next(self.sampler.parameters(), None) is not None:
            _WARNED_OF_FROZEN.add(self)
            warnings.warn(
                f"the sampler of this {type(self).__name__} has no trainable parameter, so its masks learn nothing. "
                'For LoRA pass LoraConfig(modules_to_save=["sampler"]); otherwise '
                "model.sampler.requires_grad_(True).",
                stacklevel=7,  # the caller of model(...)
            )

    def patched_modules(self) -> list[PatchedSubmodule]:
        """The patched submodules, even inside wrappers that were added later (activation checkpointing, FSDP)."""
        inside = (module for name in self.patched_submodules for module in self.get_submodule(name).modules())
        return list(dict.fromkeys(module for module in inside if isinstance(module, PatchedSubmodule)))

    def _patched_submodule(self, name: str) -> PatchedSubmodule:
        for module in self.get_submodule(name).modules():
            if isinstance(module, self.patched_submodules[name]):
                return module
        found = type(self.get_submodule(name)).__name__
        raise HostInterfaceError(
            f"{name} of this patched {self.host_class.__name__} was replaced by a {found} that is not patched. "
            "unpatch(model), then patch it again."
        )

    @property
    def current(self) -> MaskSample:
        """The mask of the forward that is under way.

        Raises:
            HostInterfaceError: no forward is under way; a submodule or method of the host was called by itself.
        """
        return self.mask_use.sample

    @property
    def mask_use(self) -> MaskUse:
        """The record of the forward that is under way, see `current`."""
        if self._use is None:
            raise HostInterfaceError(
                f"a method of a patched {self.host_class.__name__} was called by itself, without a mask. Call the "
                "model as a whole, model(inputs). For features of all tokens use the host's encoder class, or "
                "unpatch(model)."
            )
        return self._use

    def check_ratio(self, mask_ratio: float | None) -> None:
        """Raises ValueError if a call asks for a ratio other than that of the sampler."""
        if mask_ratio is not None and abs(mask_ratio - self.sampler.mask_ratio) > 1e-9:
            raise ValueError(
                f"the call asks for mask_ratio={mask_ratio}, but the model was patched for {self.sampler.mask_ratio}. "
                f"Leave the ratio out of the call, or patch(model, mask_ratio={mask_ratio}) before training."
            )

    def total(
        self,
        reconstruction: Tensor,
        sampling: Callable[[Tensor], Tensor] | None = None,
        *,
        token_error: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """The host's loss. In training the loss of the sampler is added, if the sampler learns.

        That is the sampling loss for a mask with log-probabilities, and `ranking_loss` for one with difficulties. With
        invalid tokens the mean of `token_error` over the others takes the place of the host's loss.

        Args:
            reconstruction: scalar, the host's own loss.
            sampling: log-probabilities [B, N] -> L_S, for hosts that give no errors of single tokens.
            token_error: () -> the errors of the masked tokens [B, M], of which the host's loss is the mean; instead of
                `sampling`. They have a gradient unless it is off.

        Raises:
            TypeError: neither `sampling` nor `token_error` is given, or both are.
            HostInterfaceError: the host gave no loss, or one already.
        """
        if not isinstance(reconstruction, Tensor):
            raise HostInterfaceError(
                f"the forward of {self.host_class.__name__} was expected to compute a loss, and gave {reconstruction}, "
                "so the sampler cannot learn. unpatch(model), and see why."
            )
        if (sampling is None) == (token_error is None):
            raise TypeError("total takes either sampling or token_error, and got neither or both.")
        self.mask_use.note_loss()
        sample = self.current
        if self._errors is not None:
            self._errors.append(token_error() if token_error else errors_by_gradient(cast(Any, sampling), sample))
        counted = target_valid(sample)
        learns = self.training and (sample.difficulty is not None or sample.log_probs is not None)
        error: Tensor | None = None
        if token_error is not None and (learns or counted is not None):
            with torch.set_grad_enabled(torch.is_grad_enabled() and counted is not None):
                error = token_error()
            if counted is not None:
                if reconstruction.requires_grad and not error.requires_grad:
                    raise TypeError("token_error gave errors without a gradient, of which the loss is to be the mean.")
                reconstruction = error.where(counted, 0).sum() / counted.sum()
        if not learns:
            self.remember(sample, reconstruction)
            return reconstruction
        if sampling is not None and sample.difficulty is not None:
            error = errors_by_gradient(sampling, sample)
        if sample.difficulty is not None:
            loss = ranking_loss(sample, cast(Tensor, error))
        elif sampling is not None:
            loss = sampling(cast(Tensor, sample.log_probs))
        else:
            loss = sampling_loss(sample, cast(Tensor, error))
        self.remember(sample, reconstruction, loss)
        return reconstruction + self.sampling_weight * loss

    def remember(
        self, sample: MaskSample, reconstruction: Tensor | None = None, sampling: Tensor | None = None
    ) -> None:
        """Keeps the mask and the losses in `last_step`, for logging."""
        losses = (None if each is None else each.detach() for each in (reconstruction, sampling))
        self.last_step = LastStep(sample.detach(), *losses)


def default_ratio(model: nn.Module) -> float | None:
    """The default mask_ratio of the host's forward; None if the forward has no default."""
    default = inspect.signature(model.forward).parameters["mask_ratio"].default
    return default if isinstance(default, float) else None


_WARNED_OF_FROZEN: WeakSet[AdaptiveHost] = WeakSet()
_RENAMED_ATTRIBUTES = {"seams": "expected_interface", "parts": "patched_submodules", "describe": "host_shape"}
_RENAMED_CLASSES = {
    "HandedOnTokens": "CachedTokenizer",
    "Part": "PatchedSubmodule",
    "SeamError": "HostInterfaceError",
}


def __getattr__(name: str) -> Any:
    if name in _RENAMED_CLASSES:
        raise ImportError(f"{__name__}.{name} is now called {_RENAMED_CLASSES[name]}.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
