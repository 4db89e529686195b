"""Comparing distributions of masks: counts of whole masks, and chi-square statistics without a table."""

from collections import Counter

import torch


def masks_of(sampler, draws, **kwargs):
    """Counts of the visible sets, as tuples of tokens, in so many draws."""
    tokens = kwargs.pop("tokens", torch.zeros(1, sampler.num_tokens, 1)).expand(draws, -1, -1)
    with torch.no_grad():
        return Counter(map(tuple, sampler(tokens, **kwargs).visible_idx.tolist()))


def agrees_with(counts, probabilities):
    """Whether counts fit exact probabilities: no set that cannot be, and chi-square within 4 deviations of its mean."""
    draws = sum(counts.values())
    assert abs(sum(probabilities.values()) - 1) < 1e-6
    assert min(probabilities.values()) * draws > 5, "too few draws"
    if set(counts) - set(probabilities):
        return False
    statistic = sum((counts[each] - draws * p) ** 2 / (draws * p) for each, p in probabilities.items())
    return _is_usual(statistic, len(probabilities) - 1)


def agree(one, two):
    """Whether two counts are of one distribution. Sets with few draws are put together."""
    total_one, total_two = sum(one.values()), sum(two.values())
    frequent = {each for each in one | two if one[each] + two[each] >= 20}
    rest_one, rest_two = (sum(n for each, n in counts.items() if each not in frequent) for counts in (one, two))
    pairs = [(one[each], two[each]) for each in frequent] + [(rest_one, rest_two)] * (rest_one + rest_two > 0)
    ratio = (total_two / total_one) ** 0.5
    statistic = sum((a * ratio - b / ratio) ** 2 / (a + b) for a, b in pairs)
    return _is_usual(statistic, len(pairs) - 1)


def _is_usual(statistic, freedom):
    return abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5
