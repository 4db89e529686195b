"""The training engines of the research repositories train patched models, unchanged or with the README's edit.

The tests need checkouts (see `hosts.py`). Each engine runs in a new process, since the engines take module names such
as `utils`.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hosts import CHECKOUTS, checkout

TESTS = Path(__file__).parent
ROOT = TESTS.parents[1]

# The engines import modules that are gone (torch._six), not public (torch.fb), or of no use here (tensorboardX).
PRELUDE = f"""
import argparse, sys, types
from unittest import mock
import torch
for name in ("torch._six", "torch.fb", "torch.fb.rendezvous", "torch.fb.rendezvous.zeus", "tensorboardX"):
    sys.modules.setdefault(name, mock.MagicMock(inf=float("inf")))
torch.cuda.synchronize = lambda: None
sys.path[:0] = [{str(TESTS)!r}, {str(ROOT)!r}]
import hosts
from adamae_sampler import patch

def scaler(loss, optimizer, **_):
    if loss.requires_grad:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return 0.0
scaler.state_dict = lambda: {{"scale": 1.0}}
# The engines call the loss scaler and read its state.
"""

MAE = """
case = next(case for case in hosts.CASES if case.name == {name!r})
model = patch(case.make(), {ratio})
before = [each.clone() for each in model.sampler.parameters()]
engine = hosts.import_from(hosts.checkout({folder!r}){parent}, {module!r})
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
args = argparse.Namespace(accum_iter=1, mask_ratio={ratio}, lr=1e-2, min_lr=0.0, warmup_epochs=0, epochs=10,
                          repeat_aug=1, clip_grad=None, num_checkpoint_del=0)
loader = [(case.inputs(4, seed), torch.zeros(4)) for seed in range(10)]
losses = [engine.train_one_epoch(model, loader, optimizer, torch.device("cpu"), epoch, scaler, args=args{more})["loss"]
          for epoch in range(2)]
"""

VIDEOMAE = """
source = (hosts.checkout({folder!r}) / "engine_for_pretraining.py").read_text()
for old, new in {edits!r}:
    assert old in source, old
    source = source.replace(old, new)
start, end = source.index("        with torch.no_grad():"), source.index("labels = ")
source = source[:start] + source[source.index("\\n", end) + 1:]
sys.path.insert(0, str(hosts.checkout({folder!r})))
engine = types.ModuleType("engine")
exec(compile(source, "engine_for_pretraining.py", "exec"), vars(engine))
case = next(case for case in hosts.CASES if case.name == {name!r})
model = patch(case.make(), 0.75)
before = [each.clone() for each in model.sampler.parameters()]
optimizer = torch.optim.AdamW([dict(params=model.parameters(), lr_scale=1.0)], lr=1e-2)
loader = {loader}
losses = [engine.train_one_epoch(model, loader, optimizer, torch.device("cpu"), epoch, scaler, patch_size=8,
                                 start_steps=0)["loss"] for epoch in range(2)]
