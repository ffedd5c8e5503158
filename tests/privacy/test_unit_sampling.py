"""Units are Poisson-sampled, and of a sampled unit each set of records has the same probability."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from grape_ray.privacy.random_streams import _below, picks_within_units, poisson_batch, words

KEY = b"u" * 32
FALSE_ALARM = 1e-6  # of each statistical test; seeds are pinned, so a pass is for ever


def even(counts):
    """Chi-square test of equal probabilities."""
    return stats.chisquare(counts).pvalue > FALSE_ALARM


def picks(step, units, sizes, most, key=KEY):
    """A tuple of places for each unit."""
    places, counts = picks_within_units(key, step, np.array(units), np.array(sizes), most)
    ends = np.cumsum(counts)
    return [tuple(places[end - count : end].tolist()) for count, end in zip(counts, ends)]


@pytest.mark.statistical
def test_each_set_of_records_of_a_unit_is_as_likely_as_any_other():
    units = np.arange(100_000)
    found = picks(3, units, np.full(len(units), 6), 3)
    sets = {chosen: 0 for chosen in combinations(range(6), 3)}
    for chosen in found:
        sets[chosen] += 1  # three different ones, ascending
    assert even(list(sets.values()))
    # the test has power: of 20 sets, one that is an eighth likelier shows
    tilted = np.full(20, 5000)
    tilted[0] = 5625
    assert not even(tilted)


@pytest.mark.statistical
def test_the_picks_of_one_unit_are_even_over_steps_and_know_nothing_of_another_unit():
    pairs = np.zeros((4, 4), dtype=int)
    for step in range(8000):
        (one,), (other,) = picks(step, [11, 12], [4, 4], 1)
        pairs[one, other] += 1
    assert even(pairs.ravel())


@pytest.mark.statistical
def test_remainders_favour_no_value():
    """Of this size a quarter of all words is refused; with them, the lower two thirds of the
    values would be half again as likely.
    """
    size = 3 * 2**61
    found = _below(KEY, 1, np.arange(30_000), 0, np.full(30_000, size))
    assert found.max() < size
    assert even(np.bincount((found // (size // 6)).astype(int), minlength=6))


@pytest.mark.statistical
def test_units_are_in_a_batch_independently_with_the_sampling_probability():
    sampled, number, prob = np.zeros(50, dtype=int), 20_000, 0.07
    together = 0
    for step in range(number):
        batch = poisson_batch(KEY, step, 50, prob)
        sampled[batch] += 1
        together += {3, 4} <= set(batch.tolist())
    low, high = stats.binom.ppf([FALSE_ALARM / 100, 1 - FALSE_ALARM / 100], number, prob)
    assert (low <= sampled).all()
    assert (sampled <= high).all()
    assert stats.binomtest(together, number, prob**2).pvalue > FALSE_ALARM


def test_the_words_of_picks_are_not_those_that_sample_units():
    size = 2**40
    for step in range(3):
        (picked,) = picks(step, [0], [size], 1)[0]
        assert picked != int(words(KEY, step, 0, 1)[0]) % size


def test_picks_are_a_function_of_key_unit_and_step_alone():
    units, sizes = np.arange(40), np.arange(40) % 11
    whole = picks(5, units, sizes, 4)
    assert [len(chosen) for chosen in whole] == np.minimum(sizes, 4).tolist()
    assert all(chosen == tuple(range(size)) for chosen, size in zip(whole, sizes) if size <= 4)
    for rank in range(3):
        assert picks(5, units[rank::3], sizes[rank::3], 4) == whole[rank::3]
    order = np.random.default_rng(0).permutation(40)
    assert picks(5, units[order], sizes[order], 4) == [whole[place] for place in order]
    assert picks(6, units, sizes, 4) != whole
    assert picks(5, units, sizes, 4, key=b"v" * 32) != whole
    assert picks(5, [], [], 4) == []
    assert picks(5, [2**32 - 1], [10**6], 4) != picks(5, [2**32 - 2], [10**6], 4)
    assert picks(5, [1], [3], 10**6) == [(0, 1, 2)]  # more than there are cost nothing
