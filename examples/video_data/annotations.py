"""The annotation files of Something-Something V2, Kinetics-400, UCF101 and HMDB51, as published.

Each reader gives the class names, and for each list the videos with their labels. A video has the name of its file
without a suffix; UCF101 and HMDB51 put the class folder before it.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Annotations:
    """The classes and the videos of a data set.

    Attributes:
        classes: class names, in the order of the labels.
        lists: for "train" and "val", the videos: file name without suffix, label, and place in the annotation files.
    """

    classes: list[str]
    lists: dict[str, list[tuple[str, int, str]]]


def read_ssv2(folder: Path) -> Annotations:
    """Reads labels.json, train.json and validation.json; the names may begin with "something-something-v2-".

    An entry is {"id": "78687", "template": "Holding [something] next to [something]", ...}; labels.json maps a
    template without brackets to a label.
    """
    labels = {_plain(name): int(label) for name, label in _json(_find(folder, "labels.json")).items()}
    classes = sorted(labels, key=lambda name: labels[name])
    if sorted(labels.values()) != list(range(len(labels))):
        raise ValueError(f"{folder}: the labels in labels.json are not 0 to {len(labels) - 1}.")
    lists = {}
    for name, file in (("train", "train.json"), ("val", "validation.json")):
        path = _find(folder, file)
        lists[name] = [
            (
                str(entry["id"]),
                _label(labels, _plain(entry["template"]), f"{path}, id {entry['id']}"),
                f"{path}, id {entry['id']}",
            )
            for entry in _json(path)
        ]
    return Annotations(classes, lists)


def read_k400(folder: Path) -> Annotations:
    """Reads train.csv and val.csv (or validate.csv): label, youtube_id, time_start, time_end, split.

    The file of a video is YOUTUBEID_START_END, with six digits for each time. Labels follow the alphabet.
    """
    tables = {"train": _find(folder, "train.csv"), "val": _find(folder, "val.csv", "validate.csv", "validation.csv")}
    rows = {name: _csv(path, ("label", "youtube_id", "time_start", "time_end")) for name, path in tables.items()}
    classes = sorted({row["label"] for table in rows.values() for row in table})
    labels = {name: number for number, name in enumerate(classes)}
    return Annotations(
        classes,
        {
            name: [
                (
                    f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}",
                    labels[row["label"]],
                    f"{tables[name]}:{number}",
                )
                for number, row in enumerate(table, start=2)
            ]
            for name, table in rows.items()
        },
    )


def read_ucf101(folder: Path, split: int) -> Annotations:
    """Reads classInd.txt ("1 ApplyEyeMakeup"), trainlist0N.txt ("Class/v_Class_g01_c01.avi 1") and testlist0N.txt."""
    numbered = [line.split(maxsplit=1) for line in _lines(_find(folder, "classInd.txt"))]
    labels = {name: int(number) - 1 for number, name in numbered}
    classes = sorted(labels, key=lambda name: labels[name])
    lists: dict[str, list[tuple[str, int, str]]] = {}
    for name, file in (("train", f"trainlist{split:02d}.txt"), ("val", f"testlist{split:02d}.txt")):
        path = _find(folder, file)
        lists[name] = []
        for number, line in enumerate(_lines(path), start=1):
            video = line.split()[0]
            label = _label(labels, video.partition("/")[0], f"{path}:{number}")
            lists[name].append((video.removesuffix(".avi"), label, f"{path}:{number}"))
    return Annotations(classes, lists)


def read_hmdb51(folder: Path, split: int) -> Annotations:
    """Reads CLASS_test_splitN.txt of each class: "video.avi 1" for training, 2 for testing, 0 for neither."""
    ending = f"_test_split{split}.txt"
    files = sorted(folder.glob(f"*{ending}"))
    if not files:
        raise FileNotFoundError(
            f"{folder} has no *{ending}; --annotations is the folder of the official splits, --split is 1 to 3."
        )
    classes = [path.name.removesuffix(ending) for path in files]
    lists: dict[str, list[tuple[str, int, str]]] = {"train": [], "val": []}
    for label, (path, name) in enumerate(zip(files, classes, strict=True)):
        for number, line in enumerate(_lines(path), start=1):
            video, _, use = line.rpartition(" ")
            if use not in ("0", "1", "2"):
                raise ValueError(f"{path}:{number}: {line!r}, expected 'video.avi' and 1 (training), 2 (testing) or 0.")
            if use != "0":
                entry = (f"{name}/{video.strip().removesuffix('.avi')}", label, f"{path}:{number}")
                lists["train" if use == "1" else "val"].append(entry)
    return Annotations(classes, lists)


def _find(folder: Path, *names: str) -> Path:
    """The file with one of these names, or with a name that ends in a hyphen and one of these names."""
    for name in names:
        found = [
            path for path in sorted(folder.glob(f"*{name}")) if path.name == name or path.name.endswith(f"-{name}")
        ]
        if found:
            return found[0]
    raise FileNotFoundError(
        f"{folder} has no {' or '.join(names)}; --annotations is the folder of the published files."
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


def _csv(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = set(columns) - set(reader.fieldnames or ())
        if missing:
            raise ValueError(
                f"{path} has no column {', '.join(sorted(missing))}; the first line is {reader.fieldnames}."
            )
        return list(reader)


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _plain(template: str) -> str:
    return template.replace("[", "").replace("]", "")


def _label(labels: dict[str, int], name: str, where: str) -> int:
    if name not in labels:
        raise ValueError(f"{where}: class {name!r} is not one of the {len(labels)} classes.")
    return labels[name]
