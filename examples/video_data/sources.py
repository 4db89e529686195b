"""The clips and views of a data set: what training and evaluation read."""

from __future__ import annotations

from common.settings import EncoderSettings
from video_data.clips import ClipSource, SpriteClips, VideoClips
from video_data.datasets import VideoDataset
from video_data.sprites import Sprites
from video_data.transforms import PretrainTransform, Transform
from video_data.views import RandomViews, VideoViews, ViewSource


def clip_source(data: VideoDataset, settings: EncoderSettings, transform: Transform, repeats: int) -> ClipSource:
    """Clips for training, `repeats` of each video; `transform` crops and augments videos, not sprites."""
    if data.sprites is not None:
        return SpriteClips(Sprites.of(data.sprites), repeats)
    return VideoClips(data.entries, settings.num_frames, settings.stride, transform, settings.sampling, repeats)


def view_source(data: VideoDataset, settings: EncoderSettings, clips: int, crops: int) -> ViewSource:
    """Fixed views for evaluation; a sprite has one."""
    if data.sprites is not None:
        return SpriteClips(Sprites.of(data.sprites))
    return VideoViews(
        data.entries, settings.num_frames, settings.stride, settings.img_size, settings.sampling, clips, crops
    )


def random_view_source(data: VideoDataset, settings: EncoderSettings, clips: int) -> ViewSource:
    """Random clips of each video, cropped by MultiScaleCrop. Raises ValueError for sprites, which have one clip."""
    if data.sprites is not None:
        raise ValueError(f"{data.name}: a sprite has one clip, and no random ones; leave random clips out.")
    transform = PretrainTransform(settings.img_size, flip=False)
    source = VideoClips(data.entries, settings.num_frames, settings.stride, transform, settings.sampling)
    return RandomViews(source, clips, settings.seed)