"""

CHECK = """
assert losses[1] < 0.95 * losses[0], losses
changed = [not torch.equal(old, new) for old, new in zip(before, model.sampler.parameters())]
assert all(changed), changed
print("trained", losses)
"""

VIDEOMAE_EDITS = [  # from adamae_sampler/integrations/README.md
    ("import utils\n", "import utils\nfrom adamae_sampler import AdaMAELoss\n"),
    ("loss_func = nn.MSELoss()", "loss_func = AdaMAELoss(normalize=normlize_target, patch_size=patch_size, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)"),
    ("videos, bool_masked_pos = batch", "videos = batch[0]"),
    ("        bool_masked_pos = bool_masked_pos.to(device, non_blocking=True).flatten(1).to(torch.bool)\n", ""),
    ("outputs = model(videos, bool_masked_pos)", "outputs, sample = model(videos)"),
    ("loss = loss_func(input=outputs, target=labels)", "loss = loss_func(outputs, videos, sample).loss"),
]  # fmt: skip

OLD_TIMM = "from adamae_sampler.integrations import old_timm\nold_timm.install()\n"  # from the README too

needs_checkouts = pytest.mark.skipif(not CHECKOUTS, reason="ADAMAE_SAMPLER_HOSTS names no folder of checkouts")


def run(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "trained" in done.stdout


@needs_checkouts
def test_mae_as_it_is():
    run(
        PRELUDE + MAE.format(name="mae", ratio=0.75, folder="mae", parent="", module="engine_pretrain", more="") + CHECK
    )


@needs_checkouts
def test_mae_st_as_it_is():
    fields = {"folder": "mae_st", "parent": ".parent", "module": "mae_st.engine_pretrain", "more": ", fp32=True"}
    run(PRELUDE + MAE.format(name="mae_st", ratio=0.9, **fields) + CHECK)


@needs_checkouts
def test_videomae_with_the_readmes_edit():
    loader = "[(case.inputs(4, seed),) for seed in range(10)]"  # no mask from the loader
    script = VIDEOMAE.format(folder="VideoMAE", name="videomae", edits=VIDEOMAE_EDITS, loader=loader)
    run(PRELUDE + script + CHECK)


@needs_checkouts
@pytest.mark.parametrize("decode_mask", ["decode_masked_pos", "None"])
def test_videomae_v2_with_the_readmes_edit(decode_mask):
    source = (checkout("VideoMAEv2") / "engine_for_pretraining.py").read_text()
    start = source.index("        if loss_scaler is None:\n            outputs")
    old = source[start : source.index("        loss_value = loss.item()")]
    new = (
        f"        outputs, sample = model(images, decode_mask={decode_mask})\n"
        f"        loss = loss_func(outputs, images, sample, {decode_mask}).loss\n"
    )
    norm = "AdaMAELoss(normalize=normlize_target, patch_size=patch_size, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)"
    transfer = source[source.index("        bool_masked_pos = bool_masked_pos.to(") :]
    edits = [
        ("import utils\n", "import utils\nfrom adamae_sampler import AdaMAELoss\n"),
        ("    print_freq = 20\n", f"    print_freq = 20\n    loss_func = {norm}\n"),
        ("images, bool_masked_pos, decode_masked_pos = batch", "images, _, decode_masked_pos = batch"),
        (transfer[: transfer.index("        decode_masked_pos")], ""),
        (old, new),
    ]
    loader = "[(case.inputs(4, seed), None, hosts.random_sample(4, 128, 64, seed).mask) for seed in range(10)]"
    script = VIDEOMAE.format(folder="VideoMAEv2", name="videomae_v2", edits=edits, loader=loader)
    run(PRELUDE + script + CHECK)


# What a machine without a GPU, decord, OpenCV and tensorboardX needs, and a small model.
RUNNER = """
import runpy, sys, types
from unittest import mock
import av, numpy, torch
torch.cuda.synchronize = lambda: None
torch.cuda.amp.GradScaler.state_dict = lambda self: {"scale": 1.0}
torch.amp.GradScaler.state_dict = lambda self: {"scale": 1.0}
class VideoReader:
    def __init__(self, path, **_):
        with av.open(path) as container:
            self.frames = numpy.stack([each.to_ndarray(format="rgb24") for each in container.decode(video=0)])
    def __len__(self): return len(self.frames)
    def get_batch(self, index): return types.SimpleNamespace(asnumpy=lambda: self.frames[index])
    def seek(self, _): pass
sys.modules["decord"] = types.SimpleNamespace(VideoReader=VideoReader, cpu=lambda index: index)
sys.modules["cv2"] = types.ModuleType("cv2")
sys.modules["tensorboardX"] = mock.MagicMock()
sys.path.insert(0, ".")
sys.argv = ["run_mae_pretraining.py", *sys.argv[1:]]
runpy.run_path("run_mae_pretraining.py", run_name="__main__")
"""

SMALL = """

