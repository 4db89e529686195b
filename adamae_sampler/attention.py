"""The attention of all transformers here, and which of torch's kernels it runs."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# In the order that `prefer_cudnn` asks for.
KERNEL_NAMES = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient",
    SDPBackend.MATH: "math",
}


class Attention(EvaAttention):
    """timm's attention whose q and v have biases and k has none. The gradients of q, k and v are written side by side,
    as the projection's backward pass reads them, and not copied there."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        bias = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, heads, d]
        q, k, v = (each.transpose(1, 2) for each in qkv.unbind(2))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(x))


def prefer_cudnn() -> AbstractContextManager[object]:
    """Within it `F.scaled_dot_product_attention` takes cuDNN's kernels where they run, then FlashAttention's, the
    memory-efficient ones and plain products, in that order. torch's own order changes with its version."""
    context: AbstractContextManager[object] = sdpa_kernel(list(KERNEL_NAMES), set_priority=True)
    return context


def attention_kernels(model: nn.Module, num_tokens: int, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Names of the kernels that a model's attention trains with inside `prefer_cudnn`, as torch chooses them: "cuDNN",
    "flash", "memory-efficient" or "math"; one or, where heads differ in width, several.

    Args:
        model: with `Attention` in it.
        num_tokens: N, tokens of a clip.
        device: where it will run.
        dtype: of its products, autocast's or the weights'.
    """
    found: dict[str, None] = {}  # in the order of the model
    for module in model.modules():
        if isinstance(module, Attention):
            width = module.qkv.weight.shape[0] // 3 // module.num_heads
            query = torch.empty(1, module.num_heads, num_tokens, width, device=device, dtype=dtype, requires_grad=True)
            with prefer_cudnn():
                found[KERNEL_NAMES[SDPBackend(torch._fused_sdp_choice(query, query, query))]] = None
    return list(found)
