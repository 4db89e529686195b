"""Features of a frozen encoder, and a cache of them on disk."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from adamae_sampler.models import VideoClassifier, load_checkpoint
from common.checkpoint_header import ends_with_norm, size_note, stated_sizes
from common.models import CLASSIFIERS, create_model
from common.report import describe_clips
from evaluation.multi_view import map_views
from evaluation.settings import FeatureSettings, Pool
from video_data.datasets import VideoDataset
from video_data.sources import random_view_source, view_source
from video_data.video_files import VideoError
from video_data.views import ViewSource


def frozen_encoder(
    settings: FeatureSettings, pool: Pool, accelerator: Accelerator, random_clips: int = 0
) -> Callable[[Tensor], Tensor]:
    """A function from normalised clips [B, C, T, H, W] to features [B, D], or [B, N, D] for `pool` "none".

    With pre-trained weights, features are the encoder's tokens (after its last norm, if it has one) or their mean. With
    a classifier, features are its tokens or the input of its head.

    Raises:
        FileNotFoundError, TypeError, ValueError: as `load_checkpoint`.
    """
    fine_tuned = "num_classes" in stated_sizes(settings.need_checkpoint())
    norm = ends_with_norm(settings.checkpoint)
    sizes = settings.sizes()
    model: VideoClassifier = create_model(settings.model, CLASSIFIERS, num_classes=0, encoder_norm=norm, **sizes)
    report = load_checkpoint(model, settings.checkpoint, only="" if fine_tuned else "encoder.")
    if accelerator.is_main_process:
        views = f"{settings.clips} clips x {settings.crops} crops of a video"
        views = f"{random_clips} random clips of a video" if random_clips else views
        print(f"{'clips':>13}  {describe_clips(settings)}, {views}")
        print(f"{'weights':>13}  {settings.checkpoint}: {report}{size_note(settings.checkpoint, settings)}")
    model.to(accelerator.device).eval()

    def features(views: Tensor) -> Tensor:
        tokens = model.forward_features(views)
        if pool == "none":
            return tokens
        return model.forward_head(tokens, pre_logits=True) if fine_tuned else tokens.mean(1)

    return features


@dataclass(frozen=True)
class Features:
    """Features of the videos that could be read, in the order of the data set.

    Attributes:
        index: [V] positions of the videos in the data set.
        label: [V] labels of the videos.
        values: features of the whole data set, [videos, D] or [videos, N, D], fp32 or fp16, may be memory-mapped; with
            random clips [videos, R, D] or [videos, R, N, D].
        left_out: messages about the videos that could not be read.
        random_clips: R, random clips of each video; 0 if the features are of fixed views.
    """

    index: Tensor
    label: Tensor
    values: Tensor
    left_out: list[str]
    random_clips: int = 0

    def take(self, rows: Tensor) -> Tensor:
        """The features of some of the V videos; of each a random one of its random clips, by torch's generator."""
        places = self.index[rows]
        if not self.random_clips:
            return self.values[places]
        return self.values[places, torch.randint(self.random_clips, rows.shape)]


