"""How many clips a core reads in a second: files and shards, by PyAV, torchcodec and decord, beside a training step.

    pip install torchcodec decord && python -m benchmarks.loader        # about six minutes

A clip is 16 frames at a stride of 4 from a random place of a 10-second video, cropped and resized to 224 x 224 as in
pre-training. Every decoder gives the same frames, within rounding, before any time is taken; all take turns, each on
one core. torchcodec brings no FFmpeg; where the machine has none it is lent the libraries of PyAV, so that both decode
with the same code. Rows go to benchmarks/results/loader_cpu.csv.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import io
import os
import re
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import tyro
from torch import Tensor

from benchmarks.core.commit import current_commit
from benchmarks.core.rows import RESULTS, device_name, read_texts, write_rows
from benchmarks.core.timing import Times, take_turns
from benchmarks.pages.cpu import loader_tables
from benchmarks.steps.step import StepCase, cpu_clocks

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from video_data.frame_sampling import random_clip
from video_data.shard_packing import Packing, pack
from video_data.transforms import PretrainTransform
from video_data.video_lists import VideoEntry, list_videos

_CLIP = Path(__file__).parent.parent / "examples" / "clips" / "bigbuckbunny.mp4"
_FRAMES, _STRIDE, _SECONDS, _RATE = 16, 4, 10, 30
_STEP = StepCase("adaptive", 0.95, clips=2, dtype=torch.float32)
_LENT = "ADAMAE_SAMPLER_LENT_FFMPEG"


@dataclass(frozen=True)
class Options:
    """Size of the measurement."""

    videos: int = 8
    """Number of videos read in a turn."""
    size: tuple[int, int] = (720, 1280)
    """Height and width of the files."""
    seconds: float = 240
    """Seconds after which no turn begins."""
    rounds: tuple[int, int] = (5, 15)
    """The fewest turns of each, and the most."""
    step: bool = True
    """Time a training step of ViT-B too."""
    output: Path = RESULTS / "loader_cpu.csv"
    """CSV file for the rows."""


@dataclass(frozen=True)
class Row:
    """One measurement: seconds of a clip, of one core, or of one clip's share of a training step on all cores."""

    what: str
    videos: str
    decoder: str
    version: str
    kib: float | None
    median_s: float
    q1_s: float
    q3_s: float
    clips_per_s: float
    repeats: int
    threads: int
    device: str
    torch: str
    commit: str


Reader = Callable[[VideoEntry, torch.Generator], Tensor]  # [T, C, H, W] uint8


def places(count: int, generator: torch.Generator) -> list[int]:
    """The indices of a clip's frames."""
    return random_clip("dense", count, _FRAMES, _STRIDE, generator)


def read_pyav(entry: VideoEntry, generator: torch.Generator) -> Tensor:
    """Reads a clip as the training scripts do."""
    with entry.open() as video:
        return video.read(places(video.count(), generator))


def read_torchcodec(entry: VideoEntry, generator: torch.Generator) -> Tensor:
    """Reads a clip by the index of the container, without a scan of the file."""
    decoders: Any = importlib.import_module("torchcodec.decoders")
    source = str(entry.path) if entry.span is None else entry.read()
    decoder = decoders.VideoDecoder(source, num_ffmpeg_threads=1, seek_mode="approximate")
    frames: Tensor = decoder.get_frames_at(places(decoder.metadata.num_frames, generator)).data
    return frames


def read_decord(entry: VideoEntry, generator: torch.Generator) -> Tensor:
    """Decord has no wheels for every platform, and none after version 0.6 of 2021."""
    decord: Any = importlib.import_module("decord")
    reader = decord.VideoReader(str(entry.path) if entry.span is None else io.BytesIO(entry.read()), num_threads=1)
    return torch.from_numpy(reader.get_batch(places(len(reader), generator)).asnumpy()).permute(0, 3, 1, 2)


READERS: dict[str, Reader] = {"av": read_pyav, "torchcodec": read_torchcodec, "decord": read_decord}
NAMES = {"av": "PyAV", "torchcodec": "torchcodec", "decord": "decord"}


def write_videos(folder: Path, options: Options) -> None:
    """Videos with a key frame every 250 frames, as they are found: the bundled one enlarged, with grain that moves."""
    height, width = options.size
    with av.open(str(_CLIP)) as source:
        frames = [frame.reformat(width, height, "rgb24").to_ndarray() for frame in source.decode(video=0)]
    draws = np.random.default_rng(0)
    grain = draws.integers(-4, 5, (2 * height, 2 * width, 1), dtype=np.int16)
    folder.mkdir(parents=True)
    for number in range(options.videos):
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=_RATE, options={"g": "250", "preset": "veryfast"})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for index in range(_SECONDS * _RATE):
                top, left = (7 * number + index) % height, (13 * number + 2 * index) % width
                frame = frames[(17 * number + index) % len(frames)] + grain[top : top + height, left : left + width]
                frame = frame.clip(0, 255).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))


