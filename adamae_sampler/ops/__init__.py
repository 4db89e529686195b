"""The operations of masked autoencoding, one file each, usable without the rest of the package.

Every file reads downwards: the plain-PyTorch reference, which is the ground truth and the CPU path, then the
public function, which checks its input and calls it. None indexes with a boolean mask, loops over the batch
or reads back from the device.
"""

from adamae_sampler.ops.assemble_tokens import assemble_tokens
from adamae_sampler.ops.draw_mask import draw_mask
from adamae_sampler.ops.gather_tokens import gather_tokens
from adamae_sampler.ops.patches import patchify, unpatchify
from adamae_sampler.ops.reconstruction_error import reconstruction_error, reconstruction_target
from adamae_sampler.ops.sampling_loss import sampling_loss

__all__ = [
    "assemble_tokens",
    "draw_mask",
    "gather_tokens",
    "patchify",
    "reconstruction_error",
    "reconstruction_target",
    "sampling_loss",
    "unpatchify",
]
