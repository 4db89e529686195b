"""The kernels that read video against the ops' plain-PyTorch references: errors, the fused head, patches, thumbnails."""

import sys

import pytest
import torch
from kernel_inputs import DEVICE, DTYPES, TOLERANCE, assert_close, make_sample, run, run_both

from adamae_sampler import ops

pytest.importorskip("triton", reason="the kernels need Triton")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def make_video(dtype, channels, t, h, w):
    video = torch.rand(2, channels, t, h, w)
    return ((video * 255).to(torch.uint8) if dtype == torch.uint8 else video.to(dtype)).to(DEVICE)


@pytest.mark.parametrize("kind", ["mse", "l1"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("video_dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(("patch", "tubelet", "channels"), [((4, 4), 2, 3), ((3, 5), 1, 1), ((2, 3), 3, 5)])
def test_reconstruction_error(kind, normalize, dtype, video_dtype, patch, tubelet, channels):
    video = make_video(video_dtype, channels, 2 * tubelet, 2 * patch[0], 3 * patch[1])
    idx = make_sample(2, 12, 5).masked_idx
    prediction = torch.randn(2, 7, tubelet * patch[0] * patch[1] * channels).to(DEVICE, dtype)
    how = {"kind": kind, "normalize": normalize, "patch_size": patch, "tubelet_size": tubelet}
    call = lambda p: ops.reconstruction_error(p, video, idx, **how)  # noqa: E731
    (error, grad), (kernel_error, kernel_grad) = run_both(call, prediction, upstream=torch.randn(2, 7, device=DEVICE))
    assert kernel_error.dtype == torch.float32
    assert_close([error], [kernel_error])
    assert_close([grad], [kernel_grad], dtype)


@pytest.mark.parametrize("kind", ["mse", "l1"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("masks", "rows"), [(1, 99), (3, 99), (3, 14), (2, 3)])
def test_head_error(kind, dtype, masks, rows, monkeypatch):
    """Mean, errors and all gradients, in parts of several masks and of less than one, against the reference in fp64."""
    monkeypatch.setattr(sys.modules["adamae_sampler.ops.head_error"], "_CHUNK_BYTES", rows * 96 * dtype.itemsize)
    video, idx = make_video(torch.uint8, 3, 4, 8, 12), make_sample(2 * masks, 12, 5).masked_idx
    leaves = [torch.randn(2 * masks, 7, 20).to(DEVICE, dtype), torch.randn(96, 20, device=DEVICE)]
    leaves += [torch.randn(96, device=DEVICE)]
    call = lambda h, w, b: ops.head_error(h, w, b, video, idx, kind=kind, patch_size=4)[0]  # noqa: E731
    kernel = run("triton", call, leaves, torch.tensor(0.7, device=DEVICE))
    leaves = [leaves[0].double(), *(each.to(dtype).double() for each in leaves[1:])]
    expected = run("torch", call, leaves, torch.tensor(0.7, device=DEVICE, dtype=torch.float64))
    close = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    for want, got in zip(expected, kernel, strict=True):
        assert (got - want).norm() <= close * want.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("video_dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize(("patch", "tubelet", "channels"), [((8, 4), 2, 3), ((3, 6), 1, 1), ((2, 8), 1, 5)])
def test_thumbnails(dtype, video_dtype, patch, tubelet, channels):
    video = make_video(video_dtype, channels, 2 * tubelet, 2 * patch[0], 3 * patch[1])
    scaled = video_dtype == torch.uint8 and channels < 5
    stats = {"mean": [0.5] * channels, "std": [0.1, 0.2, 0.3][:channels]} if scaled else {}
    results = []
    for backend in ("torch", "triton"):
        with ops.use_backend(backend):
            results.append(ops.thumbnails(video, patch_size=patch, tubelet_size=tubelet, dtype=dtype, **stats))
    close = {"rtol": TOLERANCE[dtype]["rtol"], "atol": 1e-5}
    torch.testing.assert_close(results[1], results[0], **close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("video_dtype", [torch.float32, torch.float16, torch.uint8])
@pytest.mark.parametrize(("patch", "tubelet", "channels"), [((4, 4), 2, 3), ((3, 5), 1, 1), ((2, 3), 3, 5)])
def test_patch_tokens(dtype, video_dtype, patch, tubelet, channels):
    """All tokens, some, and those of several masks of a clip; of a video with strides of its own too."""
    video = make_video(video_dtype, channels, 2 * tubelet, 2 * patch[0], 3 * patch[1])
    for x in (video, video.transpose(1, 2).contiguous().transpose(1, 2)):
        for idx in (None, make_sample(2, 12, 5).masked_idx, make_sample(6, 12, 5).visible_idx.flip(1)):
            results = []
            for backend in ("torch", "triton"):
                with ops.use_backend(backend):
                    how = {"patch_size": patch, "tubelet_size": tubelet, "dtype": dtype}
                    results.append(ops.patch_tokens(x, idx, **how))
            close = {"rtol": 0, "atol": 0} if video_dtype == torch.uint8 else TOLERANCE[dtype]
            torch.testing.assert_close(results[1], results[0], **close)


@pytest.mark.parametrize("video_dtype", [torch.float32, torch.uint8])
def test_reconstruction_error_of_several_masks_of_a_clip(video_dtype):
    video, idx = make_video(video_dtype, 3, 4, 8, 12), make_sample(6, 12, 5).masked_idx
    prediction = torch.randn(6, 7, 96).to(DEVICE)
    call = lambda p: ops.reconstruction_error(p, video, idx, patch_size=4)  # noqa: E731
    reference, kernel = run_both(call, prediction, upstream=torch.randn(6, 7, device=DEVICE))
    assert_close(reference, kernel)
    apart = ops.reconstruction_error(prediction, video.repeat_interleave(3, 0), idx, patch_size=4)
    torch.testing.assert_close(reference[0], apart)


def test_reconstruction_error_of_a_mean_std_normalised_strided_video():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    video = torch.randn(2, 4, 8, 12, 3, device=DEVICE).movedim(-1, 1)  # channels last in memory
    idx = make_sample(2, 24, 5).masked_idx.flip(1)
    prediction = torch.randn(48, 19, 2, device=DEVICE).transpose(0, 2)
    before = video.clone(), prediction.clone()
    for normalize in (True, False):
        how = {"patch_size": 4, "tubelet_size": 1, "mean": mean, "std": std, "normalize": normalize}
        call = lambda p: ops.reconstruction_error(p, video, idx, **how)  # noqa: B023, E731
        assert_close(*run_both(call, prediction, upstream=torch.tensor(0.3, device=DEVICE).expand(2, 19)))
    assert torch.equal(video, before[0])
    assert torch.equal(prediction, before[1])


def test_reconstruction_error_of_a_constant_patch_is_finite():
    video, idx = torch.full((1, 3, 2, 32, 32), 0.7, device=DEVICE), make_sample(1, 4, 1).masked_idx
    reference, kernel = run_both(
        lambda p: ops.reconstruction_error(p, video, idx), torch.randn(1, 3, 1536, device=DEVICE)
    )
    assert all(each.isfinite().all() for each in (*reference, *kernel))
