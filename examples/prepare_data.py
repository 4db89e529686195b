"""Makes the list files of public data sets, checks videos, and packs them into shards.

    python examples/prepare_data.py ssv2 --annotations labels --videos 20bn-something-something-v2 --output lists/ssv2
    python examples/prepare_data.py k400 --annotations annotations --videos k400 --output lists/k400
    python examples/prepare_data.py ucf101 --annotations ucfTrainTestlist --videos UCF-101 --output lists/ucf101
    python examples/prepare_data.py hmdb51 --annotations SPLITS --videos hmdb51 --output lists/hmdb51
    python examples/prepare_data.py check --data lists/k400/train.csv --workers 16
    python examples/prepare_data.py pack --data lists/k400/train.csv --output shards/k400 --workers 16
    python examples/prepare_data.py index --shards shards/from-elsewhere

Each command has its own --help.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm
from tyro.conf import OmitArgPrefixes
from tyro.extras import SubcommandApp

from video_data.annotations import Annotations, read_hmdb51, read_k400, read_ssv2, read_ucf101
from video_data.shard_packing import Packing
from video_data.shard_packing import pack as packed
from video_data.shards import index_shard, write_index
from video_data.video_files import VIDEO_SUFFIXES, VideoError
from video_data.video_lists import LABELS, VideoEntry, list_videos, write_list

app = SubcommandApp()


@app.command
def ssv2(annotations: Path, videos: Path, output: Path) -> None:
    """Lists of Something-Something V2.

    Args:
        annotations: folder with labels.json, train.json and validation.json (or something-something-v2-*.json).
        videos: folder of the videos, searched through.
        output: folder for train.csv, val.csv, labels.txt, and missing.txt if videos are missing.
    """
    write(read_ssv2(annotations), videos, output)


@app.command
def k400(annotations: Path, videos: Path, output: Path) -> None:
    """Lists of Kinetics-400 (also of Kinetics-600 and 700: their annotations have the same form).

    Args:
        annotations: folder with train.csv and val.csv (or validate.csv).
        videos: folder of the videos, searched through; names are YOUTUBEID_START_END with both times in six digits.
        output: folder for train.csv, val.csv, labels.txt, and missing.txt if videos are missing.
    """
    write(read_k400(annotations), videos, output)


@app.command
def ucf101(annotations: Path, videos: Path, output: Path, split: int = 1) -> None:
    """Lists of UCF101.

    Args:
        annotations: folder with classInd.txt, trainlist01.txt and testlist01.txt.
        videos: folder of the classes' folders.
        output: folder for train.csv, val.csv, labels.txt, and missing.txt if videos are missing.
        split: number of the official split, 1 to 3.
    """
    check_split(split)
    write(read_ucf101(annotations, split), videos, output)


@app.command
def hmdb51(annotations: Path, videos: Path, output: Path, split: int = 1) -> None:
    """Lists of HMDB51.

    Args:
        annotations: folder with CLASS_test_split1.txt for each class.
        videos: folder of the classes' folders.
        output: folder for train.csv, val.csv, labels.txt, and missing.txt if videos are missing.
        split: number of the official split, 1 to 3.
    """
    check_split(split)
    write(read_hmdb51(annotations, split), videos, output)


def write(annotations: Annotations, videos: Path, output: Path) -> None:
    """Writes lists of the videos that exist; raises FileNotFoundError if a list would be empty."""
    if not videos.is_dir():
        raise FileNotFoundError(f"--videos {videos}: no such folder.")
    files: dict[str, Path] = {}
    for path in sorted(videos.rglob("*"), reverse=True):  # of two files of one video, the first by name wins
        if path.suffix.lower() in VIDEO_SUFFIXES:
            files[path.stem] = path
            files[f"{path.parent.name}/{path.stem}"] = path
    missing: list[str] = []
    lists: dict[str, list[VideoEntry]] = {}
    for name, entries in annotations.lists.items():
        found = [VideoEntry(files[video], label) for video, label, _ in entries if video in files]
        missing += [f"{where}: {video}" for video, _, where in entries if video not in files]
        if not found:
            example = entries[0][0] if entries else "(the list is empty)"
            raise FileNotFoundError(
                f"--videos {videos} has none of the {len(entries)} videos of {name}, such as {example}."
            )
        lists[name] = found
    for name, found in lists.items():
        write_list(output / f"{name}.csv", found)
        print(f"{output / name}.csv: {len(found)} videos of {len(annotations.classes)} classes")
    (output / LABELS).write_text("\n".join(annotations.classes) + "\n", encoding="utf-8")
    (output / "missing.txt").unlink(missing_ok=True)  # of an earlier call
    if missing:
        (output / "missing.txt").write_text("\n".join(missing) + "\n", encoding="utf-8")
        print(f"{len(missing)} videos of the annotations are not in {videos}: see {output / 'missing.txt'}")


@app.command
def check(data: Path, workers: int = 4, write_good: Path | None = None) -> None:
    """Decodes every frame of every video and reports the broken videos. The exit status is 1 if a video is broken.

    Args:
        data: list file or folder of videos. Broken videos are also listed in <data>.broken.txt.
        workers: processes that decode.
        write_good: list file to write, with the videos that are whole.
    """
    entries = list_videos(data)
    if write_good and any(entry.span for entry in entries):
        raise ValueError("--write-good: a list cannot name videos in shards, and --data has some.")
    with ProcessPoolExecutor(workers) as pool:
        found = list(tqdm(pool.map(examine, entries, chunksize=4), total=len(entries), unit="video", file=sys.stdout))
    broken = [f"{entry.where}: {cause}" for entry, cause in zip(entries, found, strict=True) if isinstance(cause, str)]
    frames = sorted(count for count in found if isinstance(count, int))
    if frames:
        print(f"{len(frames)} videos are whole: {frames[0]} to {frames[-1]} frames, median {frames[len(frames) // 2]}")
    if twice := [path for path, times in Counter(entry.path for entry in entries).items() if times > 1]:
        print(f"{len(twice)} videos occur more than once, such as {twice[0]}")
    if write_good:
        good = [entry for entry, count in zip(entries, found, strict=True) if isinstance(count, int)]
        write_list(write_good, good)
        print(f"wrote {len(good)} videos to {write_good}")
    report = data.with_name(f"{data.name}.broken.txt")
    report.unlink(missing_ok=True)  # of an earlier call
    if broken:
        report.write_text("\n".join(broken) + "\n", encoding="utf-8")
        print("\n".join(f"  {line}" for line in broken))
        raise SystemExit(f"{len(broken)} of {len(entries)} videos are broken; also in {report}")


@app.command
def pack(data: Path, output: Path, packing: OmitArgPrefixes[Packing], workers: int = 4) -> None:
    """Packs resized videos into WebDataset shards and writes an index. After an interruption, the same command goes on.

    Args:
        data: list file or folder of videos.
        output: folder for shard-000000.tar and so on, index.json, and left_out.txt if some videos cannot be used.
        packing: how videos are stored.
        workers: processes that decode and encode.
    """
    entries = list_videos(data)
    report, videos, size, left_out = output / "left_out.txt", 0, 0, list[str]()
    with tqdm(total=len(entries), unit="video", file=sys.stdout) as progress:
        for messages, count, stored in packed(entries, output, packing, workers):
            videos, size = videos + count, size + stored
            left_out += messages
            progress.update(count + len(messages))
    report.unlink(missing_ok=True)  # of an earlier call
    if left_out:
        report.write_text("\n".join(left_out) + "\n", encoding="utf-8")
    if not videos:
        raise ValueError(f"none of the {len(entries)} videos of {data} can be used; see {report}.")
    if (names := data.parent / LABELS).is_file():
        shutil.copyfile(names, output / LABELS)
    print(f"{videos} videos, {size / 2**30:.2f} GiB, in {output}; train with --data {output}")
    if left_out:
        print(f"{len(left_out)} videos cannot be used and were left out; see {report}")


@app.command
def index(shards: Path) -> None:
    """Writes the index.json of WebDataset shards that were made elsewhere.

    Args:
        shards: folder of uncompressed .tar files. A sample is a video, with its label in a .cls file or as "label" in
            a .json file.
    """
    paths = sorted(shards.glob("*.tar"))
    if not paths:
        raise FileNotFoundError(f"--shards {shards} has no .tar file.")
    found = [index_shard(path) for path in tqdm(paths, unit="shard", file=sys.stdout)]
    print(f"wrote {write_index(shards, found)}: {sum(len(shard['videos']) for shard in found)} videos")


def examine(entry: VideoEntry) -> int | str:
    """The number of frames of a video, or why it cannot be used."""
    try:
        with entry.open() as video:
            frames = video.read_all()
    except VideoError as error:
        return str(error)
    if entry.start >= frames:
        return f"it has {frames} frames, and its part begins at frame {entry.start}"
    return frames


def check_split(split: int) -> None:
    """Raises ValueError for a number that is not 1, 2 or 3."""
    if split not in (1, 2, 3):
        raise ValueError(f"--split {split}: expected 1, 2 or 3.")


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    try:
        app.cli(args=arguments, description=__doc__)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
