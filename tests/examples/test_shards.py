"""Shards: packing, the index, and clips and runs on shards, which equal those on files."""

import io
import json
import tarfile
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import prepare_data
import pretrain as pretrain_script
import pytest
import torch
import webdataset
from accelerate.data_loader import prepare_data_loader
from scripts import TINY_PRETRAIN, metrics, refused, run_here, run_script, succeeded
from torch.utils.data import DataLoader
from videos import generator, seen_indices, write_video

from video_data.clips import ClipStream, VideoClips, collate_clips
from video_data.shard_packing import Packing, pack
from video_data.shards import read_index
from video_data.transforms import PretrainTransform
from video_data.video import Video
from video_data.video_files import VideoError
from video_data.video_lists import VideoEntry, list_videos, write_list

prepare = partial(run_here, prepare_data.main)


@pytest.fixture
def videos(tmp_path):
    """A list of ten small videos whose labels are their numbers, a large video, a part of it, and a broken video."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(10):
        write_video(folder / f"{number}.mp4", frames=12, start=number)
    write_video(folder / "large.mp4", size=(320, 160))
    (folder / "broken.mp4").write_bytes(b"nothing")
    lines = [f"{number}.mp4 {number}" for number in range(10)]
    lines += ["large.mp4 10", "large.mp4 20 8 11", "broken.mp4 12"]
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    (folder / "labels.txt").write_text("\n".join(f"class {number}" for number in range(13)) + "\n")
    return folder


@pytest.fixture
def shards(videos, tmp_path):
    output = tmp_path / "shards"
    options = ["--short-side", 80, "--videos-per-shard", 5, "--workers", 2]
    printed = prepare("pack", "--data", videos / "list.csv", "--output", output, *options)
    assert "12 videos" in printed
    assert "1 videos cannot be used" in printed
    return output


def test_contents_of_packed_shards(videos, shards):
    entries = {entry.label: entry for entry in list_videos(shards)}
    assert sorted(entries) == list(range(12))
    for number in range(10):  # small videos are packed unchanged
        assert entries[number].read() == (videos / f"{number}.mp4").read_bytes()
    with entries[10].open() as video:
        assert video.size == (80, 160)
        assert seen_indices(video.read(range(40))) == list(range(40))
    with entries[11].open() as video:
        assert video.count() == 8
        assert seen_indices(video.read(range(8))) == list(range(20, 28))
    assert "list.csv:13 (broken.mp4): it cannot be opened as a video" in (shards / "left_out.txt").read_text()
    assert (shards / "labels.txt").read_text() == (videos / "labels.txt").read_text()
    order = [entry.label for entry in list_videos(shards)]
    assert order != sorted(order)  # packing shuffles a list that is sorted by class


def test_webdataset_reads_them(videos, shards):
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    found = {json.loads(sample["json"])["label"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    assert sorted(found) == list(range(12))
    assert found[3]["mp4"] == (videos / "3.mp4").read_bytes()


def test_an_interrupted_packing_goes_on(videos, shards):
    whole = {path.name: path.read_bytes() for path in shards.glob("*.tar")}
    kept = shards / "shard-000000.tar"
    before = kept.stat().st_mtime_ns
    (shards / "shard-000001.tar").unlink()
    (shards / ".shard-000001.tar.partial").write_bytes(b"half")  # as a kill may leave it
    (shards / "index.json").unlink()
    options = ["--short-side", 80, "--videos-per-shard", 5]
    prepare("pack", "--data", videos / "list.csv", "--output", shards, *options)
    assert kept.stat().st_mtime_ns == before
    assert {path.name: path.read_bytes() for path in shards.glob("*.tar")} == whole
    assert len(list_videos(shards)) == 12
    assert not list(shards.glob(".*"))
    another = ["pack", "--data", videos / "list.csv", "--output", shards, "--short-side", 64]
    assert "has shards of another list or with other settings" in refused(prepare_data.main, *another)


def test_clips_of_shards_are_those_of_files(videos, shards):
    transform = PretrainTransform((16, 16), flip=True)
    files = {entry.label: entry for entry in list_videos(videos / "list.csv") if entry.label < 10}
    packed = {entry.label: entry for entry in list_videos(shards)}
    for label in files:
        one, two = (VideoClips([which[label]], 4, 2, transform).clips(0, generator()) for which in (files, packed))
        assert torch.equal(one["video"], two["video"])
        assert one["label"] == two["label"] == label


@pytest.mark.parametrize("workers", [0, 2])
def test_every_video_once_in_an_epoch_over_processes_and_workers(workers, shards):
    entries = list_videos(shards)
    source = VideoClips(entries, 4, 1, PretrainTransform((16, 16), flip=False))
    seen = []
    for process in range(3):
        loader = DataLoader(ClipStream(source, 0, 24, 0), batch_size=2, num_workers=workers, collate_fn=collate_clips)
        mine = prepare_data_loader(loader, num_processes=3, process_index=process, put_on_device=False)
        seen.append([batch["label"].tolist() for batch in mine])
    first, second = ([label for part in seen for batch in part[at : at + 2] for label in batch] for at in (0, 2))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def test_a_run_on_shards(shards, tmp_path):
    """The losses are the same whether --data names the folder or its index."""
    common = [*TINY_PRETRAIN, "--stride", 1, "--workers", 2]
    losses = []
    for number, data in enumerate((shards, shards / "index.json")):
        run_here(pretrain_script.main, *common, "--data", data, "--steps", 4, "--output", tmp_path / str(number))
        losses.append([line["loss"] for line in metrics(tmp_path / str(number))])
    assert losses[0] == losses[1]


pretrain = partial(run_script, "pretrain.py")


class Ranges(BaseHTTPRequestHandler):
    """Serves the files of a folder, whole or as byte ranges."""

    folder = None
    requests: list[str] = []  # noqa: RUF012

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, wanted = path.read_bytes(), self.headers.get("Range")
        total = len(data)
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            data = data[int(first) : int(last) + 1]
            self.requests.append(f"{path.name} {len(data)}")
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{total}")
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def url(shards):
    handler = type("Here", (Ranges,), {"folder": shards, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/index.json", handler.requests
    server.shutdown()


@pytest.mark.slow
def test_shards_behind_a_url_are_read_by_ranges(url, shards, tmp_path):
    index, requests = url
    here, there = list_videos(shards), list_videos(index)
    assert [(entry.label, entry.read()) for entry in there] == [(entry.label, entry.read()) for entry in here]
    spans = [int(size) for name, size in map(str.split, requests) if name.endswith(".tar")]
    assert len(spans) == 12
    assert sum(spans) == sum(entry.span.size for entry in here)
    printed = succeeded(
        pretrain(
            *TINY_PRETRAIN, "--data", index, "--steps", 3, "--workers", 2, "--stride", 1, "--output", tmp_path / "run"
        )
    )
    assert f"{index}, 12 videos" in printed
    (shards / "shard-000001.tar").unlink()
    gone = next(entry for entry in there if "shard-000001" in str(entry.path))
    with pytest.raises(VideoError, match=r"shard-000001\.tar: there is no such shard"):
        gone.open()


def test_shards_from_elsewhere_get_an_index(videos, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number in range(3):
            tar.add(videos / f"{number}.mp4", f"train/{number}.mp4")
            add(tar, f"train/{number}.cls", str(number).encode())
        tar.add(videos / "3.mp4", "train/3.mp4")  # without a label
    assert "4 videos" in prepare("index", "--shards", folder)
    assert [entry.label for entry in list_videos(folder)] == [0, 1, 2, -1]
    with list_videos(folder)[2].open() as video:
        assert seen_indices(video.read([0, 11])) == [2, 13]


def add(tar, name, content=b"", **more):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in more.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("../escape.mp4", {}, "leads out of the folder"),
        ("a/../../escape.mp4", {}, "leads out of the folder"),
        ("/etc/escape.mp4", {}, "leads out of the folder"),
        ("C:/escape.mp4", {}, "leads out of the folder"),
        ("%2e%2e/escape.mp4", {}, "leads out of the folder"),
        ("link.mp4", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "is a link, a device"),
        ("hard.mp4", {"type": tarfile.LNKTYPE, "linkname": "../x"}, "is a link, a device"),
        ("0.cls", {}, "expected a number"),
    ],
)
def test_shards_that_lead_outside_are_refused(name, more, message, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, name, **more)
    assert message in refused(prepare_data.main, "index", "--shards", tmp_path)
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["shards"][0].update(name="../shard-000000.tar"), "leads out of the folder"),
        (lambda index: index["shards"][0].update(name="/etc/passwd"), "leads out of the folder"),
        (lambda index: index["shards"][0].update(name="http://elsewhere/x.tar"), "leads out of the folder"),
        (lambda index: index["shards"][0]["videos"][0].__setitem__(0, "../x.mp4"), "leads out of the folder"),
        (lambda index: index["shards"][0]["videos"][0].__setitem__(2, 10**9), "is not within shard-000000.tar"),
        (lambda index: index["shards"][0]["videos"][0].__setitem__(1, -1), "is not within shard-000000.tar"),
        (lambda index: index["shards"][0].update(bytes=5), "it is truncated or another file"),
        (lambda index: index.update(format="x"), "is not an index of shards"),
    ],
)
def test_an_index_that_leads_outside_or_lies_is_refused(change, message, shards):
    index = json.loads((shards / "index.json").read_text())
    change(index)
    (shards / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        read_index(str(shards))


def test_missing_and_broken_shards_are_named(shards, tmp_path):
    (shards / "shard-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-000001\.tar: this shard of the index is missing"):
        list_videos(shards)
    (shards / "index.json").write_bytes(b"\x80\x04N.")  # a pickle
    with pytest.raises(ValueError, match="is not JSON"):
        list_videos(shards)
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        add(tar, "0.mp4")
    assert "is not an uncompressed tar file" in refused(prepare_data.main, "index", "--shards", tmp_path)
    assert "has no .tar file" in refused(prepare_data.main, "index", "--shards", shards / "nowhere")


def test_a_list_of_shards_cannot_be_written(shards, tmp_path):
    """Lists name files, so videos in shards cannot stand in one. `check` reads shards and writes no list."""
    with pytest.raises(ValueError, match="is in a shard"):
        write_list(tmp_path / "list.csv", list_videos(shards))
    assert "12 videos are whole" in prepare("check", "--data", shards)


def test_bytes_are_a_video(videos):
    with Video((videos / "3.mp4").read_bytes()) as video:
        assert seen_indices(video.read([1, 5])) == [4, 8]
    with pytest.raises(VideoError, match="cannot be opened as a video"):
        Video(b"nothing")


def test_a_video_that_no_decoder_knows_is_left_out_of_the_shards(tmp_path):
    unknown = tmp_path / "unknown.mp4"
    unknown.write_bytes(write_video(tmp_path / "known.mp4").read_bytes().replace(b"avc1", b"zzz1"))
    entries = [VideoEntry(tmp_path / "known.mp4"), VideoEntry(unknown, where="line 2")]
    [(left_out, count, _)] = pack(entries, tmp_path / "shards", Packing(), workers=1)
    assert left_out == ["line 2: there is no decoder for its video stream"]
    assert count == 1
