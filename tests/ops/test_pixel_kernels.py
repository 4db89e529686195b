"""The kernels that read video against the ops' plain-PyTorch references: errors, the fused head, patches, thumbnails."""

import pytest
import torch
from kernel_inputs import DEVICE, DTYPES, TOLERANCE, assert_close, make_sample, run, run_both

from adamae_sampler import ops
from adamae_sampler.ops import head

pytest.importorskip("triton", reason="the kernels need Triton")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def make_video(dtype, channels, t, h, w):
    video = torch.rand(2, channels, t, h, w)
    return ((video * 255).to(torch.uint8) if dtype == torch.uint8 else video.to(dtype)).to(DEVICE)


@pytest.mark.parametrize(
    ("kind", "normalize"),
    [
        ("mse", True),
        ("l1", False),
        pytest.param("mse", False, marks=pytest.mark.slow),
        pytest.param("l1", True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("video_dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(("patch", "tubelet", "channels"), [((4, 4), 2, 3), ((3, 5), 1, 1), ((2, 3), 3, 5)])
def test_reconstruction_error(kind, normalize, dtype, video_dtype, patch, tubelet, channels):
    video = make_video(video_dtype, channels, 2 * tubelet, 2 * patch[0], 3 * patch[1])
    idx = make_sample(2, 12, 9).masked_idx
    prediction = torch.randn(2, 3, tubelet * patch[0] * patch[1] * channels).to(DEVICE, dtype)
    how = {"kind": kind, "normalize": normalize, "patch_size": patch, "tubelet_size": tubelet}
    call = lambda p: ops.reconstruction_error(p, video, idx, **how)  # noqa: E731
    (error, grad), (kernel_error, kernel_grad) = run_both(call, prediction, upstream=torch.randn(2, 3, device=DEVICE))
    assert kernel_error.dtype == torch.float32
    assert_close([error], [kernel_error])
    assert_close([grad], [kernel_grad], dtype)


# The short form has every dtype, both kinds, and chunks of all, most and few of a clip's rows. Other cases are slow.
SHORT = (((3, 6), 0, "mse"), ((3, 6), 0, "l1"), ((2, 2), 1, "mse"), ((3, 99), 2, "mse"), ((1, 99), 1, "l1"))
HEADS = [
    pytest.param(kind, dtype, *sizes, marks=() if (sizes, number, kind) in SHORT else pytest.mark.slow)
    for sizes in ((1, 99), (3, 99), (3, 6), (2, 2))
    for number, dtype in enumerate(DTYPES)
    for kind in ("mse", "l1")
]


@pytest.mark.parametrize(("kind", "dtype", "masks", "rows"), HEADS)
def test_head_error(kind, dtype, masks, rows, monkeypatch):
    """The errors, their mean and all gradients, against the reference in fp64. A chunk holds several masks or less than one."""
    monkeypatch.setattr(head, "_CHUNK_BYTES", rows * 96 * dtype.itemsize)
    video, idx = make_video(torch.uint8, 3, 4, 8, 12), make_sample(2 * masks, 12, 9).masked_idx
    leaves = [torch.randn(2 * masks, 3, 20).to(DEVICE, dtype), torch.randn(96, 20, device=DEVICE)]
    leaves += [torch.randn(96, device=DEVICE)]

    def call(h, w, b):
        mean, error = ops.head_error(h, w, b, video, idx, kind=kind, patch_size=4)
        return torch.cat([mean[None], error.flatten()])

    upstream = torch.zeros(1 + 2 * masks * 3, device=DEVICE)
    upstream[0] = 0.7  # the errors have no gradient
    kernel = run("triton", call, leaves, upstream)
    leaves = [leaves[0].double(), *(each.to(dtype).double() for each in leaves[1:])]
    expected = run("torch", call, leaves, upstream.double())
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
    """All tokens, some of them, and those of several masks of a clip; for a contiguous and a strided video."""
    video = make_video(video_dtype, channels, 2 * tubelet, 2 * patch[0], 3 * patch[1])
    for x in (video, video.transpose(1, 2).contiguous().transpose(1, 2)):
        for idx in (None, make_sample(2, 12, 5).masked_idx, make_sample(6, 12, 5).visible_idx.flip(1)):
            results = []
            for backend in ("torch", "triton"):
                with ops.use_backend(backend):
                    how = {
                        "patch_size": patch,
                        "tubelet_size": tubelet,
                        "dtype": dtype,
                        "offset": 128.0 * (idx is None),
                    }
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


def head_inputs(dtype=torch.float32, batch=2):
    video, idx = make_video(torch.uint8, 3, 4, 8, 12)[:batch], make_sample(batch, 12, 5).masked_idx
    hidden = torch.randn(batch, 7, 20).to(DEVICE, dtype).requires_grad_()
    return hidden, torch.randn(96, 20, device=DEVICE, requires_grad=True), None, video, idx


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_fused_head_runs_in_the_precision_of_autocast(backend):
    """Accelerate casts a model's outputs to fp32, and the head's products run in the dtype of autocast nevertheless."""
    inputs = head_inputs()
    with ops.use_backend(backend), torch.autocast(DEVICE, torch.bfloat16):
        mean, error = ops.head_error(*inputs, patch_size=4)
        half, _ = ops.head_error(inputs[0].bfloat16(), *inputs[1:], patch_size=4)
    assert torch.equal(mean, half)
    assert mean.dtype == error.dtype == torch.float32
    assert torch.autograd.grad(mean, inputs[0])[0].dtype == torch.float32


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_fused_head_without_clips_or_gradients(backend):
    with ops.use_backend(backend):
        mean, error = ops.head_error(*head_inputs(batch=0), patch_size=4)
        mean.backward()
        assert error.shape == (0, 7)
        with torch.no_grad():
            mean, error = ops.head_error(*head_inputs(), patch_size=4)
    assert not mean.requires_grad
    torch.testing.assert_close(mean, error.mean())


def test_sums_of_a_fused_head_fit_half_precision():
    """The sum over 8000 rows is past 65504, the largest fp16 value, but the gradient of their mean is small."""
    video = torch.zeros(500, 1, 1, 8, 8, device=DEVICE)
    idx = torch.arange(16, device=DEVICE).repeat(500, 1)
    hidden = torch.full((500, 16, 4), 9.0, dtype=torch.float16, device=DEVICE)
    weight = torch.full((4, 4), 0.1, device=DEVICE, requires_grad=True)
    with ops.use_backend("torch"):
        how = {"kind": "l1", "normalize": False, "patch_size": 2, "tubelet_size": 1}
        mean, _ = ops.head_error(hidden, weight, None, video, idx, **how)
    torch.testing.assert_close(torch.autograd.grad(mean, weight)[0], torch.full((4, 4), 9 / 4, device=DEVICE))
