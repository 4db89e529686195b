"""The method as the official code formulates it, the baseline that the package is measured against.

Written for this benchmark from the method's description, operation by operation: attention with stored score
matrices, position tables copied at each step, softmax and multinomial, boolean-mask indexing, a target built by
rearranging the whole video, one Categorical per clip in a Python loop. The parameters have the official names, so
`load_checkpoint` reads its state dict, and the benchmark can check that both compute the same before it times them.

The functions come first, one for each op of the package; the model and `official_loss` are made of them.
B clips, N tokens, K visible, M masked, D width, P values of a patch; True in a mask = masked.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from adamae_sampler.models.layers import sinusoid_table


def official_draw(scores: Tensor, num_visible: int) -> tuple[Tensor, Tensor]:
    """scores [B, N] -> probs [B, N] and a mask [B, N] that leaves K tokens of each clip visible."""
    probs = torch.nan_to_num(scores).softmax(dim=-1)
    visible_idx = torch.multinomial(probs, num_samples=num_visible, replacement=False)
    mask = torch.ones((scores.shape[0], scores.shape[1])).to(scores.device, non_blocking=True)
    mask.scatter_(dim=-1, index=visible_idx, value=0.0)
    return probs, mask.flatten(1).to(torch.bool)


def official_indices(mask: Tensor) -> tuple[Tensor, Tensor]:
    """mask [B, N] -> visible [B, K] and masked [B, M] indices, as a boolean index finds them: by `nonzero`."""
    batch = mask.shape[0]
    return (~mask).nonzero()[:, 1].reshape(batch, -1), mask.nonzero()[:, 1].reshape(batch, -1)


def official_gather(tokens: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
    """tokens [B, N, D], pos [1, N, D] -> the visible ones with their position, [B, K, D]."""
    x = tokens + pos.type_as(tokens).to(tokens.device).clone().detach()
    return x[~mask].reshape(x.shape[0], -1, x.shape[2])


def official_assemble(visible: Tensor, mask_token: Tensor, pos: Tensor, mask: Tensor) -> Tensor:
    """visible [B, K, D], mask_token [1, 1, D], pos [1, N, D] -> the decoder's input [B, N, D], visible first."""
    batch, _, width = visible.shape
    pos = pos.expand(batch, -1, -1).type_as(visible).to(visible.device).clone().detach()
    pos_visible = pos[~mask].reshape(batch, -1, width)
    pos_masked = pos[mask].reshape(batch, -1, width)
    return torch.cat([visible + pos_visible, mask_token + pos_masked], dim=1)


def official_restore(visible: Tensor, mask_token: Tensor, pos: Tensor, restore_idx: Tensor) -> Tensor:
    """As `official_assemble`, every token in its place, as MAE's decoder does it; AdaMAE has no such order.

    restore_idx [B, N] is where each token stands in (visible ++ masked).
    """
    batch, num_visible, width = visible.shape
    fill = mask_token.repeat(batch, restore_idx.shape[1] - num_visible, 1)
    full = torch.cat([visible, fill], dim=1)
    full = torch.gather(full, dim=1, index=restore_idx.unsqueeze(-1).repeat(1, 1, width))
    return full + pos.type_as(visible)


def official_error(
    prediction: Tensor,
    video: Tensor,
    mask: Tensor,
    patch_size: int = 16,
    tubelet_size: int = 2,
    kind: Literal["mse", "l1"] = "mse",
    normalize: bool = True,
) -> Tensor:
    """prediction [B, M, P], mean/std-normalised video [B, 3, T, H, W] -> the error of each masked token [B, M]."""
    with torch.no_grad():
        mean = torch.as_tensor(IMAGENET_DEFAULT_MEAN).to(video.device)[None, :, None, None, None]
        std = torch.as_tensor(IMAGENET_DEFAULT_STD).to(video.device)[None, :, None, None, None]
        pixels = video * std + mean
        patches = rearrange(
            pixels, "b c (t p0) (h p1) (w p2) -> b (t h w) (p0 p1 p2) c", p0=tubelet_size, p1=patch_size, p2=patch_size
        )
        if normalize:
            centred = patches - patches.mean(dim=-2, keepdim=True)
            patches = centred / (patches.var(dim=-2, unbiased=True, keepdim=True).sqrt() + 1e-6)
        target = rearrange(patches, "b n p c -> b n (p c)")
    target = target[mask].reshape(video.shape[0], -1, target.shape[2])
    loss = F.mse_loss if kind == "mse" else F.l1_loss
    return loss(prediction, target, reduction="none").mean(dim=-1)


