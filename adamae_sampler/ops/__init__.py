"""The operations of masked autoencoding. README.md in this folder tells how to use them by themselves.

One file holds one operation. It starts with the reference in plain PyTorch, which defines the result and runs on CPUs.
The Triton kernels follow, then their registration with torch, for autograd and `torch.compile`. The public function
comes last: it checks its input, then takes the reference or the kernels (backend.py). Both leave the input unchanged,
and neither waits for the device, indexes with a boolean mask or loops over the batch.

    draw.py         draw_mask             patches.py      patchify, unpatchify
    gather.py       gather_tokens         target.py       reconstruction_target
    assemble.py     assemble_tokens       pixel_error.py  reconstruction_error
    pixel_rows.py   patch_tokens          head.py         head_error
    thumbnail.py    thumbnails            sampling.py     sampling_loss
    norm.py         add_norm              score.py        token_scores

patch_format.py holds the description of patches and normalisation that all operations on pixels take.
"""

from adamae_sampler.ops.assemble import assemble_tokens
from adamae_sampler.ops.backend import backend_for, get_backend, set_backend, use_backend
from adamae_sampler.ops.draw import draw_mask
from adamae_sampler.ops.gather import gather_tokens
from adamae_sampler.ops.head import head_error
from adamae_sampler.ops.moved import name_new_modules
from adamae_sampler.ops.norm import add_norm
from adamae_sampler.ops.patches import patchify, unpatchify
from adamae_sampler.ops.pixel_error import reconstruction_error
from adamae_sampler.ops.pixel_rows import patch_tokens
from adamae_sampler.ops.sampling import sampling_loss
from adamae_sampler.ops.score import token_scores
from adamae_sampler.ops.target import reconstruction_target
from adamae_sampler.ops.thumbnail import thumbnails

name_new_modules()

__all__ = [
    "add_norm",
    "assemble_tokens",
    "backend_for",
    "draw_mask",
    "gather_tokens",
    "get_backend",
    "head_error",
    "patch_tokens",
    "patchify",
    "reconstruction_error",
    "reconstruction_target",
    "sampling_loss",
    "set_backend",
    "thumbnails",
    "token_scores",
    "unpatchify",
    "use_backend",
]
