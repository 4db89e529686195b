"""prepare_data.py: lists made from the published annotations, and the check of lists."""

import json
import subprocess
import sys
from pathlib import Path

import prepare_data
import pytest
from videos import write_video

from video_data.video_lists import VideoEntry, class_names, list_videos, write_list

SCRIPT = Path(__file__).parents[2] / "examples" / "prepare_data.py"


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def lists_of(command, tmp_path, *more):
    paths = ["--annotations", tmp_path / "annotations", "--videos", tmp_path / "videos", "--output", tmp_path / "lists"]
    prepare_data.main([command, *map(str, paths), *more])
    found = {}
    for name in ("train", "val"):
        entries = list_videos(tmp_path / "lists" / f"{name}.csv")
        found[name] = [(str(entry.path.relative_to(tmp_path / "videos")), entry.label) for entry in entries]
    return found, (tmp_path / "lists" / "labels.txt").read_text().splitlines()


@pytest.mark.parametrize("prefix", ["", "something-something-v2-"])
def test_something_something(prefix, tmp_path, capsys):
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    labels = {"Moving something up": "1", "Holding something next to something": "0"}
    (annotations / f"{prefix}labels.json").write_text(json.dumps(labels))
    train = [
        {"id": "78687", "label": "holding a cup next to a jar", "template": "Holding [something] next to [something]"},
        {"id": "42326", "label": "moving a cup up", "template": "Moving [something] up", "placeholders": ["a cup"]},
        {"id": "1", "label": "not there", "template": "Moving [something] up"},
    ]
    (annotations / f"{prefix}train.json").write_text(json.dumps(train))
    val = [{"id": "5", "template": "Moving [something] up"}]
    (annotations / f"{prefix}validation.json").write_text(json.dumps(val))
    touch(tmp_path / "videos", "78687.webm", "sub/42326.webm", "5.webm", "notes.txt")
    found, classes = lists_of("ssv2", tmp_path)
    assert found == {"train": [("78687.webm", 0), ("sub/42326.webm", 1)], "val": [("5.webm", 1)]}
    assert classes == ["Holding something next to something", "Moving something up"]
    assert "train.json, id 1: 1" in (tmp_path / "lists" / "missing.txt").read_text()
    assert "1 videos of the annotations are not in" in capsys.readouterr().out
    (annotations / f"{prefix}validation.json").write_text('[{"id": "5", "template": "Eating [something]"}]')
    with pytest.raises(
        SystemExit, match=r"validation.json, id 5: class 'Eating something' is not one of the 2 classes"
    ):
        lists_of("ssv2", tmp_path)


@pytest.mark.parametrize("val", ["val.csv", "validate.csv"])
def test_kinetics(val, tmp_path):
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    head = "label,youtube_id,time_start,time_end,split,is_cc\n"
    (annotations / "train.csv").write_text(head + '"tap dancing",--0a,7,17,train,0\nabseiling,b_c,1,11,train,0\n')
    (annotations / val).write_text(head + '"air, drumming",xyz,100,110,val,1\n')
    touch(tmp_path / "videos", "train/tap dancing/--0a_000007_000017.mp4", "train/b_c_000001_000011.mp4")
    touch(tmp_path / "videos", "val/xyz_000100_000110.mp4")
    found, classes = lists_of("k400", tmp_path)
    assert classes == ["abseiling", "air, drumming", "tap dancing"]
    assert found["train"] == [("train/tap dancing/--0a_000007_000017.mp4", 2), ("train/b_c_000001_000011.mp4", 0)]
    assert found["val"] == [("val/xyz_000100_000110.mp4", 1)]
    assert not (tmp_path / "lists" / "missing.txt").exists()
    (annotations / "train.csv").write_text("name,id\n")
    with pytest.raises(SystemExit, match="has no column label, time_end, time_start, youtube_id"):
        lists_of("k400", tmp_path)


