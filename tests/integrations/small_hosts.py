"""Masked autoencoders with the interfaces of the research repositories, for machines without their code.

They are written from scratch on timm's blocks, in few lines, with the same class and method names, arguments, shapes
and losses. `hosts.py` uses the real code instead where checkouts exist.
"""

import torch
from einops import rearrange
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint


def blocks(width, depth):
    return nn.ModuleList(Block(width, 4, qkv_bias=True) for _ in range(depth))


class ImageEmbed(nn.Module):
    """The interface of timm's PatchEmbed that mae uses."""

    def __init__(self, img_size, patch_size, in_chans, width):
        super().__init__()
        self.img_size = img_size if isinstance(img_size, tuple) else (img_size, img_size)
        self.patch_size = (patch_size, patch_size)
        self.num_patches = self.img_size[0] // patch_size * (self.img_size[1] // patch_size)
        self.proj = nn.Conv2d(in_chans, width, patch_size, patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class VideoEmbed(nn.Module):
    """The patch embedding of mae_st, with tokens [B, T, H W, D]; with `flat` the one of VideoMAE, with [B, N, D]."""

    def __init__(self, img_size, patch_size, in_chans, width, frames, t_patch_size, flat):
        super().__init__()
        self.img_size = img_size if isinstance(img_size, tuple) else (img_size, img_size)
        self.patch_size = (patch_size, patch_size)
        self.frames, self.t_patch_size, self.flat = frames, t_patch_size, flat
        self.input_size = (frames // t_patch_size, *(each // patch_size for each in self.img_size))
        self.num_patches = self.input_size[0] * self.input_size[1] * self.input_size[2]
        kernel = (t_patch_size, patch_size, patch_size)
        self.proj = nn.Conv3d(in_chans, width, kernel, kernel)

    def forward(self, x):
        return rearrange(self.proj(x), "b d t h w -> b (t h w) d" if self.flat else "b d t h w -> b t (h w) d")


class MaskedAutoencoderViT(nn.Module):
    """Stands in for mae's model."""

    def __init__(self, img_size=32, patch_size=4, in_chans=3, width=32, depth=2, decoder_width=16, norm_pix_loss=True):
        super().__init__()
        self.make(ImageEmbed(img_size, patch_size, in_chans, width), width, depth, decoder_width, norm_pix_loss)
        self.decoder_pred = nn.Linear(decoder_width, patch_size**2 * in_chans)

    def make(self, patch_embed, width, depth, decoder_width, norm_pix_loss):
        self.patch_embed, self.norm_pix_loss = patch_embed, norm_pix_loss
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + patch_embed.num_patches, width), requires_grad=False)
        self.blocks, self.norm = blocks(width, depth), nn.LayerNorm(width)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_width))
        shape = 1, 1 + patch_embed.num_patches, decoder_width
        self.decoder_pos_embed = nn.Parameter(0.02 * torch.randn(shape), requires_grad=False)
        self.decoder_blocks, self.decoder_norm = blocks(decoder_width, 1), nn.LayerNorm(decoder_width)

    def patchify(self, imgs):
        p = self.patch_embed.patch_size[0]
        return rearrange(imgs, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)

    def random_masking(self, x, mask_ratio):
        keep = int(x.shape[1] * (1 - mask_ratio))
        shuffle = torch.rand(x.shape[:2], device=x.device).argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        mask = (restore >= keep).float()
        return x.gather(1, shuffle[:, :keep, None].expand(-1, -1, x.shape[2])), mask, restore, shuffle[:, :keep]

    def forward_encoder(self, x, mask_ratio):
        x, mask, restore, *_ = self.random_masking(self.patch_embed(x) + self.pos_embed[:, 1:], mask_ratio)
        return self.encode(x), mask, restore

    def encode(self, x):
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_decoder(self, x, ids_restore):
        x = self.decoder_embed(x)
        hidden = self.mask_token.expand(x.shape[0], ids_restore.shape[1] + 1 - x.shape[1], -1)
        full = torch.cat([x[:, 1:], hidden], dim=1).gather(1, ids_restore[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], full], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def target(self, imgs):
        target = self.patchify(imgs)
        if not self.norm_pix_loss:
            return target
        return (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()

    def forward_loss(self, imgs, pred, mask):
        loss = (pred - self.target(imgs)).square().mean(-1)
        return (loss * mask).sum() / mask.sum()

    def forward(self, imgs, mask_ratio=0.75):
        latent, mask, restore = self.forward_encoder(imgs, mask_ratio)
        pred = self.forward_decoder(latent, restore)
        return self.forward_loss(imgs, pred, mask), pred, mask


class VideoMaskedAutoencoderViT(MaskedAutoencoderViT):
    """Stands in for mae_st's model, with a class token and one position table."""

    def __init__(self, img_size=32, patch_size=8, frames=8, t_patch_size=2, pred_t_dim=4, width=32, **options):
        nn.Module.__init__(self)
        embed = VideoEmbed(img_size, patch_size, 3, width, frames, t_patch_size, flat=False)
        self.make(embed, width, 2, 16, norm_pix_loss=True)
        self.pred_t_dim, self.t_pred_patch_size = pred_t_dim, t_patch_size * pred_t_dim // frames
        self.decoder_pred = nn.Linear(16, self.t_pred_patch_size * patch_size**2 * 3)

    def patchify(self, imgs):
        frames = torch.linspace(0, imgs.shape[2] - 1, self.pred_t_dim).long()
        p, u = self.patch_embed.patch_size[0], self.t_pred_patch_size
        return rearrange(imgs[:, :, frames], "b c (t u) (h p) (w q) -> b (t h w) (u p q c)", u=u, p=p, q=p)

    def forward_encoder(self, x, mask_ratio):
        tokens = self.patch_embed(x).flatten(1, 2)
        x, mask, restore, keep = self.random_masking(tokens, mask_ratio)
        positions = self.pos_embed[:, 1:].expand(x.shape[0], -1, -1)
        x = x + positions.gather(1, keep[..., None].expand(-1, -1, x.shape[2]))
        return self.encode(x), mask, restore


class AudioMaskedAutoencoderViT(MaskedAutoencoderViT):
    """Stands in for AudioMAE's model."""

    def __init__(self, img_size=(64, 16), mask_2d=False, **options):
        nn.Module.__init__(self)
        embed = ImageEmbed(img_size, 4, 1, 32)
        self.make(embed, 32, 2, 16, norm_pix_loss=True)
        self.decoder_pred = nn.Linear(16, 16)
        self.mask_2d, self.mask_t_prob, self.mask_f_prob = mask_2d, 0.6, 0.5

    def random_masking_2d(self, x, mask_t_prob, mask_f_prob):
        times, pitches = (size // 4 for size in self.patch_embed.img_size)
        rows, columns = (torch.rand(x.shape[0], each, device=x.device).argsort(1) for each in (times, pitches))
        rows, columns = rows >= int(times * (1 - mask_t_prob)), columns >= int(pitches * (1 - mask_f_prob))
        mask = (rows[:, :, None] | columns[:, None]).flatten(1)
        order = mask.to(torch.uint8).argsort(dim=1, stable=True)
        keep = order[:, : int((~mask[0]).sum()), None].expand(-1, -1, x.shape[2])
        return x.gather(1, keep), mask.float(), order.argsort(1)

    def forward_encoder(self, x, mask_ratio, mask_2d=False):
        tokens = self.patch_embed(x) + self.pos_embed[:, 1:]
        if mask_2d:
            x, mask, restore = self.random_masking_2d(tokens, self.mask_t_prob, self.mask_f_prob)
        else:
            x, mask, restore, *_ = self.random_masking(tokens, mask_ratio)
        return self.encode(x), mask, restore

    def forward_loss(self, imgs, pred, mask, norm_pix_loss=False):
        target = self.target(imgs) if norm_pix_loss else self.patchify(imgs)
        return ((pred - target).square().mean(-1) * mask).sum() / mask.sum()

    def forward(self, imgs, mask_ratio=0.8):
        latent, mask, restore = self.forward_encoder(imgs, mask_ratio, mask_2d=self.mask_2d)
        pred = self.forward_decoder(latent, restore)
        loss = self.forward_loss(imgs, pred, mask, norm_pix_loss=self.norm_pix_loss)
        return loss, pred, mask, torch.zeros(1, device=imgs.device)


AudioMaskedAutoencoderViT.__name__ = "MaskedAutoencoderViT"


class PixioViT(MaskedAutoencoderViT):
    """Stands in for Pixio's model, with one class token."""

    def __init__(self, img_size=32, mask_grid=2):
        super().__init__(img_size, 4)
        self.mask_grid = mask_grid
        self.patch_embed.grid_size = (img_size // 4, img_size // 4)

    def random_masking(self, x, mask_ratio, grid):
        side = int(x.shape[1] ** 0.5)
        units = (side // grid) ** 2
        noise = torch.rand(x.shape[0], units, device=x.device)
        tokens = rearrange(torch.arange(x.shape[1]), "(h p w q) -> (h w) (p q)", h=side // grid, w=side // grid, p=grid)
        order = tokens[noise.argsort(1)].flatten(1)
        keep, restore = int(units * (1 - mask_ratio)) * grid**2, order.argsort(1)
        shown = order[:, :keep, None].expand(-1, -1, x.shape[2])
        return x.gather(1, shown), (restore >= keep).float(), restore

    def forward_encoder(self, x, mask_ratio):
        tokens = self.patch_embed(x) + self.pos_embed[:, 1:]
        x, mask, restore = self.random_masking(tokens, mask_ratio, self.mask_grid)
        return self.encode(x), mask, restore

    def forward(self, imgs, mask_ratio):
        latent, mask, restore = self.forward_encoder(imgs, mask_ratio)
        return self.forward_loss(imgs, self.forward_decoder(latent, restore), mask)


def positions(tokens, width):
    """A fixed table, neither buffer nor parameter, as in VideoMAE."""
    return torch.linspace(0, 50, tokens * width).sin().view(1, tokens, width)


class VideoEncoder(nn.Module):
    def __init__(self, img_size, patch_size, in_chans, width, depth, frames, tubelet_size, checkpointing):
        super().__init__()
        self.checkpointing = checkpointing
        self.patch_embed = VideoEmbed(img_size, patch_size, in_chans, width, frames, tubelet_size, flat=True)
        self.pos_embed = positions(self.patch_embed.num_patches, width)
        self.blocks, self.norm = blocks(width, depth), nn.LayerNorm(width)

    def forward(self, x, mask):
        x = self.patch_embed(x)
        x = x + self.pos_embed.type_as(x).to(x.device).clone().detach()
        x = x[~mask].reshape(x.shape[0], -1, x.shape[2])
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.norm(x)


class PretrainVisionTransformer(nn.Module):
    """Stands in for VideoMAE's model."""

    def __init__(self, img_size=32, patch_size=8, in_chans=3, frames=8, tubelet_size=2, checkpointing=False):
        super().__init__()
        self.encoder = VideoEncoder(img_size, patch_size, in_chans, 32, 2, frames, tubelet_size, checkpointing)
        self.encoder_to_decoder = nn.Linear(32, 16, bias=False)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, 16))
        self.pos_embed = positions(self.encoder.patch_embed.num_patches, 16)
        self.decoder = nn.Sequential(*blocks(16, 1), nn.LayerNorm(16))
        self.head = nn.Linear(16, tubelet_size * patch_size**2 * in_chans)

    def no_weight_decay(self):
        return {"pos_embed", "cls_token", "mask_token"}

    def decode(self, x, mask, decoded):
        x = self.encoder_to_decoder(x)
        positions = self.pos_embed.expand(x.shape[0], -1, -1).type_as(x).to(x.device).clone().detach()
        visible = positions[~mask].reshape(x.shape)
        hidden = positions[decoded].reshape(x.shape[0], -1, x.shape[2])
        return self.head(self.decoder(torch.cat([x + visible, self.mask_token + hidden], 1))[:, -hidden.shape[1] :])

    def forward(self, x, mask):
        return self.decode(self.encoder(x, mask), mask, mask)


class PretrainVisionTransformerV2(PretrainVisionTransformer):
    """Stands in for VideoMAEv2's model."""

    def forward(self, x, mask, decode_mask=None):
        return self.decode(self.encoder(x, mask), mask, mask if decode_mask is None else ~decode_mask)
