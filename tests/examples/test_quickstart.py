"""The quickstart: p of tokens of sprites, moving and still, and of the background."""

import pytest

pytest.importorskip("transformers")

import quickstart


def test_the_quickstart():
    shares = quickstart.main(steps=2)  # too few to learn anything, enough to see that it runs
    assert set(shares) == {"moving", "still sprite", "background"}
    assert all(0.5 < share < 2 for share in shares.values())
    assert list(quickstart.main(steps=2, sampling_weight=0).values()) == pytest.approx([1, 1, 1])


@pytest.mark.slow
def test_p_turns_to_sprites_and_tells_moving_from_still_ones_no_further():
    """On clips in which a still sprite has the contrast of the one that moves, p rises on both alike."""
    shares = quickstart.main(steps=100)
    assert min(shares["moving"], shares["still sprite"]) > 1.5 > 0.9 > shares["background"]
    assert 0.5 < shares["moving"] / shares["still sprite"] < 2