@register_model
def pretrain_videomae_small_patch16_32(pretrained=False, **kwargs):
    return PretrainVisionTransformer(
        img_size=32, encoder_embed_dim=48, encoder_depth=2, encoder_num_heads=2, encoder_num_classes=0,
        decoder_num_classes=1536, decoder_embed_dim=32, decoder_num_heads=2, qkv_bias=True, **kwargs)
"""


@needs_checkouts
def test_videomae_from_its_script_to_a_resumed_run(tmp_path):
    """The edits are those of the README; the model is a small one."""
    code = tmp_path / "VideoMAE"
    shutil.copytree(checkout("VideoMAE"), code, ignore=shutil.ignore_patterns(".git"))
    for name, edits in (
        ("engine_for_pretraining.py", VIDEOMAE_EDITS),
        ("run_mae_pretraining.py", [
            ("import argparse\n", "import argparse\nfrom adamae_sampler import patch\n" + OLD_TIMM),
            ("    model = get_model(args)\n", "    model = get_model(args)\n    model = patch(model, mask_ratio=args.mask_ratio)\n"),
        ]),
    ):  # fmt: skip
        source = (code / name).read_text()
        for old, new in edits:
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        if name.startswith("engine"):
            start = source.index("        with torch.no_grad():")
            source = source[:start] + source[source.index("\n", source.index("labels = ")) + 1 :]
        (code / name).write_text(source)
    with (code / "modeling_pretrain.py").open("a") as file:
        file.write(SMALL)
    (code / "runner.py").write_text(RUNNER)
    lines = [f"{each} 0" for each in small_videos(tmp_path, 4)]
    (tmp_path / "list.csv").write_text("\n".join(lines))

    def train(epochs):
        arguments = (
            f"--data_path {tmp_path}/list.csv --mask_type tube --mask_ratio 0.75 --epochs {epochs} --decoder_depth 1 "
            f"--model pretrain_videomae_small_patch16_32 --batch_size 2 --num_frames 16 --sampling_rate 1 --input_size 32 "
            f"--opt_betas 0.9 0.95 --warmup_epochs 0 --save_ckpt_freq 1 --output_dir {tmp_path}/out --num_workers 1 "
            f"--log_dir {tmp_path}/out --device cpu --no_pin_mem --lr 1e-2"
        )
        command = [sys.executable, "runner.py", *arguments.split()]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    train(1)
    assert "Auto resume checkpoint" in train(2)
    log = [json.loads(line) for line in (tmp_path / "out" / "log.txt").read_text().splitlines()]
    assert [each["epoch"] for each in log] == [0, 1]
    first, second = (
        torch.load(tmp_path / "out" / f"checkpoint-{epoch}.pth", weights_only=False)["model"] for epoch in (0, 1)
    )
    sampler = [name for name in first if name.startswith("sampler.")]
    assert sampler
    assert all(not torch.equal(first[name], second[name]) for name in sampler if "norm" not in name)


def small_videos(folder, count):
    for index in range(count):
        with av.open(str(folder / f"{index}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width = stream.height = 64
            for frame in range(24):
                pixels = np.random.default_rng(frame + 100 * index).integers(0, 255, (8, 8, 3), dtype=np.uint8)
                image = av.VideoFrame.from_ndarray(pixels.repeat(8, 0).repeat(8, 1), format="rgb24")
                container.mux(stream.encode(image))
            container.mux(stream.encode())
        yield folder / f"{index}.mp4"


def test_the_readme_shows_the_edit_that_is_tested():
    readme = (ROOT / "adamae_sampler" / "integrations" / "README.md").read_text()
    block = readme[readme.index("```diff") :]
    block = block[: block.index("```", 3)]
    shown = {line[1:].strip() for line in block.splitlines() if line.startswith("+")}
    tested = {line.strip() for old, new in VIDEOMAE_EDITS for line in new.splitlines() if line not in old.splitlines()}
    assert shown == tested
    assert len(shown) == 5
    assert OLD_TIMM in readme
    assert "`model = patch(model, mask_ratio=args.mask_ratio)` after `get_model(args)`" in readme
