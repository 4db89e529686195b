"""Probes: classifiers on features of a frozen encoder, trained by a fixed recipe."""

from __future__ import annotations

import math

import torch
from timm.layers import AttentionPoolLatent, trunc_normal_
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from evaluation.features import Features
from evaluation.settings import ProbeKind, ProbeRecipe


class Probe(nn.Module):
    """A linear layer after batch norm without affine parameters (mae's). An attentive probe pools tokens first.

    Args:
        kind: "linear" takes pooled features [B, D]; "attentive" takes tokens [B, N, D] and pools them with a learned
            query.
        width: D.
        num_classes: number of outputs.
    """

    def __init__(self, kind: ProbeKind, width: int, num_classes: int) -> None:
        super().__init__()
        heads = next(heads for heads in (12, 8, 6, 4, 3, 2, 1) if width % heads == 0)
        self.pool = AttentionPoolLatent(width, num_heads=heads) if kind == "attentive" else nn.Identity()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.head = nn.Linear(width, num_classes)
        trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Features -> logits [B, num_classes]."""
        logits: Tensor = self.head(self.norm(self.pool(features)))
        return logits


def train_probe(probe: Probe, kind: ProbeKind, features: Features, recipe: ProbeRecipe, device: torch.device) -> float:
    """Trains a probe; returns the mean loss of the last epoch. Only one batch of features is on the device."""
    probe.to(device).train()
    usual = {"linear": (1024, 0.1), "attentive": (256, 1e-3)}[kind]
    batch = min(recipe.batch_size or usual[0], len(features.label))
    lr = (recipe.base_lr or usual[1]) * batch / 256
    if kind == "linear":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(probe.parameters(), lr=lr, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=0.05)
    per_epoch = max(len(features.label) // batch, 1)
    steps = recipe.epochs * per_epoch
    warmup = max(steps // 10, 1)
    total = torch.zeros((), device=device)
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(features.label))
            total.zero_()
        chosen = order[step % per_epoch * batch :][:batch]
        for group in optimizer.param_groups:
            falling = (1 + math.cos(math.pi * max(step - warmup, 0) / max(steps - warmup, 1))) / 2
            group["lr"] = lr * min((step + 1) / warmup, falling)
        logits = probe(features.take(chosen).to(device, torch.float32))
        loss = cross_entropy(logits, features.label[chosen].to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach()
    return float(total / per_epoch)


@torch.no_grad()
def predict(probe: Probe, features: Features, device: torch.device, batch_size: int = 256) -> Tensor:
    """Probabilities [V, classes] of features."""
    probe.eval()
    rows = torch.arange(len(features.label)).split(batch_size)
    return torch.cat([probe(features.take(row).to(device, torch.float32)).softmax(-1).cpu() for row in rows])
