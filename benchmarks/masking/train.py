"""Training of a tiny masked autoencoder: no data loader, and on a GPU the step is one CUDA graph."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from adamae_sampler.models import AdaMAE
from adamae_sampler.networks import init_linear_layers
from benchmarks.masking.clips import FINE, Cut, Labelled

Loss = Callable[[Tensor], Tensor]  # of a batch of video
_BETAS, _DECAY = (0.9, 0.95), 0.05
_WARM_UP = 0.1  # share of the steps
_LONGEST = 100.0  # wavelength of a position, over 2 pi tokens
_SIDE_STEPS = 3  # before a capture: libraries choose kernels in them


@dataclass(frozen=True)
class Setting:
    """What all arms of a size share.

    Attributes:
        steps: optimiser steps.
        batch: clips of a step.
        lr: the largest learning rate.
        mask_ratio: share of tokens masked.
        clips: generated for pre-training.
        probe_clips: generated for the fit of the readout, and as many for its test.
        model: sizes of the model.
        cut: where the clips come from, and how they are cut into tokens.
        few: clips with labels that the encoder is fine-tuned on.
        few_steps: optimiser steps of that.
        few_lr: its largest learning rate.
    """

    steps: int
    batch: int
    lr: float
    mask_ratio: float
    clips: int
    probe_clips: int
    model: dict[str, int]
    cut: Cut = FINE
    few: int = 64
    few_steps: int = 100
    few_lr: float = 1e-3


def build(setting: Setting, seed: int, arguments: dict[str, Any]) -> AdaMAE:
    """The model of an arm. A seed fixes encoder and decoder, whatever the sampler.

    Args:
        setting: sizes, and the masking ratio.
        seed: of the initial weights.
        arguments: of `AdaMAE`; `masking` may also be a function of the setting that makes a sampler.
    """
    if not isinstance(masking := arguments["masking"], str):
        torch.manual_seed(seed)
        arguments = {**arguments, "masking": masking(setting)}
    torch.manual_seed(seed)  # again; the model initialises a sampler of its own last
    cut = setting.cut
    frames = {"img_size": (cut.height, cut.width), "num_frames": cut.frames}
    tokens = {"patch_size": cut.patch, "tubelet_size": cut.tubelet}
    pixels = {"in_chans": cut.channels, "mean": (0.5,) * cut.channels, "std": (0.25,) * cut.channels}
    model = _AsAsked(**{**frames, **tokens, **pixels, **setting.model, "mask_ratio": setting.mask_ratio, **arguments})
    model.encoder.pos_embed.copy_(place_table(model.size.grid, model.encoder.pos_embed.shape[-1]))
    model.decoder_pos_embed.copy_(place_table(model.size.grid, model.decoder_pos_embed.shape[-1]))
    return model


class _AsAsked(AdaMAE):
    """The model with the initial weights that all rows have had since the question was fixed, for each seed."""

    def init_weights(self) -> None:
        """Xavier's weights for the projection to the decoder too."""
        init_linear_layers(self)
        trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)


def place_table(grid: tuple[int, int, int], width: int) -> Tensor:
    """[1, N, D] sinusoids of time, row and column apart, so that the same place at another time looks alike.

    The reference model's table is of the token's number alone.
    """
    across = 3 * width // 16 * 2  # of rows, and of columns; time has the rest
    tables = []
    for place, own in zip(
        torch.meshgrid(*map(torch.arange, grid), indexing="ij"), (width - 2 * across, across, across), strict=True
    ):
        frequency = _LONGEST ** -torch.linspace(0, 1, own // 2 + 1)[:-1]
        angle = place.reshape(-1, 1) * frequency
        tables += [angle.sin(), angle.cos()]
    return torch.cat(tables, 1)[None]


def pretrain(model: AdaMAE, loss: Loss, data: Labelled, setting: Setting, seed: int) -> Iterator[int]:
    """Trains the model in place; yields the number of steps done, after each.

    Args:
        model: on its device.
        loss: of the model, for a batch of video.
        data: clips, on the same device.
        setting: of the run.
        seed: of the order of the clips, and of the masks.
    """
    return _train(model, lambda video, _: loss(video), data, setting, seed)


def supervise(model: AdaMAE, head: nn.Linear, data: Labelled, setting: Setting, seed: int) -> Iterator[int]:
    """Trains the encoder and a head in place on "this token belongs to what moves"; yields as `pretrain`."""

    def forward(video: Tensor, moving: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(head(features(model, video))[..., 0], moving.float())

    return _train(nn.ModuleList([model.encoder, head]), forward, data, setting, seed)


def fine_tune(model: AdaMAE, few: Labelled, setting: Setting, seed: int) -> Callable[[Tensor], Tensor]:
    """A copy of the encoder, trained on few labelled clips. The model stays as it is.

    Returns:
        A function [B, C, T, H, W] -> [B, N], larger where a token is likelier to belong to what moves.
    """
    torch.manual_seed(seed)
    tuned = copy.deepcopy(model)
    head = nn.Linear(model.encoder.pos_embed.shape[-1], 1).to(few.video.device)
    for _ in supervise(tuned, head, few, setting, seed):
        pass
    return lambda video: head(features(tuned, video))[..., 0]


def features(model: AdaMAE, video: Tensor) -> Tensor:
    """[B, C, T, H, W] -> the encoder's output for all tokens, [B, N, D]."""
    encoded: Tensor = model.encoder(model.encoder.patch_embed(video))
    return encoded


def _train(
    model: nn.Module, forward: Callable[[Tensor, Tensor], Tensor], data: Labelled, setting: Setting, seed: int
) -> Iterator[int]:
    device = data.video.device
    lr = torch.zeros((), device=device)
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr if on_gpu else 0.0, betas=_BETAS, weight_decay=_DECAY, fused=True, capturable=on_gpu
    )
    chosen = torch.zeros(setting.batch, dtype=torch.int64, device=device)

    def step() -> None:
        forward(data.video[chosen], data.moving[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    passes = math.ceil(setting.steps * setting.batch / len(data))
    places = torch.cat([torch.randperm(len(data), generator=order) for _ in range(passes)])
    model.train()
    run = _Graphed(step) if on_gpu else step
    for done, mine in enumerate(places.split(setting.batch)[: setting.steps]):
        chosen.copy_(mine)
        for group in optimizer.param_groups:
            if on_gpu:
                group["lr"].fill_(learning_rate(setting, done))
            else:
                group["lr"] = learning_rate(setting, done)
        run()
        yield done + 1
    model.eval()


def learning_rate(setting: Setting, done: int) -> float:
    """A linear warm-up, then a cosine to zero."""
    warm = max(1, round(_WARM_UP * setting.steps))
    if done < warm:
        return setting.lr * (done + 1) / warm
    return setting.lr * (1 + math.cos(math.pi * (done - warm) / max(1, setting.steps - warm))) / 2


class _Graphed:
    """A step that is captured after a few calls, and replayed from then on."""

    def __init__(self, step: Callable[[], None]) -> None:
        self._step, self._calls = step, 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        self._calls += 1
        if self._calls <= _SIDE_STEPS:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._step()
            torch.cuda.current_stream().wait_stream(stream)
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._step()
        self._graph.replay()
