"""The attention of all transformers here, and the choice of torch's kernels for it."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# `prefer_cudnn` tries them in this order.
KERNEL_NAMES = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient",
    SDPBackend.MATH: "math",
}


class Attention(EvaAttention):
    """timm's attention, with biases for q and v and none for k. Its backward pass writes the gradients of q, k and v
    side by side, as the projection reads them, so nothing is copied."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        bias = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, heads, d]
        q, k, v = (each.transpose(1, 2) for each in qkv.unbind(2))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(x))


def prefer_cudnn() -> AbstractContextManager[object]:
    """A context in which `F.scaled_dot_product_attention` tries cuDNN's kernels first, then FlashAttention's, the
    memory-efficient ones and plain products. torch's own order changes with its version."""
    context: AbstractContextManager[object] = sdpa_kernel(list(KERNEL_NAMES), set_priority=True)
    return context


def attention_kernels(model: nn.Module, num_tokens: int, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The attention kernels that torch chooses for the training of a model inside `prefer_cudnn`.

    Args:
        model: a module that contains `Attention`.
        num_tokens: N, tokens of a clip.
        device: device of the training.
        dtype: dtype of the matrix products: autocast's, or else the weights'.

    Returns:
        "cuDNN", "flash", "memory-efficient" or "math"; several names if heads differ in width.
    """
    found: dict[str, None] = {}  # in the order of the model
    for module in model.modules():
        if isinstance(module, Attention):
            width = module.qkv.weight.shape[0] // 3 // module.num_heads
            query = torch.empty(1, module.num_heads, num_tokens, width, device=device, dtype=dtype, requires_grad=True)
            with prefer_cudnn():
                found[KERNEL_NAMES[SDPBackend(torch._fused_sdp_choice(query, query, query))]] = None
    return list(found)
