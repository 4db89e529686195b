import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adamae_sampler import MaskSample
from adamae_sampler.mask import num_masked_units, num_visible_tokens


@pytest.mark.parametrize(
    ("tokens", "ratio", "visible"),
    [(1568, 0.95, 78), (1568, 0.9, 156), (100, 0.9, 10), (10, 0.7, 3), (32, 0.75, 8), (100, 0.71, 29), (2, 0.5, 1)],
)
def test_num_visible(tokens, ratio, visible):
    assert num_visible_tokens(tokens, ratio) == visible


@given(st.integers(2, 20_000), st.integers(1, 999))
def test_num_visible_is_exact_for_decimal_ratios(tokens, thousandths):
    exact = math.floor(tokens * (1 - Fraction(thousandths, 1000)))
    if 1 <= exact < tokens:
        assert num_visible_tokens(tokens, thousandths / 1000) == exact
    else:
        with pytest.raises(ValueError, match=f"leaves {exact} of {tokens}"):
            num_visible_tokens(tokens, thousandths / 1000)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_ratio_outside_of_zero_to_one(ratio):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        num_visible_tokens(100, ratio)


def test_error_names_ratio_visible_and_total():
    with pytest.raises(ValueError, match=r"mask_ratio=0.999 leaves 0 of 100 tokens visible, expected between 1 and 99"):
        num_visible_tokens(100, 0.999)


@pytest.mark.parametrize("tokens", [2, 3, 7, 100, 1568, 18_432])
def test_the_ratio_that_an_error_suggests_works(tokens):
    with pytest.raises(ValueError, match="Use at most") as caught:
        num_visible_tokens(tokens, 0.999999)
    assert num_visible_tokens(tokens, float(str(caught.value).split("at most ")[1].split(",")[0])) >= 1
    with pytest.raises(ValueError, match="Use at least") as caught:
        num_masked_units(tokens, 1e-6, "places")
    assert num_masked_units(tokens, float(str(caught.value).split("at least ")[1].split(",")[0]), "places") >= 1
    with pytest.raises(ValueError, match="time steps: the grid has 1"):
        num_masked_units(1, 0.5, "time steps")


def test_num_masked_units_rounds_as_videomae():
    assert num_masked_units(196, 0.9, "places") == 176
    assert num_masked_units(8, 0.95, "time steps") == 7
    assert num_masked_units(100, 0.29, "places") == 29
    with pytest.raises(ValueError, match="hides 0 of 8 time steps"):
        num_masked_units(8, 0.1, "time steps")


@given(st.integers(0, 4), st.integers(2, 40), st.data())
def test_from_mask_partitions_the_tokens(batch, tokens, data):
    visible = data.draw(st.integers(1, tokens - 1))
    seed = data.draw(st.integers(0, 1000))
    order = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)).argsort(1)
    mask = torch.ones(batch, tokens, dtype=torch.bool).scatter(1, order[:, :visible], False)
    sample = MaskSample.from_mask(mask, visible)
    assert sample.num_visible == visible
    assert sample.num_tokens == tokens
    for row in range(batch):
        assert sample.visible_idx[row].tolist() == [i for i in range(tokens) if not mask[row, i]]
        assert sample.masked_idx[row].tolist() == [i for i in range(tokens) if mask[row, i]]


def test_replace_changes_the_named_fields():
    sample = MaskSample.from_mask(torch.tensor([[True, False, True]]), 1)
    valid = torch.ones(1, 3, dtype=torch.bool)
    changed = sample.replace(valid=valid)
    assert isinstance(changed, MaskSample)
    assert all(each is other for each, other in zip(changed, sample._replace(valid=valid), strict=True))
    with pytest.raises(TypeError, match="target"):
        sample.replace(target=valid)


def test_from_mask_refuses_what_is_not_a_mask():
    mask = torch.tensor([[True, True, False, True], [True, False, False, True]])
    with pytest.raises(ValueError, match=r"leaves 2 tokens visible in row 1, expected 1 in each of its 2 rows"):
        MaskSample.from_mask(mask, 1)
    with pytest.raises(TypeError, match=r"mask is torch.float32, expected a torch.bool tensor with True = masked"):
        MaskSample.from_mask(mask.float(), 1)
    with pytest.raises(TypeError, match="mask is ndarray"):
        MaskSample.from_mask(mask.numpy(), 1)
    with pytest.raises(ValueError, match=r"shape \(2, 2, 2\), expected \[B, N\]"):
        MaskSample.from_mask(mask.view(2, 2, 2), 1)
    for visible in (0, 4):
        with pytest.raises(ValueError, match=f"num_visible={visible} of 4 tokens, expected between 1 and 3"):
            MaskSample.from_mask(mask, visible)
