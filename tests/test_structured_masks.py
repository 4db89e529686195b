"""Block and grid masks against slow simulations and enumerations of their definitions."""

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from distributions import agree, agrees_with, masks_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from adamae_sampler import BlockTokenSampler, GridTokenSampler, HardTokenSampler, MotionTokenSampler
from adamae_sampler.ops.draw import gumbel_noise
from adamae_sampler.sampler.draws import CLASS_GAP

KINDS = (BlockTokenSampler, GridTokenSampler, MotionTokenSampler, HardTokenSampler)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    ratio=st.floats(0.05, 0.95),
    hard_share=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_the_number_of_visible_tokens_is_exact(kind, grid, ratio, hard_share, seed):
    number = math.prod(grid)
    visible = math.floor(number * (1 - ratio) + 1e-9)
    assume(1 <= visible < number and (grid[0] > 1 or kind is not MotionTokenSampler))
    if kind is HardTokenSampler:
        sampler = kind(4, grid, ratio, "mlp", hard_share=hard_share)
        sampler.share.set(1, 1)
    else:
        sampler = kind(grid, ratio)
    sample = sampler(torch.randn(3, number, 4), generator=torch.Generator().manual_seed(seed))
    assert sampler.num_visible == visible
    assert sample.mask.sum(1).tolist() == [number - visible] * 3
    both = torch.cat([sample.visible_idx, sample.masked_idx], 1)
    assert both.sort(1).values.tolist() == [list(range(number))] * 3


def simulated_blocks(sampler, draws):
    """The definition of block masks, block by block and token by token."""
    time, height, width = sampler.grid_size
    found = Counter()
    for _ in range(draws):
        left = {*itertools.product(range(time), range(height), range(width))}
        while True:
            aspect = random.uniform(*sampler.aspect_ratio)
            area = max(1, int(height * width * sampler.scale))
            lengths = (
                max(1, int(time * sampler.temporal_scale)),
                min(max(round(math.sqrt(area * aspect)), 1), height),
                min(max(round(math.sqrt(area / aspect)), 1), width),
            )
            starts = [random.randint(0, side - each) for side, each in zip(sampler.grid_size, lengths, strict=True)]
            block = itertools.product(*(range(a, a + n) for a, n in zip(starts, lengths, strict=True)))
            new = left & set(block)
            excess = len(left) - len(new) - sampler.num_visible
            if excess <= 0:  # a random part of the last block is masked
                left -= new - set(random.sample(sorted(new), -excess))
                break
            left -= new
        found[tuple(sorted((t * height + y) * width + x for t, y, x in left))] += 1
    return found


@pytest.mark.parametrize(
    ("grid", "ratio", "options"),
    [
        ((1, 3, 4), 0.7, {"scale": 0.3}),
        ((2, 2, 3), 0.6, {"scale": 0.35, "temporal_scale": 0.5, "aspect_ratio": (0.5, 2.0)}),
        ((3, 1, 4), 0.75, {"scale": 0.5, "temporal_scale": 0.7}),
    ],
)
def test_block_masks_are_those_of_a_simulation(grid, ratio, options):
    random.seed(0)
    sampler = BlockTokenSampler(grid, ratio, **options)
    assert agree(masks_of(sampler, 20_000), simulated_blocks(sampler, 20_000))
    assert not agree(masks_of(sampler, 20_000), masks_of(BlockTokenSampler(grid, ratio, scale=0.9), 20_000))


def test_pairs_of_block_masks_at_a_larger_grid():
    """Of every pair of tokens, how often both are hidden."""
    random.seed(0)
    sampler = BlockTokenSampler((2, 5, 6), 0.8, scale=0.2, temporal_scale=0.5)
    slow = torch.zeros(2000, 60)
    for row, visible in enumerate(simulated_blocks(sampler, 2000).elements()):
        slow[row, list(visible)] = 1
    ours = (~sampler(torch.zeros(20_000, 60, 1)).mask).float()
    one, two = (each.T @ each / len(each) for each in (ours, slow))  # marginals on the diagonal
    deviation = ((one * (1 - one)).clamp_min(1e-3) * (1 / 20_000 + 1 / 2000)).sqrt()
    assert ((one - two).abs() / deviation).max() < 5


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9, 0.95])
def test_enough_blocks_are_laid(ratio):
    """Tokens that no block covers are shown, so they are as many as are visible, or more, only where blocks run out."""
    sampler = BlockTokenSampler((8, 14, 14), ratio)
    fewer = BlockTokenSampler((8, 14, 14), ratio)
    fewer.num_blocks = sampler.num_blocks * 2 // 3  # as many as the most that a simulation took
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    for each, generator in zip((sampler, fewer), generators, strict=True):
        short = number_short(each, 500, generator)
        assert short == 0 if each is sampler else short <= 5


def number_short(sampler, rows, generator):
    """How many of the masks have more tokens without a block than may be visible."""
    numbers = []
    with pytest.MonkeyPatch.context() as patch:
        draw = "adamae_sampler.sampler.block.draw_classes"
        patch.setattr(draw, lambda number, *_: numbers.append(number))
        sampler.draw(torch.zeros(rows, sampler.num_tokens, 1), generator)
    return int(((numbers[0] == sampler.num_blocks).sum(1) > sampler.num_visible).sum())


