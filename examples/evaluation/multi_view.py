"""Multi-view evaluation: every view of a video is scored, the scores are averaged, and nothing is counted twice.

Videos are cut into batches once, and the batches are dealt to the processes. A batch is therefore computed alike for
any number of processes, and the result is the same to the last bit.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from common.devices import Normalise, autocast
from video_data.reader_processes import read_batches
from video_data.video_files import VideoError
from video_data.views import ViewSource, view_loader


@dataclass(frozen=True)
class ViewValues:
    """The values of a function for some videos of a source."""

    index: Tensor  # [B] int64, positions in the source
    label: Tensor  # [B] int64
    value: Tensor  # [B, ...], on the device
    left_out: list[str]  # messages about videos that could not be read


@torch.no_grad()
def map_views(
    function: Callable[[Tensor], Tensor],
    source: ViewSource,
    accelerator: Accelerator,
    batch_size: int,
    workers: int,
    merge: bool = True,
) -> Iterator[ViewValues]:
    """Applies a function to the views of this process's share of a source.

    Args:
        function: normalised views [B * V, C, T, H, W] -> [B * V, ...].
        source: the videos.
        accelerator: devices, processes and precision.
        batch_size: B, videos of one call. The last batch may have fewer, and unreadable videos are missing.
        workers: processes that read videos.
        merge: average over the views of a video; else keep them, [B, V, ...].

    Yields:
        ViewValues: for each batch, the values of each video, averaged in fp32 over its views.
    """
    starts = range(0, len(source), batch_size)
    batches = [list(range(start, min(start + batch_size, len(source)))) for start in starts]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    normalise = Normalise(accelerator.device)
    for batch in read_batches(view_loader(source, mine, workers), workers):
        if "video" not in batch:
            none = torch.empty(0, dtype=torch.int64)
            yield ViewValues(none, none, torch.empty(0), batch["left_out"])
            continue
        video = batch["video"].to(accelerator.device, non_blocking=True)  # [B, V, C, T, H, W]
        with autocast(accelerator):
            values = function(normalise(video.flatten(0, 1)))
        of_views = values.float().unflatten(0, video.shape[:2])  # [B, V, ...]
        yield ViewValues(batch["index"], batch["label"], of_views.mean(1) if merge else of_views, batch["left_out"])


def gather_views(
    function: Callable[[Tensor], Tensor],
    source: ViewSource,
    accelerator: Accelerator,
    batch_size: int,
    workers: int,
) -> ViewValues:
    """Applies a function to the views of all videos (see `map_views`); every process gets all values.

    Returns:
        ViewValues: the readable videos in the order of the source, on the CPU.

    Raises:
        VideoError: no video could be read.
    """
    batches = map_views(function, source, accelerator, batch_size, workers)
    parts = gather_object([(batch.index, batch.label, batch.value.cpu(), batch.left_out) for batch in batches])
    left_out = sorted(message for part in parts for message in part[3])
    read = [part for part in parts if len(part[0])]
    if not read:
        raise VideoError("no video could be read:\n  " + "\n  ".join(left_out[:8]))
    index, label, value = (torch.cat([part[column] for part in read]) for column in range(3))
    order = index.argsort()
    return ViewValues(index[order], label[order], value[order], left_out)


@dataclass(frozen=True)
class Evaluation:
    """Predictions for the videos that could be read, in the order of the source; the same on every process.

    Attributes:
        index: [V] positions of the videos in the source.
        label: [V] true classes.
        probabilities: [V, classes], the softmax of the scores (logits), which are averaged over the views.
        left_out: messages about the videos that could not be read.
    """

    index: Tensor
    label: Tensor
    probabilities: Tensor
    left_out: list[str]

    @property
    def rank(self) -> Tensor:
        """[V]: the number of classes ranked before the true class; ties go to the lower class.

        A prediction that is not finite gets the worst rank.
        """
        classes = self.probabilities.shape[1]
        right = self.probabilities.gather(1, self.label[:, None])
        before = torch.arange(classes) < self.label[:, None]
        rank = ((self.probabilities > right) | ((self.probabilities == right) & before)).sum(1)
        return torch.where(self.probabilities.isfinite().all(1), rank, classes)

    def top(self, k: int) -> float:
        """Share of videos whose class is among the k most probable ones."""
        return float((self.rank < k).double().mean())

    def summary(self) -> dict[str, float | int]:
        """Top-1 and top-5 in percent, and how many videos were evaluated, were left out, or have nonfinite
        predictions."""
        top = {f"top{k}": 100 * self.top(k) for k in (1, 5)}
        nonfinite = int((~self.probabilities.isfinite().all(1)).sum())
        return top | {"videos": len(self.label), "left_out": len(self.left_out), "nonfinite": nonfinite}

    def headline(self) -> str:
        """Top-1, top-5 of more than five classes, and the number of videos, on one line."""
        top5 = f", top-5 {100 * self.top(5):.2f}%" if self.probabilities.shape[1] > 5 else ""
        return f"top-1 {100 * self.top(1):.2f}%{top5} of {len(self.label)} videos"


def evaluate(
    model: nn.Module, source: ViewSource, accelerator: Accelerator, batch_size: int, workers: int
) -> Evaluation:
    """Evaluates a classifier: the logits of a video's views are averaged (see `map_views`), as in the official code.
    The softmax of the mean are the probabilities.

    Args:
        model: the classifier, without DDP around it; its mode, train or eval, is restored at the end.
        source: the videos.
        accelerator: devices and processes.
        batch_size: videos of one forward pass.
        workers: processes that read videos.
    """
    training = model.training
    model.eval()
    merged = gather_views(lambda views: model(views).float(), source, accelerator, batch_size, workers)
    model.train(training)
    return Evaluation(merged.index, merged.label, merged.value.softmax(-1), merged.left_out)


def write_results(
    folder: Path,
    result: Evaluation,
    names: Sequence[str],
    describe: Callable[[int], str],
    settings: dict[str, Any],
) -> None:
    """Writes results.json (top-1, top-5), per_class.csv and predictions.csv.

    Args:
        folder: output folder.
        result: the predictions.
        names: names of the classes.
        describe: gives the path of a video from its position in the source.
        settings: further entries of results.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**result.summary(), **settings}, indent=2, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    with (folder / "per_class.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["class", "name", "videos", "top1", "top5"])
        for label, name in enumerate(names):
            rank = result.rank[result.label == label]
            shares = [f"{100 * float((rank < k).double().mean()):.2f}" if len(rank) else "" for k in (1, 5)]
            writer.writerow([label, name, len(rank), *shares])
    with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["video", "label", "rank", "first five classes", "their probabilities"])
        best = result.probabilities.topk(min(5, result.probabilities.shape[1]), sorted=True)
        rows = zip(result.index.tolist(), result.label.tolist(), result.rank.tolist(), strict=True)
        for (index, label, rank), classes, shares in zip(
            rows, best.indices.tolist(), best.values.tolist(), strict=True
        ):
            line = [describe(index), label, rank + 1, " ".join(map(str, classes))]
            writer.writerow([*line, " ".join(f"{share:.4g}" for share in shares)])