def official_sampling_loss(probs: Tensor, mask: Tensor, error: Tensor) -> Tensor:
    """probs [B, N], error [B, M] -> the sampling loss, a scalar."""
    sampling = torch.zeros(probs.shape[0]).to(error.device)
    for clip in range(probs.shape[0]):
        distribution = torch.distributions.Categorical(probs=probs[clip])
        log_probs = distribution.log_prob(torch.arange(0, probs.shape[1], 1).to(probs.device))
        sampling[clip] = -(log_probs[mask[clip]] * error[clip].detach()).mean()
    return sampling.mean()


class EagerAttention(nn.Module):
    def __init__(self, width: int, heads: int, qv_bias: bool, drop: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width)) if qv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if qv_bias else None
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0], qkv[1], qkv[2]
        query = query * (width // self.heads) ** -0.5
        weights = self.attn_drop((query @ key.transpose(-2, -1)).softmax(dim=-1))  # [B, heads, N, N], stored
        mixed = (weights @ value).transpose(1, 2).reshape(batch, tokens, -1)
        return self.proj_drop(self.proj(mixed))


class EagerMlp(nn.Module):
    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.act(self.fc1(x))))


class EagerBlock(nn.Module):
    def __init__(self, width: int, heads: int, qv_bias: bool = True, drop: float = 0.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = EagerAttention(width, heads, qv_bias, drop)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = EagerMlp(width, drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class EagerPatchEmbed(nn.Module):
    def __init__(self, width: int, channels: int, tubelet: int, patch: int) -> None:
        super().__init__()
        size = (tubelet, patch, patch)
        self.proj = nn.Conv3d(channels, width, kernel_size=size, stride=size)

    def forward(self, video: Tensor) -> Tensor:
        return self.proj(video).flatten(2).transpose(1, 2)


class EagerEncoder(nn.Module):
    def __init__(self, tokens: int, width: int, depth: int, heads: int, visible: int, patch: int, tubelet: int) -> None:
        super().__init__()
        self.visible = visible
        self.patch_embed = EagerPatchEmbed(width, 3, tubelet, patch)
        self.pos_embed = sinusoid_table(tokens, width)  # a plain tensor: moved and copied at each step
        self.blocks = nn.ModuleList(EagerBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pos_embed_probs = nn.Parameter(torch.zeros(1, tokens, width))
        self.get_token_probs = nn.Sequential(
            EagerBlock(width, 8, qv_bias=False, drop=0.1, eps=1e-5), nn.Linear(width, 1), nn.Flatten(start_dim=1)
        )

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.get_token_probs(x + self.pos_embed_probs.type_as(x).to(x.device).clone())
        return official_draw(logits, self.visible)

    def forward(self, video: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        x = self.patch_embed(video)
        probs, drawn = self.draw(x)
        mask = drawn if mask is None else mask
        x = official_gather(x, mask, self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), probs, mask


class EagerDecoder(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, values: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(EagerBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, values)

    def forward(self, x: Tensor, masked: int) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -masked:]))


class OfficialFormulation(nn.Module):
    """The masked autoencoder; `forward` returns prediction [B, M, P], probs [B, N] and the mask [B, N]."""

    def __init__(
        self,
        img_size: int = 224,
        num_frames: int = 16,
        patch_size: int = 16,
        tubelet_size: int = 2,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 384,
        decoder_depth: int = 4,
        decoder_num_heads: int = 6,
        mask_ratio: float = 0.95,
    ) -> None:
        super().__init__()
        tokens = (num_frames // tubelet_size) * (img_size // patch_size) ** 2
        visible = int(tokens * (1 - mask_ratio))
        self.encoder = EagerEncoder(tokens, embed_dim, depth, num_heads, visible, patch_size, tubelet_size)
        self.decoder = EagerDecoder(
            decoder_embed_dim, decoder_depth, decoder_num_heads, 3 * tubelet_size * patch_size**2
        )
        self.encoder_to_decoder = nn.Linear(embed_dim, decoder_embed_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.pos_embed = sinusoid_table(tokens, decoder_embed_dim)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, video: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        x, probs, mask = self.encoder(video, mask)
        x = self.encoder_to_decoder(x)
        num_masked = mask.shape[1] - x.shape[1]
        x = official_assemble(x, self.mask_token, self.pos_embed, mask)
        return self.decoder(x, num_masked), probs, mask


def official_loss(
    prediction: Tensor, video: Tensor, probs: Tensor, mask: Tensor, patch_size: int = 16, tubelet_size: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, reconstruction, sampling) with the normalised target, from a mean/std-normalised video."""
    error = official_error(prediction, video, mask, patch_size, tubelet_size)  # [B, M]
    reconstruction, sampling = error.mean(), official_sampling_loss(probs, mask, error)
    return reconstruction + 1e-4 * sampling, reconstruction, sampling