def test_blocks_are_blocks():
    """A mask of one block is a box of the scale's area, of all time steps, at every place."""
    sampler = BlockTokenSampler((2, 8, 8), 0.25, scale=0.25, aspect_ratio=(1.0, 1.0))  # 4 x 4 of 8 x 8
    masks = sampler(torch.zeros(400, 128, 1)).mask.view(400, 2, 8, 8)
    assert torch.equal(masks[:, 0], masks[:, 1])
    rows, columns = masks[:, 0].any(2), masks[:, 0].any(1)
    assert (rows.sum(1) == 4).all()
    assert torch.equal(masks[:, 0], rows[:, :, None] & columns[:, None])
    assert len(masks.flatten(1).unique(dim=0)) == 25


def test_no_noise_bridges_the_gap_between_classes():
    uniform = torch.tensor([0.0, 1 - 2.0**-24])  # the least and the largest that `uniform_` draws
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adamae_sampler.ops.draw.uniform_noise", lambda *_: uniform.clone())
        low, high = gumbel_noise(uniform).tolist()
    assert (low, high) == pytest.approx((-math.log(25 * math.log(2)), 24 * math.log(2)), rel=1e-4)
    assert high - low < CLASS_GAP  # the kernel's uniform numbers lie within 2^-24 of 0 and 1 too


@pytest.mark.parametrize(
    ("grid", "ratio", "cell"),
    [
        ((1, 14, 14), 0.75, (1, 2, 2)),
        ((8, 14, 14), 0.75, (1, 2, 2)),
        ((8, 14, 14), 0.875, (2, 2, 2)),
        ((1, 14, 14), 0.3, (1, 1, 1)),
        ((3, 3, 3), 0.95, (3, 3, 3)),
        ((4, 1, 1), 0.5, (2, 1, 1)),
        ((4, 4, 4), 0.875, (2, 2, 2)),  # not (1, 2, 4)
        ((1, 5, 5), 0.8, (1, 1, 3)),  # (1, 2, 2) leaves 4 of 5 tokens at its worst offset
    ],
)
def test_the_cell_of_a_lattice(grid, ratio, cell):
    sampler = GridTokenSampler(grid, ratio)
    assert sampler.cell == cell
    lattices = [
        math.prod(len(range(start, side, step)) for start, side, step in zip(offset, grid, cell, strict=True))
        for offset in itertools.product(*map(range, cell))
    ]
    assert min(lattices) >= sampler.num_visible
    for other in itertools.product(*(range(1, side + 1) for side in grid)):
        worst = math.prod(side // each for side, each in zip(grid, other, strict=True))
        assert worst < sampler.num_visible or worst >= min(lattices)


@pytest.mark.parametrize(("grid", "ratio"), [((1, 4, 4), 0.75), ((2, 3, 4), 0.8), ((1, 5, 5), 0.8)])
def test_grid_masks_are_those_of_the_enumeration(grid, ratio):
    sampler = GridTokenSampler(grid, ratio)
    expected = Counter()
    for offset in itertools.product(*map(range, sampler.cell)):
        axes = (range(start, side, step) for start, side, step in zip(offset, grid, sampler.cell, strict=True))
        lattice = [(t * grid[1] + y) * grid[2] + x for t, y, x in itertools.product(*axes)]
        sets = list(itertools.combinations(lattice, sampler.num_visible))
        for each in sets:
            expected[each] += 1 / len(sets) / math.prod(sampler.cell)
    assert agrees_with(masks_of(sampler, 40_000), expected)


def test_a_lattice_of_a_quarter_is_shown_whole():
    masks = GridTokenSampler((1, 14, 14))(torch.zeros(50, 196, 1)).mask.view(50, 7, 2, 7, 2)
    assert (masks == masks[:, :1, :, :1]).all()
    assert (masks.sum((2, 4)) == 3).all()
    assert len(masks.flatten(1).unique(dim=0)) == 4


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("scale=0, expected a share", lambda: BlockTokenSampler((2, 4, 4), scale=0)),
        (
            "1000 blocks with scale=0.01 and temporal_scale=0.05 masked fewer than 1490 of 1568 tokens",
            lambda: BlockTokenSampler((8, 14, 14), 0.95, scale=0.01, temporal_scale=0.05),
        ),
        ("temporal_scale=1.5, expected a share", lambda: BlockTokenSampler((2, 4, 4), temporal_scale=1.5)),
        (r"aspect_ratio=\(2, 1\), expected the least", lambda: BlockTokenSampler((2, 4, 4), aspect_ratio=(2, 1))),
        ("leaves 0 of 32 tokens visible", lambda: BlockTokenSampler((2, 4, 4), 0.99)),
        ("leaves 0 of 32 tokens visible", lambda: GridTokenSampler((2, 4, 4), 0.99)),
    ],
)
def test_bad_arguments(message, call):
    with pytest.raises(ValueError, match=message):
        call()