def kinds_of_videos(folder: Path, options: Options) -> dict[str, list[VideoEntry]]:
    """The videos in three forms: the original files, shards, and the members of the shards as files."""
    write_videos(folder / "files", options)
    found = list_videos(folder / "files")
    packing = Packing()
    for _ in pack(found, folder / "shards", packing, workers=2):
        pass
    with tarfile.open(folder / "shards" / "shard-000000.tar") as tar:
        tar.extractall(folder / "packed", [member for member in tar if member.name.endswith(".mp4")], filter="data")
    height, width = options.size
    small = f"short side {packing.short_side}, key frames every {packing.keyframe_every}"
    return {
        f"files, {width} x {height}, key frames every 250": found,
        f"files, {small}": list_videos(folder / "packed"),
        f"shards, {small}": list_videos(folder / "shards"),
    }


def check(videos: Mapping[str, Sequence[VideoEntry]], readers: Mapping[str, Reader]) -> None:
    """Raises AssertionError if a decoder gives other frames than PyAV."""
    for kind, entries in videos.items():
        wanted = read_pyav(entries[0], torch.Generator().manual_seed(1)).float()
        for name, reader in readers.items():
            found = reader(entries[0], torch.Generator().manual_seed(1)).float()
            assert found.shape == wanted.shape, (kind, name, found.shape)
            error = float((found - wanted).abs().mean())
            assert error < 3, f"{kind}, {name}: frames differ by {error:.1f} of 255 on average"


@contextmanager
def one_core() -> Iterator[None]:
    """Keeps this process on one core, whatever threads a decoder starts."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def seconds_of(call: Callable[[torch.Generator], object]) -> float:
    """The seconds of a call on one core."""
    generator = torch.Generator().manual_seed(torch.initial_seed())
    with one_core():
        began = time.perf_counter()
        call(generator)
        return time.perf_counter() - began


def main(options: Options) -> None:
    """Measures, writes the rows and prints them."""
    lend_ffmpeg()
    torch.set_num_threads(1)
    commit = current_commit()
    readers = {name: reader for name, reader in READERS.items() if importlib.util.find_spec(name)}
    for name in READERS.keys() - readers.keys():
        print(f"{name} is not installed and is left out")
    transform = PretrainTransform((224, 224), flip=True)
    with tempfile.TemporaryDirectory() as folder:
        videos = kinds_of_videos(Path(folder), options)
        check(videos, readers)
        frames = {kind: read_pyav(entries[0], torch.Generator().manual_seed(0)) for kind, entries in videos.items()}
        sizes = {kind: statistics.mean(len(each.read()) for each in entries) for kind, entries in videos.items()}

        def read(reader: Reader, entries: Sequence[VideoEntry], generator: torch.Generator) -> None:
            for entry in entries:
                transform(reader(entry, generator), generator)

        def crop(kind: str, generator: torch.Generator) -> None:
            for _ in range(options.videos):
                transform(frames[kind], generator)

        clocks: dict[Any, Callable[[], float]] = {}
        for kind, entries in videos.items():
            for name, reader in readers.items():
                clocks["read and crop", kind, name] = partial(seconds_of, partial(read, reader, entries))
            clocks["crop", kind, ""] = partial(seconds_of, partial(crop, kind))
        with cpu_clocks([_STEP] if options.step else []) as steps:
            times = take_turns({**clocks, **steps}, options.seconds, options.rounds)
    rows = [row_of(name, each, options, sizes, commit) for name, each in times.items()]
    write_rows(options.output, Row, rows)
    print(loader_tables(read_texts(options.output)))


def row_of(name: Any, times: Times, options: Options, sizes: Mapping[str, float], commit: str) -> Row:
    """The row of a measurement, for one clip."""
    q1, q3 = times.quartiles
    if isinstance(name, StepCase):
        what, kind, decoder, clips, threads = name.name, "", "", name.clips, torch.get_num_threads()
    else:
        (what, kind, decoder), clips, threads = name, options.videos, 1
    return Row(
        what=what,
        videos=kind,
        decoder=NAMES.get(decoder, ""),
        version=importlib.metadata.version(decoder) if decoder else "",
        kib=round(sizes[kind] / 1024, 1) if kind else None,
        median_s=times.median / clips,
        q1_s=q1 / clips,
        q3_s=q3 / clips,
        clips_per_s=clips / times.median,
        repeats=len(times.seconds),
        threads=threads,
        device=device_name(torch.device("cpu")),
        torch=torch.__version__,
        commit=commit,
    )


def lend_ffmpeg() -> None:
    """Starts this program again with PyAV's libraries under their usual names if torchcodec finds no FFmpeg."""
    if importlib.util.find_spec("torchcodec") is None or os.environ.get(_LENT):
        return
    try:
        read_torchcodec(VideoEntry(_CLIP), torch.Generator())
    except RuntimeError:  # its word for a missing library
        folder = Path(tempfile.mkdtemp())
        for library in (Path(av.__file__).parent.parent / "av.libs").glob("lib*.so*"):
            name = re.sub(r"-[0-9a-f]{8}(\.so\.\d+).*", r"\1", library.name)
            (folder / name).symlink_to(library)
        path = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "LD_LIBRARY_PATH": path, _LENT: "1"})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
