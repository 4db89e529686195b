"""What all patched hosts share: how a mask is drawn for the host's own forward, and what the losses become.

A patched model is an instance of a class made of two: a file's mixin here and the host's class. The mixin holds the
difference alone; the host's forward, whatever its version, still runs.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from adamae_sampler.mask import MaskSample
from adamae_sampler.sampler import GridSize, TokenSampler


class SeamError(TypeError):
    """A host lacks what its patch holds on to: another version, or a model of another kind with the same name."""


class HostShape(NamedTuple):
    """What a sampler must know of a host.

    Attributes:
        embed_dim: D, width of its tokens.
        grid_size: (T, H, W) of its tokens; T is 1 for images.
        mask_ratio: share of tokens that it masks by itself; None if it is told by its data loader.
    """

    embed_dim: int
    grid_size: GridSize
    mask_ratio: float | None = None


class LastStep(NamedTuple):
    """The latest forward of a patched model, without gradients.

    Attributes:
        sample: the mask.
        reconstruction: scalar, the host's own loss; None if the host leaves its loss to the training engine.
        sampling: scalar, L_S before its weight; None in evaluation, for masks without a distribution, and as above.
    """

    sample: MaskSample
    reconstruction: Tensor | None = None
    sampling: Tensor | None = None


class Patched(nn.Module):
    """A module whose class was exchanged; deepcopy and pickle know how to make the class again."""

    host_class: ClassVar[type[nn.Module]]  # the class before
    mixin: ClassVar[type[Patched]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """What `type(patched)(...)` makes is a host, not patched: there are no settings to patch it with."""
        self.__class__ = self.host_class  # type: ignore[assignment]
        self.__init__(*args, **kwargs)  # type: ignore[misc]

    def __reduce__(self) -> tuple[Any, ...]:
        get_state = getattr(self, "__getstate__", None)  # object has one from Python 3.11 on
        return _empty, (self.host_class, self.mixin), get_state() if get_state else self.__dict__


def _empty(host_class: type[nn.Module], mixin: type[Patched]) -> nn.Module:
    patched = patched_type(host_class, mixin)
    return cast(nn.Module, patched.__new__(patched))


def patched_type(host_class: Any, mixin: Any) -> Any:
    """The class of two, the same for every call. It has the host's name, by which libraries recognise their models."""
    found = _TYPES.get((host_class, mixin))
    if found is None:
        names = ("__module__", "__qualname__", "__doc__")
        body = {**{name: getattr(host_class, name) for name in names}, "host_class": host_class, "mixin": mixin}
        found = _TYPES[host_class, mixin] = type(host_class.__name__, (mixin, host_class), body)
    return found


_TYPES: WeakValueDictionary[tuple[Any, Any], Any] = WeakValueDictionary()


class Part(Patched):
    """Mixin of a submodule; for the time of a forward it knows the mask."""

    _sample: MaskSample | None = None


