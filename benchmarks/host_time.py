"""Host time of the package's ops, kernels left out: what a call costs before and after Triton launches anything.

    python -m benchmarks.host_time        # a few seconds on one core of a CPU

Checks, autograd, dispatch and allocations run as for a GPU, on CPU tensors; a launch does nothing. The backward pass is
`torch.autograd.grad`, whose own time, that of `x.neg()`, is in the line before the last. The last is a whole step of
zero clips under autocast, with as many operators as ViT-B's has and narrower weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import timm
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from adamae_sampler import AdaMAELoss, MaskSample, mask, ops
from adamae_sampler.ops import assemble, backend, checks, draw
from benchmarks.core.tables import table

CLIPS, N, K, D = 2, 64, 16, 8


def calls() -> dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]]:
    """Each op as a function of the tensors that get a gradient, and these tensors."""
    sample = _sample()
    pos, ones, video = torch.randn(1, N, D), torch.ones(D), torch.zeros(CLIPS, 3, 2, 32, 32, dtype=torch.uint8)
    x, visible = torch.randn(CLIPS, N, D), torch.randn(CLIPS, K, D)
    prediction, hidden = torch.randn(CLIPS, N - K, 96), torch.randn(CLIPS, N - K, D)
    error = torch.rand(CLIPS, N - K)
    sizes: dict[str, Any] = {"patch_size": 4, "tubelet_size": 2}
    weight = torch.randn(96, D)
    return {
        "draw_mask": (lambda scores: ops.draw_mask(scores, K).log_probs, (x[..., 0],)),
        "gather_tokens": (lambda x: ops.gather_tokens(x, sample.visible_idx, pos), (x,)),
        "assemble_tokens": (lambda v, m: ops.assemble_tokens(v, m, pos, sample), (visible, ones)),
        "patch_tokens": (lambda _: ops.patch_tokens(video, **sizes), ()),
        "thumbnails": (lambda _: ops.thumbnails(video, **sizes), ()),
        "add_norm": (lambda x, b: ops.add_norm(x, b, ones, ones)[1], (x, x)),
        "token_scores": (lambda x: ops.token_scores(x, ones, ones[:1]), (x,)),
        "reconstruction_error": (
            lambda p: ops.reconstruction_error(p, video, sample.masked_idx, **sizes),
            (prediction,),
        ),
        "head_error": (
            lambda h, w: ops.head_error(h, w, None, video, sample.masked_idx, **sizes)[0],
            (hidden, weight),
        ),
        "sampling_loss": (lambda log_probs: ops.sampling_loss(log_probs, sample.masked_idx, error), (x[..., 0],)),
        "torch.neg": (torch.neg, (x,)),
    }


def zero_clips_step() -> Callable[[], None]:
    """A step in which Python, dispatch, autograd and AdamW of small weights take all the time."""
    name, sizes = "pretrain_adamae_vit_base_patch16_224", {"img_size": 64, "num_frames": 4, "mask_ratio": 0.75}
    model = timm.create_model(name, embed_dim=96, decoder_embed_dim=48, fused_head=True, **sizes)
    criterion, optimizer = AdaMAELoss(fused_head=True), torch.optim.AdamW(model.parameters(), fused=True)
    video = torch.empty(0, 3, 4, 64, 64, dtype=torch.uint8)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            prediction, sample = model(video)
            loss = criterion(prediction, video, sample).loss
        loss.backward()
        optimizer.step()

    return step


def _sample() -> MaskSample:
    with ops.use_backend("torch"):
        return ops.draw_mask(torch.zeros(CLIPS, N), K)


# These replace what needs a GPU. They are plain functions, since a call of a `Mock` takes as long as an op.
def _launch_nothing(*_: object, **__: object) -> None:
    """A kernel on its grid."""


def _on_any_grid(*_: object) -> Callable[..., None]:
    return _launch_nothing


def _no_obstacle(_: object) -> str:
    return ""


def _not_free_to_read(_: object) -> bool:
    """Values of CPU tensors are checked, those on a GPU are not."""
    return False


def microseconds(call: Callable[[], object], repeats: int = 200) -> float:
    """The least of several mean times of a call."""
    call()
    best = float("inf")
    for _ in range(15):
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        best = min(best, (time.perf_counter() - began) / repeats)
    return 1e6 * best


def main() -> None:
    """Measures every op and prints the table."""
    torch.set_num_threads(1)
    ready = calls()
    rows: list[tuple[str, str, str]] = []
    with (
        mock.patch.object(JITFunction, "__getitem__", _on_any_grid),
        mock.patch.object(backend, "_find_obstacle", _no_obstacle),
        mock.patch.object(checks, "free_to_read", _not_free_to_read),
        mock.patch.object(mask, "free_to_read", _not_free_to_read),
        mock.patch.object(assemble, "free_to_read", _not_free_to_read),
        mock.patch.object(draw, "free_to_read", _not_free_to_read),
        ops.use_backend("triton"),
    ):
        for name, (op, tensors) in ready.items():
            leaves = [each.clone().requires_grad_() for each in tensors]
            arguments = leaves or [torch.empty(0)]
            forward = microseconds(lambda op=op, arguments=arguments: op(*arguments))  # type: ignore[misc]
            back = ""
            if leaves:
                out = op(*leaves)
                cotangent = torch.ones_like(out)
                grads = lambda out=out, leaves=leaves, up=cotangent: torch.autograd.grad(  # noqa: E731
                    out, leaves, up, retain_graph=True
                )
                back = f"{microseconds(grads):.0f} us"
            rows.append((name, f"{forward:.0f} us", back))
        rows.append(("a whole step of zero clips", f"{microseconds(zero_clips_step(), repeats=10):.0f} us", "within"))
    columns = [("op", lambda row: row[0]), ("call", lambda row: row[1]), ("backward pass", lambda row: row[2])]
    print(table(columns, rows))


if __name__ == "__main__":
    main()
