"""Runs with broken videos, non-finite steps or dying processes go on, or end with the reason."""

import os
import shutil
import signal
from functools import partial
from pathlib import Path
from unittest import mock

import av
import pretrain as pretrain_script
import pytest
import torch
from conftest import needs_posix
from scripts import (
    EXAMPLES,
    TINY_PRETRAIN,
    TWO_PROCESSES,
    children,
    metrics,
    newest_checkpoint,
    refused,
    run_here,
    run_script,
    start_script,
    succeeded,
    wait_for_step,
)
from videos import write_video

from adamae_sampler import AdaMAELoss
from training.broken_videos import BrokenVideos, read_broken_videos
from training.interrupts import Interrupts, Request, TrainingError, run_to_the_end
from training.job import Job
from training.loop import TrainingLoop
from training.run_log import RunLog
from video_data.clips import VideoClips
from video_data.reader_processes import read_batches, video_loader
from video_data.video_lists import VideoEntry

pretrain_here = partial(run_here, pretrain_script.main)


def folder_with_broken_videos(folder):
    """Writes 95 whole videos and 5 that are broken in different ways. Returns the names of the broken ones."""
    folder.mkdir()
    good = write_video(folder / "good 00.mp4")
    for number in range(1, 95):
        shutil.copy(good, folder / f"good {number:02d}.mp4")
    whole = good.read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").touch()
    (folder / "a text.mp4").write_text("not a video\n" * 100)
    with av.open(str(folder / "no frames.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()  # writes the header alone
    # The size of its first box says that the header is 4 GiB long.
    (folder / "huge header.mp4").write_bytes(b"\xff\xff\xff\xf0" + whole[4:])
    return {"truncated.mp4", "empty.mp4", "a text.mp4", "no frames.mkv", "huge header.mp4"}


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_folder_with_broken_videos_trains_to_the_end_and_lists_exactly_those(processes, tmp_path):
    broken = folder_with_broken_videos(tmp_path / "videos")
    assert len(list((tmp_path / "videos").iterdir())) == 100
    arguments = [*TINY_PRETRAIN, "--data", tmp_path / "videos", "--steps", 52, "--workers", 1, "--stride", 1]
    arguments += ["--output", tmp_path / "run"]
    if processes == 1:
        printed = pretrain_here(*arguments)
    else:
        printed = succeeded(run_script("pretrain.py", *arguments, processes=processes))
    listed = read_broken_videos(
        tmp_path / "run" / "quarantine.txt"
    )  # the run is two epochs of one process, or more of two processes
    assert set(listed) == {str(tmp_path / "videos" / name) for name in broken}
    assert all(listed.values())
    assert "5 videos could not be used and were replaced by others" in printed
    assert len(metrics(tmp_path / "run")) == 52


def test_a_resumed_run_keeps_the_quarantine(tmp_path):
    shutil.copy(EXAMPLES / "clips" / "bigbuckbunny.mp4", tmp_path / "good.mp4")
    (tmp_path / "list.csv").write_text("good.mp4 0\nlater.mp4 1\n")
    arguments = [*TINY_PRETRAIN, "--data", tmp_path / "list.csv", "--output", tmp_path / "run", "--max-broken", 0.5]
    pretrain_here(*arguments, "--steps", 2)
    quarantine = tmp_path / "run" / "quarantine.txt"
    assert (
        quarantine.read_text()
        == f"{tmp_path / 'later.mp4'}\t{tmp_path / 'list.csv'}:2 (later.mp4): there is no such file\n"
    )
    pretrain_here("--resume", "auto", *arguments, "--steps", 4)
    assert len(quarantine.read_text().splitlines()) == 1


def test_more_broken_videos_than_allowed_end_a_run(tmp_path):
    shutil.copy(EXAMPLES / "clips" / "bigbuckbunny.mp4", tmp_path / "good.mp4")
    (tmp_path / "list.csv").write_text("good.mp4 0\nmissing.mp4 1\n")
    arguments = [*TINY_PRETRAIN, "--data", tmp_path / "list.csv", "--steps", 4, "--output", tmp_path / "run"]
    said = refused(pretrain_script.main, *arguments)
    assert "error: 1 of 2 videos cannot be used, more than max_broken=0.1 of them" in said
    assert "list.csv:2 (missing.mp4): there is no such file" in said
    assert "raise --max-broken" in said
    assert f"The run is saved in {newest_checkpoint(tmp_path / 'run')}" in said
    assert "Traceback" not in said


def test_the_quarantine_file(tmp_path):
    path = tmp_path / "run" / "quarantine.txt"
    source = VideoClips([VideoEntry(Path(name)) for name in ("a ü.mp4", "b.mp4", "d.mp4", *"efghijk")], 4, 2, None)
    broken = BrokenVideos(path, source, 0.25, writes=True)
    broken.add({"a ü.mp4": "broken\nin two lines"})
    assert broken.exchange() is None
    broken.add({"a ü.mp4": "again", "b.mp4": "gone"})
    assert broken.exchange() is None
    assert path.read_text(encoding="utf-8") == "a ü.mp4\tbroken in two lines\nb.mp4\tgone\n"
    with path.open("a") as file:
        file.write("elsewhere.mp4\tgone\nc.mp")  # a video of other data, and half a line as a kill may leave it
    again = BrokenVideos(path, source, 0.25, writes=True)
    assert set(again.known) == {"a ü.mp4", "b.mp4"}
    again.add({"d.mp4": "gone"})
    assert "3 of 10 videos cannot be used, more than max_broken=0.25" in again.exchange()
    assert read_broken_videos(path).keys() == {"a ü.mp4", "b.mp4", "elsewhere.mp4", "d.mp4"}


def nonfinite_losses(first, last):
    """A context in which the losses of steps `first` to `last` are not finite."""
    calls, real = [], AdaMAELoss.forward

    def forward(self, prediction, video, sample):
        out = real(self, prediction, video, sample)
        calls.append(1)
        return out._replace(loss=out.loss * torch.nan) if first <= len(calls) <= last else out

    return mock.patch.object(AdaMAELoss, "forward", forward)


def test_too_many_bad_steps_in_a_row_save_and_end_a_run(tmp_path):
    common = [*TINY_PRETRAIN, "--data", "sprites:8:3", "--steps", 9, "--output", tmp_path, "--log-every", 2]
    common += ["--stop-after-nonfinite", 3]
    with nonfinite_losses(4, 8):
        said = refused(pretrain_script.main, *common)
    assert "error: the last 3 steps had a loss or gradient that is not finite and were skipped" in said
    assert "Traceback" not in said
    lines = (tmp_path / "nonfinite.txt").read_text().splitlines()
    assert "nonfinite_in_a_row 3" in lines[0]
    assert [line.split(":")[0] for line in lines[1:]] == ["step 4", "step 5", "step 6"]
    # An epoch of eight clips is two steps. Steps 5 and 6 are an epoch, so they name each clip once.
    named = [name for line in lines[2:4] for name in line.partition(": ")[2].split(", ")]
    assert sorted(named) == [f"sprites:8:3[{number}]" for number in range(8)]
    assert newest_checkpoint(tmp_path).name == "step_00000006.safetensors"
    assert "from step 6" in pretrain_here("--resume", newest_checkpoint(tmp_path))


def test_fewer_bad_steps_in_a_row_are_skipped(tmp_path):
    common = [*TINY_PRETRAIN, "--data", "sprites:8:3", "--steps", 8, "--output", tmp_path]
    with nonfinite_losses(4, 5):
        pretrain_here(*common, "--stop-after-nonfinite", 3)
    assert [line["nonfinite_in_a_row"] for line in metrics(tmp_path)] == [0, 0, 0, 1, 2, 0, 0, 0]
    assert [line["skipped_steps"] for line in metrics(tmp_path)] == [0, 0, 0, 1, 1, 0, 0, 0]


def test_training_names_a_reader_that_dies_while_it_hands_over_a_batch(tmp_path, monkeypatch):
    """The loader of a training run is Accelerate's own."""

    def broken(_):
        raise ConnectionResetError(104, "reset by peer")

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", broken)
    arguments = [*TINY_PRETRAIN, "--data", "sprites:8", "--steps", 1, "--workers", 1, "--output", tmp_path]
    with pytest.raises(SystemExit, match=r"error: a reader process died \(DataLoader worker ended while"):
        pretrain_here(*arguments)


class Store(torch.utils.data.Dataset):
    """Videos of a store that refuses the connection."""

    def __len__(self):
        return 4

    def __getitem__(self, place):
        raise ConnectionResetError("the store is away")


@pytest.mark.parametrize("cut", [ConnectionResetError(104, "reset by peer"), EOFError(), ConnectionRefusedError()])
def test_a_reader_that_dies_while_it_hands_over_a_batch_is_named(cut, monkeypatch):
    loader = video_loader(Store(), list, 1, batch_size=2)

    def broken(_):
        yield {"batch": 1}
        raise cut

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", broken)
    batches = read_batches(loader, 1)
    assert next(batches) == {"batch": 1}
    with pytest.raises(SystemExit, match=r"error: a reader process died \(DataLoader worker ended while"):
        run_to_the_end(lambda: next(batches))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_store_is_not_taken_for_a_dead_reader(workers):
    with pytest.raises(ConnectionResetError, match="the store is away"):
        list(read_batches(video_loader(Store(), list, workers, batch_size=2), workers))


@pytest.mark.parametrize("victim", ["reader", "rank"])
@pytest.mark.slow
@needs_posix
def test_a_process_that_dies_ends_the_job_at_once_with_a_clear_line(victim, tmp_path):
    launcher = TWO_PROCESSES if victim == "rank" else ()
    arguments = [*TINY_PRETRAIN, "--data", "sprites:64", "--steps", 100_000, "--workers", 2, "--output", tmp_path]
    process = start_script("pretrain.py", *arguments, launcher=launcher)
    wait_for_step(tmp_path, 3, process)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    if victim == "reader":
        assert "error: a reader process died (DataLoader worker " in errors
        assert "fewer --workers" in errors
        assert "Traceback" not in errors
    else:
        assert "Signal 9 (SIGKILL) received by PID" in errors


def test_metrics_that_a_full_disk_refuses_are_written_with_the_next_line(tmp_path, monkeypatch, capsys):
    log = RunLog(tmp_path, 0, enabled=True)
    log.write(1, {"loss": 1.0})

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("training.run_log.append_whole", full)
        log.write(2, {"loss": 2.0})
    assert "metrics of step 2 could not be written" in capsys.readouterr().out
    log.write(3, {"loss": 3.0})
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]


def test_processes_that_would_resume_from_different_checkpoints_are_refused(monkeypatch):
    """This happens if --output is a local folder of each machine."""
    monkeypatch.setattr("training.loop.gather_object", lambda mine: [*mine, ("step_00000040.safetensors", 40)])
    with pytest.raises(TrainingError, match=r"different checkpoints: .*'none'.*; --output must be a shared folder"):
        TrainingLoop(Job(None, None, None, None, None, None), None, ("loss", -1))


@needs_posix
def test_a_signal_before_the_first_step_and_one_during_a_save_count():
    with Interrupts(minutes=60) as interrupts:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interrupts.after_step() is Request.SAVE
        os.kill(os.getpid(), signal.SIGUSR1)  # while it saves
        interrupts.saved()
        assert interrupts.after_step() is Request.SAVE
        assert interrupts.after_step() is Request.NONE
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)  # SIGTERM outranks SIGUSR1
        assert interrupts.after_step() is Request.STOP
        assert interrupts.after_step() is Request.STOP