def cached_features(
    settings: FeatureSettings,
    data: VideoDataset,
    pool: Pool,
    folder: Path,
    accelerator: Accelerator,
    random_clips: int = 0,
) -> Features:
    """The features of a data set, read from `folder`. Features that are not there are computed and written first.

    The name of the cache holds a hash of the weights, videos and settings, so stale features are never read. Every
    process writes its own rows of the file, so features may be larger than the memory.

    Args:
        settings: the encoder, and the fixed views.
        data: the videos.
        pool: see `frozen_encoder`.
        folder: where features are kept.
        accelerator: devices and processes.
        random_clips: random clips of each video instead of the fixed views; 0 for those.

    Raises:
        ValueError: random clips of sprites.
        VideoError: no video could be read.
    """
    source = (
        random_view_source(data, settings, random_clips)
        if random_clips
        else view_source(data, settings, settings.clips, settings.crops)
    )
    name, nature = _name(settings, data, pool, random_clips)
    place = folder / name
    if not place.is_dir():
        encoder = frozen_encoder(settings, pool, accelerator, random_clips)
        aside = folder / f"{name}.partial"
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        accelerator.wait_for_everyone()
        left_out = _write(aside, encoder, settings, data, source, pool, accelerator, random_clips)
        if len(left_out) == len(data):
            raise VideoError("no video could be read:\n  " + "\n  ".join(left_out[:8]))
        if accelerator.is_main_process:
            text = json.dumps({**nature, "left_out": left_out}, indent=2, ensure_ascii=False)
            (aside / "about.json").write_text(text + "\n", encoding="utf-8")
            os.replace(aside, place)
        accelerator.wait_for_everyone()
    elif accelerator.is_main_process:
        print(f"{'features':>13}  {data.name}: kept from before in {place}")
    label = torch.from_numpy(np.load(place / "label.npy"))
    # Memory-mapped; copy-on-write, because torch expects writable memory.
    values = torch.from_numpy(np.load(place / "values.npy", mmap_mode="c"))
    index = (label >= 0).nonzero()[:, 0]
    left_out = json.loads((place / "about.json").read_text(encoding="utf-8"))["left_out"]
    return Features(index, label[index], values, left_out, random_clips)


def _name(
    settings: FeatureSettings, data: VideoDataset, pool: Pool, random_clips: int
) -> tuple[str, dict[str, object]]:
    """The name of the cache, and the values that its hash covers."""
    names = {each.name for each in fields(FeatureSettings)} - {"batch_size", "workers", "checkpoint", "seed"}
    nature: dict[str, object] = {name: value for name, value in settings.plain().items() if name in names}
    nature |= {
        "data": data.name,
        "pool": pool,
        "videos": data.fingerprint(),
        "weights": _hash_file(settings.need_checkpoint()),
    }
    if random_clips:
        nature |= {"random_clips": random_clips, "seed": settings.seed}
        del nature["clips"], nature["crops"]
    digest = hashlib.sha256(json.dumps(nature, sort_keys=True).encode()).hexdigest()
    return f"{Path(data.name).stem.replace(':', '-')}-{digest[:16]}", nature


def _hash_file(checkpoint: str) -> str:
    path = Path(checkpoint)
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}.")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _write(
    folder: Path,
    encoder: Callable[[Tensor], Tensor],
    settings: FeatureSettings,
    data: VideoDataset,
    source: ViewSource,
    pool: Pool,
    accelerator: Accelerator,
    random_clips: int,
) -> list[str]:
    """Writes values.npy and label.npy (-1 where a video could not be read); returns messages about the others."""
    with torch.no_grad():
        probe = encoder(torch.zeros(1, 3, settings.num_frames, *settings.img_size, device=accelerator.device))
    dtype = np.float16 if pool == "none" else np.float32
    shape = (len(data), *([random_clips] if random_clips else []), *probe.shape[1:])
    if accelerator.is_main_process:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        print(f"{'features':>13}  {data.name}: computing {len(data)} videos, {_size(size)} into {folder.parent}")
        np.lib.format.open_memmap(folder / "values.npy", "w+", dtype, shape).flush()
        np.lib.format.open_memmap(folder / "label.npy", "w+", np.int64, (len(data),))[:] = -1
    accelerator.wait_for_everyone()
    values, label = (np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("values", "label"))
    left_out: list[str] = []
    merge = not random_clips
    for batch in map_views(encoder, source, accelerator, settings.batch_size, settings.readers, merge):
        left_out += batch.left_out
        if len(batch.index):
            values[batch.index.numpy()] = batch.value.cpu().numpy().astype(dtype)
            label[batch.index.numpy()] = batch.label.numpy()
    values.flush()
    label.flush()
    return sorted(gather_object(left_out))


def _size(number: int) -> str:
    """Bytes as text."""
    return f"{number / 2**20:.1f} MiB" if number >= 2**20 else f"{number / 2**10:.1f} KiB"
