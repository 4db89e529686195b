"""The base of samplers with a score network."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from adamae_sampler.networks import MHAScoreNetwork, Network, make_network
from adamae_sampler.positions import GridSize
from adamae_sampler.sampler.base import TokenSampler


class ScoredTokenSampler(TokenSampler):
    """Base of the samplers that score each token with a network. K = floor(N (1 - ratio)).

    Args:
        embed_dim: D, width of the tokens.
        grid_size: (T, H, W), see `TokenSampler`.
        mask_ratio: share of tokens to mask.
        network: "mha" (the paper's), "mlp", "mlp_linear", "pooled" (`PooledScoreNetwork`, a few percent of the cost),
            see `adamae_sampler.networks.make_network`; or a module [B, N, D] -> [B, N], such as `MHAScoreNetwork` with
            a depth and width of your choice. At another grid than the sampler's own a module whose forward has
            `grid_size` gets it.
        detach_tokens: whether to stop the gradient of the scores before the tokenizer.
        num_masks: R, masks of each clip, see `TokenSampler`.

    Raises:
        ValueError: an unknown network; a number out of range.
    """

    def __init__(
        self,
        embed_dim: int,
        grid_size: GridSize,
        mask_ratio: float,
        network: Network | nn.Module,
        detach_tokens: bool,
        num_masks: int,
    ) -> None:
        super().__init__(grid_size, mask_ratio, num_masks)
        self.num_visible = self.num_visible_at(self.grid_size)
        self.embed_dim = embed_dim
        self.detach_tokens = detach_tokens
        if isinstance(network, nn.Module):
            self.network = network
            if isinstance(network, MHAScoreNetwork) and network.grid_size is None:
                network.grid_size = self.grid_size
        else:
            self.network = make_network(network, embed_dim, self.grid_size)

        # Asked once, since wrappers such as torch.compile hide the arguments.
        self._network_takes_grids = "grid_size" in inspect.signature(self.network.forward).parameters

    def scores(self, tokens: Tensor, grid_size: GridSize | None = None) -> Tensor:
        """[B, N, D] -> [B, N], the network's output; of tokens of another grid if it is given."""
        if tokens.shape[-1] != self.embed_dim:
            raise ValueError(
                f"tokens are {tokens.shape[-1]} wide, expected embed_dim={self.embed_dim}. Build the sampler with the "
                "width of the tokens."
            )
        # A network without positions need not know the grid.
        grid = {"grid_size": grid_size} if grid_size is not None and self._network_takes_grids else {}
        scores: Tensor = self.network(tokens.detach() if self.detach_tokens else tokens, **grid)
        if scores.shape != tokens.shape[:2]:
            raise ValueError(
                f"the score network gave {tuple(scores.shape)} for tokens {tuple(tokens.shape)}, expected "
                f"{tuple(tokens.shape[:2])}: one score for each token. Use squeeze(-1) if the last axis is 1."
            )
        return scores
