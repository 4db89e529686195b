"""The operations of masked autoencoding, one file each, usable without the rest of the package.

Every file reads downwards: the plain-PyTorch reference, which is the ground truth and the CPU path; the Triton
kernels; their registration with torch, which is how autograd and `torch.compile` know them; and the public function,
which checks its input and takes one or the other (backend.py). Neither indexes with a boolean mask, loops over the
batch, reads back from the device or writes to its input.
"""

from adamae_sampler.ops.add_norm import add_norm
from adamae_sampler.ops.assemble_tokens import assemble_tokens
from adamae_sampler.ops.backend import backend_for, get_backend, set_backend, use_backend
from adamae_sampler.ops.draw_mask import draw_mask
from adamae_sampler.ops.gather_tokens import gather_tokens
from adamae_sampler.ops.head_error import head_error
from adamae_sampler.ops.patch_tokens import patch_tokens
from adamae_sampler.ops.patches import patchify, unpatchify
from adamae_sampler.ops.reconstruction_error import reconstruction_error
from adamae_sampler.ops.sampling_loss import sampling_loss
from adamae_sampler.ops.target import reconstruction_target
from adamae_sampler.ops.thumbnails import thumbnails
from adamae_sampler.ops.token_scores import token_scores

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