class HandedOnTokens(Part):
    """Mixin of a host's tokenizer. Modifications:

    - tokens that were computed for the sampler are given to the host's forward, not computed again.

    They are kept before forward hooks see them, so that hooks which change tokens do so once; each is called twice.
    """

    _keep = False  # while the sampler's tokens are made
    _kept: tuple[Any, Tensor] | None = None  # the input, and its tokens

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The host's arguments -> the host's tokens."""
        kept, self._kept = self._kept, None
        if kept is not None:
            if kept[0] is x:
                return kept[1]
            if not torch.compiler.is_compiling():
                warnings.warn(
                    f"the forward of a patched model gives its {type(self).__name__} another tensor than it got itself "
                    "(does it normalise?), so tokens are computed twice, and the sampler scores those of the input.",
                    stacklevel=2,
                )
        tokens: Tensor = super().forward(x, *args, **kwargs)
        if self._keep:
            self._kept = x, tokens
        return tokens


class AdaptiveHost(Patched):
    """Base of all mixins: the sampler, the mask of a forward, and the loss.

    Attributes:
        names: of the host's classes; subclasses of them are taken too.
        seams: what the mixin holds on to: dotted names with the first parameters of a method, or with a type.
        tokenizer: dotted name of the submodule that makes the tokens.
        parts: dotted names of the submodules that are patched too, with their mixins.
        sampler: the sampler, a submodule, so that its parameters are trained and saved with the host's.
        sampling_weight: of the sampling loss, in training; in evaluation the host's loss stays alone.
        overrides: the host's methods that the mixin has too, beside those among the seams.
        computes_loss: whether the host's forward does; else the loss is AdaMAELoss's, in the training engine.
        last_step: the latest mask and losses, for logging and pictures.
    """

    names: ClassVar[tuple[str, ...]]
    seams: ClassVar[Mapping[str, tuple[str, ...] | type]]
    tokenizer: ClassVar[str] = "patch_embed"
    parts: ClassVar[Mapping[str, type[Part]]] = {"patch_embed": HandedOnTokens}

    overrides: ClassVar[tuple[str, ...]] = ()
    computes_loss: ClassVar[bool] = True

    sampler: TokenSampler
    sampling_weight: float
    last_step: LastStep | None = None
    _sample: MaskSample | None = None

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Whether a model of a matching name is this host; for names that hosts share."""
        return True

    @staticmethod
    def describe(model: Any) -> HostShape:
        """The shape of an unpatched host; each host's file has its own."""
        raise SeamError(f"the mixin for {type(model).__name__} has no describe(model), which gives its HostShape.")

    @staticmethod
    def probe(model: Any) -> None:
        """Raises SeamError where names and parameters do not tell enough."""

    def tokenize(self, video: Tensor) -> Tensor:
        """The host's input -> the tokens as its tokenizer makes them, before positions, as in the paper."""
        return cast(Tensor, self.get_submodule(self.tokenizer)(video))

    def scored(self, tokens: Tensor) -> Tensor:
        """The tokenizer's tokens -> those that the sampler scores [B, N, D]."""
        return tokens

    def draw_mask(self, video: Tensor, generator: torch.Generator | None = None) -> MaskSample:
        """A mask for the host's input, such as evaluation needs: draw it once, then pass it to every forward."""
        return self.sampler(self.scored(self.tokenize(video)), generator=generator)

    def install(self, sampler: TokenSampler, sampling_weight: float, settings: Mapping[str, Any] | None = None) -> None:
        """Puts the sampler in place; the class is this one already.

        Args:
            sampler: the sampler, which gets the device, dtype and mode of the tokenizer.
            sampling_weight: of the sampling loss.
            settings: mask_ratio and network from which a fresh process could build the sampler; None for one's own.
        """
        for name, mixin in self.parts.items():
            part = self.get_submodule(name)
            part.__class__ = patched_type(type(part), mixin)
        weight = next(self.get_submodule(self.tokenizer).parameters())
        self.sampler = sampler.to(device=weight.device, dtype=weight.dtype).train(self.training)
        self.sampling_weight = sampling_weight

    def remove(self) -> None:
        """Undoes `install`, and the exchange of classes."""
        for part in self.patched_parts():
            for attribute in ("_sample", "_keep", "_kept"):
                part.__dict__.pop(attribute, None)
            part.__class__ = part.host_class  # type: ignore[assignment]
        self._modules.pop("sampler", None)
        for attribute in ("sampling_weight", "last_step", "_sample"):
            self.__dict__.pop(attribute, None)
        self.__class__ = self.host_class  # type: ignore[assignment]

    @contextmanager
    def masking(self, video: Tensor, mask: Tensor | MaskSample | None) -> Iterator[MaskSample]:
        """A forward of the host: draws its mask, or takes the given one, and hands the tokens on.

        Raises:
            ValueError: no mask in evaluation, or one that does not fit.
            SeamError: a part was replaced, or the host's forward did not ask for tokens.
            RuntimeError: another forward is under way, in another thread.
        """
        if mask is None and not self.training:
            raise ValueError(
                f"{type(self).__name__} is in evaluation mode and got no mask; a fresh one for every call would give "
                "another result each time. Pass one, such as mask = model.draw_mask(inputs), or call model.train()."
            )
        if mask is not None and self.training and not torch.compiler.is_compiling():
            warnings.warn(
                f"a patched {type(self).__name__} got a mask in training, so this step uses it and not its sampler's "
                "mask. Leave the mask out of the batch.",
                stacklevel=6,  # the caller of model(...)
            )
        if self._sample is not None:
            raise RuntimeError(
                f"a forward of this patched {type(self).__name__} is under way, in another thread or from within; it "
                "keeps its mask on the module. Give each thread a copy.deepcopy of the model."
            )
        parts = [self._part(name) for name in self.parts]
        tokenizers = [part for part in parts if isinstance(part, HandedOnTokens)]  # one, or none
        try:
            for each in tokenizers:
                each._keep = True
            tokens = self.tokenize(video)
            for each in tokenizers:
                each._keep = False
            sample: MaskSample = self.sampler(self.scored(tokens), mask=mask)
            self._sample = sample
            for part in parts:
                part._sample = sample
            self.remember(sample)
            yield sample
            if any(each._kept is not None for each in tokenizers):
                raise SeamError(
                    f"the forward of {self.host_class.__name__} was expected to call {self.tokenizer}, and did not: it "
                    "is of another version than the patch knows."
                )
        finally:
            self._sample = None
            for part in parts:
                part._sample = None
            for each in tokenizers:
                each._keep, each._kept = False, None

    def patched_parts(self) -> list[Part]:
        """The patched submodules, which something may have wrapped since (activation checkpointing, FSDP)."""
        inside = (module for name in self.parts for module in self.get_submodule(name).modules())
        return list(dict.fromkeys(module for module in inside if isinstance(module, Part)))

    def _part(self, name: str) -> Part:
        for module in self.get_submodule(name).modules():
            if isinstance(module, self.parts[name]):
                return module
        found = type(self.get_submodule(name)).__name__
        raise SeamError(
            f"{name} of this patched {self.host_class.__name__} was replaced by a {found} that is not patched. "
            "unpatch(model), then patch it again."
        )

    @property
    def current(self) -> MaskSample:
        """The mask of the forward that is under way.

        Raises:
            SeamError: there is none, since a part of the host was called by itself.
        """
        if self._sample is None:
            raise SeamError(
                f"a part of a patched {self.host_class.__name__} was called by itself, without a mask. Call the model "
                "as a whole, model(inputs); for features of all tokens use the host's encoder class, or unpatch(model)."
            )
        return self._sample

    def check_ratio(self, mask_ratio: float | None) -> None:
        """Raises ValueError if a call asks for another ratio than the sampler was built for."""
        if mask_ratio is not None and abs(mask_ratio - self.sampler.mask_ratio) > 1e-9:
            raise ValueError(
                f"the call asks for mask_ratio={mask_ratio}, but the model was patched for {self.sampler.mask_ratio}. "
                f"Call it with that or without a ratio, or patch(model, mask_ratio={mask_ratio}) before training."
            )

    def total(self, reconstruction: Tensor, sampling: Callable[[Tensor], Tensor]) -> Tensor:
        """The host's loss with the sampling loss added, in training and where there is a distribution.

        Args:
            reconstruction: scalar, the host's own loss.
            sampling: log-probabilities [B, N] -> L_S.
        """
        sample = self.current
        if sample.log_probs is None or not self.training:
            self.remember(sample, reconstruction)
            return reconstruction
        loss = sampling(sample.log_probs)
        self.remember(sample, reconstruction, loss)
        return reconstruction + self.sampling_weight * loss

    def remember(
        self, sample: MaskSample, reconstruction: Tensor | None = None, sampling: Tensor | None = None
    ) -> None:
        """Keeps the step for whoever logs it."""
        plain = MaskSample(*(None if each is None else each.detach() for each in sample))  # type: ignore[arg-type]
        losses = (None if each is None else each.detach() for each in (reconstruction, sampling))
        self.last_step = LastStep(plain, *losses)


def default_ratio(model: nn.Module) -> float | None:
    """The mask_ratio that the host's forward takes if it is told none."""
    default = inspect.signature(model.forward).parameters["mask_ratio"].default
    return default if isinstance(default, float) else None