def test_ucf101(tmp_path):
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    (annotations / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 Archery\n")
    (annotations / "trainlist02.txt").write_text(
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\nArchery/v_A_g1_c1.avi 2\n"
    )
    (annotations / "testlist02.txt").write_text("Archery/v_A_g2_c1.avi\n")
    touch(
        tmp_path / "videos",
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi",
        "Archery/v_A_g1_c1.avi",
        "Archery/v_A_g2_c1.avi",
    )
    found, classes = lists_of("ucf101", tmp_path, "--split", "2")
    assert classes == ["ApplyEyeMakeup", "Archery"]
    assert found["train"] == [("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", 0), ("Archery/v_A_g1_c1.avi", 1)]
    assert found["val"] == [("Archery/v_A_g2_c1.avi", 1)]
    with pytest.raises(SystemExit, match=r"has no trainlist01.txt"):
        lists_of("ucf101", tmp_path)


def test_hmdb51(tmp_path):
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    (annotations / "brush_hair_test_split1.txt").write_text("April (1) a.avi 1 \nb.avi 2 \nc.avi 0 \n")
    (annotations / "wave_test_split1.txt").write_text("b.avi 1 \n")
    (annotations / "wave_test_split2.txt").write_text("b.avi 2 \n")
    touch(tmp_path / "videos", "brush_hair/April (1) a.avi", "brush_hair/b.avi", "brush_hair/c.avi", "wave/b.avi")
    found, classes = lists_of("hmdb51", tmp_path)
    assert classes == ["brush_hair", "wave"]
    assert found == {"train": [("brush_hair/April (1) a.avi", 0), ("wave/b.avi", 1)], "val": [("brush_hair/b.avi", 0)]}
    (annotations / "wave_test_split1.txt").write_text("b.avi 7\n")
    with pytest.raises(SystemExit, match=r"wave_test_split1.txt:1: .* expected 'video.avi' and 1 \(training\)"):
        lists_of("hmdb51", tmp_path)
    with pytest.raises(SystemExit, match=r"_test_split3.txt; --annotations is the folder of the official splits"):
        lists_of("hmdb51", tmp_path, "--split", "3")
    with pytest.raises(SystemExit, match="--split 7: expected 1, 2 or 3"):
        lists_of("hmdb51", tmp_path, "--split", "7")


def test_annotations_without_any_of_their_videos_are_refused(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "wave_test_split1.txt").write_text("b.avi 1\nc.avi 2\n")
    with pytest.raises(SystemExit, match="no such folder"):
        lists_of("hmdb51", tmp_path)
    (tmp_path / "videos").mkdir()
    with pytest.raises(SystemExit, match="has none of the 1 videos of train, such as wave/b"):
        lists_of("hmdb51", tmp_path)


def test_lists_survive_being_written_and_read(tmp_path):
    inside, outside = tmp_path / "lists" / "sub" / "ü 3.mp4", tmp_path / "other" / "a b.mp4"
    entries = [VideoEntry(inside, 4), VideoEntry(outside, 0), VideoEntry(outside, 2, start=5, frames=20)]
    path = tmp_path / "lists" / "train.csv"
    write_list(path, entries)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines == ["sub/ü 3.mp4 4", f"{outside} 0", f"{outside} 5 20 2"]
    back = list_videos(path)
    assert [(e.path, e.label, e.start, e.frames) for e in back] == [
        (e.path, e.label, e.start, e.frames) for e in entries
    ]
    write_list(path, [VideoEntry(tmp_path / "lists" / "take 2", 7)])  # the name ends with a number
    assert (list_videos(path)[0].path.name, list_videos(path)[0].label) == ("take 2", 7)
    for name in ("#a.mp4", "a\nb.mp4"):
        with pytest.raises(ValueError, match="cannot stand in a list"):
            write_list(path, [VideoEntry(tmp_path / "lists" / name, 1)])


def test_class_names(tmp_path):
    assert class_names(tmp_path / "val.csv", 3) == ["0", "1", "2"]
    (tmp_path / "labels.txt").write_text("run\njump\n")
    assert class_names(tmp_path / "val.csv", 2) == ["run", "jump"]
    with pytest.raises(ValueError, match="names 2 classes, expected 3"):
        class_names(tmp_path / "val.csv", 3)


@pytest.mark.slow
def test_check_reads_every_video_once_and_reports_what_is_broken(tmp_path):
    write_video(tmp_path / "good ü.mp4")
    write_video(tmp_path / "short.avi", frames=1, codec="mpeg4")
    whole = write_video(tmp_path / "whole.mkv", frames=200).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    damaged = bytearray(write_video(tmp_path / "moov.mp4", frames=200).read_bytes())
    (tmp_path / "truncated.mp4").write_bytes(damaged[: len(damaged) // 2])
    (tmp_path / "empty.webm").touch()
    names = ["good ü.mp4 0", "short.avi 1", "cut.mkv 0", "truncated.mp4 1", "empty.webm 0", "missing.mp4 1"]
    names += [f"{tmp_path / 'whole.mkv'} 1", "good ü.mp4 100 -1 0"]
    (tmp_path / "list.csv").write_text("\n".join(names) + "\n", encoding="utf-8")
    command = [sys.executable, SCRIPT, "check", "--data", tmp_path / "list.csv", "--workers", "2"]
    command += ["--write-good", tmp_path / "good.csv"]
    run = subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 1, run.stderr
    assert "5 of 8 videos are broken" in run.stderr
    report = (tmp_path / "list.csv.broken.txt").read_text(encoding="utf-8").splitlines()
    for line, cause in (
        (4, "cannot be opened"),
        (5, "cannot be opened"),
        (6, "no such file"),
        (8, "it has 40 frames, and its part begins at frame 100"),
    ):
        assert any(f"list.csv:{line} (" in each and cause in each for each in report), report
    good = [entry.path.name for entry in list_videos(tmp_path / "good.csv")]
    assert good == ["good ü.mp4", "short.avi", "whole.mkv"]
    assert "1 videos occur more than once" in run.stdout
