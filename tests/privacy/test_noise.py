"""The noise has the law, the independence and the reach that the accountant assumes."""

import dataclasses
import math
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy import stats

from grape_ray.accounting.mechanism import GAUSSIAN, Mechanism
from grape_ray.distributed.comms import Comms
from grape_ray.errors import ConfigError, GrapeRayError, LedgerError, NoiseReuse
from grape_ray.ledger import Grant, Ledger, Study
from grape_ray.optim import make_optimizer
from grape_ray.privacy.noise import NoiseStream, _pieces, grid_and_std, on_grid, privatize
from grape_ray.privacy.random_streams import normals, poisson_batch, public_normals
from grape_ray.privacy.types import ClippedSum, PrivateGradient
from tests.support.grants import granted

KEY = b"n" * 32
FALSE_ALARM = 1e-6  # of each statistical test below; seeds are pinned, so a pass is for ever


def drawn(key, step, start, count):
    return normals(key, step, start, count).numpy()


def zeros(**shapes):
    return ClippedSum({n: torch.zeros(s) for n, s in shapes.items()}, sensitivity=2.0)


def variance_accepted(sample, std):
    """Chi-square test of the variance at the stated false-alarm rate."""
    n = sample.size
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], n)
    return low <= float((sample / std).astype(np.float64).__pow__(2).sum()) <= high


@pytest.mark.statistical
def test_variance_is_the_declared_one_and_not_a_tenth_more_or_less():
    released = privatize(
        zeros(a=(300, 40), b=(777,)),
        NoiseStream(KEY),
        step=3,
        grant=granted(1.5),
        expected_batch_size=10,
    )
    std = 1.5 * 2.0 / 10
    assert released.noise_std == pytest.approx(std)
    for tensor in released.tensors.values():
        sample = tensor.numpy().ravel()
        assert variance_accepted(sample, std)
    whole = np.concatenate([t.numpy().ravel() for t in released.tensors.values()])
    assert not variance_accepted(whole, 0.9 * std)
    assert not variance_accepted(whole, 1.1 * std)


@pytest.mark.statistical
def test_normals_are_normal_in_body_and_tail():
    sample = drawn(KEY, 0, 0, 2_000_000)
    assert stats.kstest(sample, "norm").pvalue > FALSE_ALARM
    assert stats.kstest(sample * 1.01, "norm").pvalue < FALSE_ALARM  # the test has power
    beyond = int((np.abs(sample) > 4).sum())
    assert stats.binomtest(beyond, sample.size, 2 * stats.norm.sf(4)).pvalue > FALSE_ALARM
    assert np.abs(drawn(KEY, 1, 0, 20_000_000)).max() > 5.3  # a 24-bit transform stops at 5.77


@pytest.mark.statistical
def test_no_correlation_across_coordinates_steps_keys_and_lags():
    n = 200_000
    bound = stats.norm.isf(FALSE_ALARM / 2) / math.sqrt(n)
    base = drawn(KEY, 5, 0, n + 64)
    others = [
        drawn(KEY, 6, 0, n),
        drawn(KEY, 5 + 2**32, 0, n),
        drawn(b"m" * 32, 5, 0, n),
        drawn(KEY, 5, 10**9, n),
    ]
    others += [base[lag : lag + n] for lag in (1, 2, 3, 32, 64)]
    for other in others:
        assert abs(np.corrcoef(base[:n], other)[0, 1]) < bound
        assert abs(np.corrcoef(base[:n] ** 2, other**2)[0, 1]) < 2 * bound
    assert abs(np.corrcoef(base[:n], base[:n] + base[1 : n + 1])[0, 1]) > bound  # it would see one


def test_any_slice_gives_the_same_bits():
    whole = drawn(KEY, 9, 0, 50_000)
    for start, count in ((0, 1), (1, 1), (16383, 2), (777, 30_001), (49_999, 1)):
        assert (drawn(KEY, 9, start, count) == whole[start : start + count]).all()
    assert (
        public_normals(b"k", "layer", 2, (50, 4)) == public_normals(b"k", "layer", 2, (50, 4))
    ).all()
    assert (
        public_normals(b"k", "layer", 2, (50, 4)) != public_normals(b"k", "layer", 3, (50, 4))
    ).any()


def test_a_step_is_drawn_once():
    stream = NoiseStream(KEY)
    with pytest.raises(NoiseReuse):
        stream.claim(-1)  # steps are counted from 0
    privatize(zeros(a=(3,)), stream, step=4, grant=granted(), expected_batch_size=1)
    for step in (4, 3):
        with pytest.raises(NoiseReuse):
            privatize(zeros(a=(3,)), stream, step=step, grant=granted(), expected_batch_size=1)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_numbers_without_meaning_are_refused_before_any_noise_is_drawn(value):
    stream = NoiseStream(KEY)
    with pytest.raises(ConfigError, match="expected_batch_size"):
        privatize(zeros(a=(3,)), stream, step=0, grant=granted(), expected_batch_size=value)
    privatize(zeros(a=(3,)), stream, step=0, grant=granted(), expected_batch_size=1.0)
    with pytest.raises(ConfigError):
        privatize(
            ClippedSum({"a": torch.zeros(3)}, float("inf")),
            stream,
            step=1,
            grant=granted(),
            expected_batch_size=1.0,
        )


def test_no_noise_is_drawn_for_a_step_that_is_not_paid_for(tmp_path):
    stream, size = NoiseStream(KEY), {"expected_batch_size": 1.0}
    ledger = Ledger.open(tmp_path, "data", 8.0, 1e-5)
    ledger.ensure_study(Study("s", Mechanism(GAUSSIAN, 0.01, 1.5), 8.0, 1e-5, 4))
    attempt = ledger.begin_attempt("s", "r", "id")
    grant = pickle.loads(pickle.dumps(ledger.charge("s", "r", attempt, 0, 3, first_step=2)))
    for step in (1, 5):
        with pytest.raises(LedgerError, match=r"not paid for.*steps 2 to 4 of attempt 1 of run r"):
            privatize(zeros(a=(3,)), stream, step=step, grant=grant, **size)
    for nothing in (None, 3, True):
        with pytest.raises(LedgerError, match="noise without a grant"):
            privatize(zeros(a=(3,)), stream, step=2, grant=nothing, **size)  # pyright: ignore[reportArgumentType]
    with pytest.raises(LedgerError, match=r"made by Ledger\.charge alone"):
        dataclasses.replace(grant, steps=9)
    ledger.charge("s", "r", attempt, 1, 3)
    exhausted = ledger.charge("s", "r", attempt, 2, 3)
    with pytest.raises(LedgerError, match="no step of attempt"):
        privatize(zeros(a=(3,)), stream, step=6, grant=exhausted, **size)
    released = privatize(zeros(a=(300_000,)), stream, step=2, grant=grant, **size)
    assert float(released.tensors["a"].std()) == pytest.approx(3.0, rel=0.02)  # 11 standard errors


def test_the_noise_line_is_a_type():
    model = torch.nn.Linear(3, 2)
    from grape_ray import Method, make_engine

    engine = make_engine(model, "dp_adam")
    optimizer = make_optimizer(model, engine, Method(name="dp_adam"), 1)
    with pytest.raises(GrapeRayError, match="PrivateGradient"):
        optimizer.step(engine.empty_sum(), 0)  # type: ignore[arg-type]
    with pytest.raises(GrapeRayError, match="privatize"):
        PrivateGradient({}, 0, 1.0)
    assert "n" * 32 not in repr(NoiseStream(KEY))


@pytest.mark.statistical
def test_sampling_is_poisson():
    size, prob, steps = 400, 0.1, 3000
    inside = np.zeros((steps, size), dtype=bool)
    for step in range(steps):
        inside[step, poisson_batch(KEY, step, size, prob)] = True
    counts = inside.sum(1)
    z = stats.norm.isf(FALSE_ALARM / 2)
    assert abs(counts.mean() - size * prob) < z * math.sqrt(size * prob * (1 - prob) / steps)
    spread = size * prob * (1 - prob)
    assert stats.chi2.cdf((steps - 1) * counts.var(ddof=1) / spread, steps - 1) == pytest.approx(
        0.5, abs=0.5 - FALSE_ALARM / 2
    )
    per_record = stats.chi2.sf(
        ((inside.sum(0) - steps * prob) ** 2 / (steps * prob * (1 - prob))).sum(), size
    )
    assert per_record > FALSE_ALARM
    pairs = np.corrcoef(inside[:, :60].T) - np.eye(60)
    assert np.abs(pairs).max() < stats.norm.isf(FALSE_ALARM / 60**2) / math.sqrt(steps)
    consecutive = np.corrcoef(inside[:-1].ravel(), inside[1:].ravel())[0, 1]
    assert abs(consecutive) < z / math.sqrt(inside[1:].size)


def test_sampling_is_exact_at_its_ends():
    assert (poisson_batch(KEY, 0, 1000, 1.0) == np.arange(1000)).all()
    assert poisson_batch(KEY, 0, 1000, 1e-12).size == 0
    assert poisson_batch(KEY, 0, 0, 0.5).size == 0
    grown = poisson_batch(KEY, 7, 2000, 0.3)
    # a record's fate does not depend on the others
    assert (grown[grown < 1000] == poisson_batch(KEY, 7, 1000, 0.3)).all()


def added_in_single_precision(summed, noise, std):
    """How noise was added before there was a grid: the results' low bits tell of the sum's."""
    return summed + (noise * std).float()


def added_on_the_grid(summed, noise, std):
    return on_grid(summed.double(), noise, std, grid_and_std(1.0, std, summed.numel())[0]).float()


def impossible(released, summed):
    """Coordinates that no single-precision noise leads to from this sum."""
    noise, found = (
        (released.double() - summed.double()).float(),
        torch.zeros(released.shape, dtype=torch.bool),
    )
    for _ in range(3):
        noise = torch.nextafter(noise, torch.tensor(-torch.inf))
    for _ in range(7):
        found |= (summed + noise) == released
        noise = torch.nextafter(noise, torch.tensor(torch.inf))
    return int((~found).sum())


def right_guesses(add, tries=300, std=50.0):
    """How often an adversary who knows both sums tells which was noised, from what could not have
    come of each.
    """
    sums = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0)) / 60
    sums[1] += sums[1] * 0.01
    right = 0
    for trial in range(tries):
        noise = normals(KEY, trial, 0, sums.shape[1])
        released = add(sums[trial % 2], noise, std)
        right += (impossible(released, sums[1]) < impossible(released, sums[0])) == trial % 2
    return right


@pytest.mark.statistical
def test_low_bits_do_not_tell_which_sum_was_noised():
    low, high = stats.binom.ppf([FALSE_ALARM, 1 - FALSE_ALARM], 300, 0.5)
    assert low <= right_guesses(added_on_the_grid) <= high
    assert right_guesses(added_in_single_precision, 60) > 50  # the attack has power


@pytest.mark.statistical
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("multiplier", [0.01, 1.0, 50.0, 1e6])
def test_what_is_released_is_a_multiple_of_the_grid_and_odd_as_often_as_even_whatever_the_sum(
    multiplier, dtype
):
    count, sensitivity = 20_000, 0.7
    grid, std = grid_and_std(sensitivity, multiplier, count)
    for size in (0.0, 1e-9, 1.0, 1e3):
        summed = torch.full((count,), size, dtype=dtype) * (
            1 + torch.arange(count, dtype=dtype) / count
        )
        noise = normals(KEY, 8, 0, count)
        steps = on_grid(summed.double().clone(), noise, std, grid) / grid
        assert (steps == steps.round()).all()
        assert stats.binomtest(int((steps % 2 == 1).sum()), count).pvalue > FALSE_ALARM
        released = privatize(
            ClippedSum({"a": summed}, sensitivity),
            NoiseStream(KEY),
            step=8,
            grant=granted(multiplier),
            expected_batch_size=3,
        )
        assert torch.equal(released.tensors["a"], (steps * grid / 3).to(dtype))


def test_sums_that_lie_on_one_point_of_the_grid_are_released_alike():
    count = 1000
    grid, _ = grid_and_std(1.0, 1.0, count)
    near = torch.randn(count, dtype=torch.float64).div(grid).round().mul(grid)
    noise = normals(KEY, 0, 0, count)
    outcomes = [
        on_grid(near + shift * grid, noise.clone(), 1.0, grid) for shift in (0.0, 0.3, -0.49)
    ]
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[0], outcomes[2])


@pytest.mark.parametrize("count", [1, 10**6, 10**10])
@pytest.mark.parametrize("multiplier", [0.01, 1.0, 1e6])
@pytest.mark.parametrize("sensitivity", [1e-6, 0.75, 1.0, 1e9])
def test_the_noise_covers_what_rounding_adds_to_the_sensitivity(sensitivity, multiplier, count):
    grid, std = grid_and_std(sensitivity, multiplier, count)
    assert math.frexp(grid)[0] == 0.5  # a power of two
    assert std >= multiplier * (sensitivity + grid * math.sqrt(count)) * (1 - 1e-15)
    assert std <= multiplier * sensitivity * (1 + 1e-3)
    assert 13 * std / grid < 2**52  # so that sum and noise stay integers below 2^53


def test_rounding_apart_is_as_far_as_the_noise_expects_and_no_farther():
    generator = torch.Generator().manual_seed(0)
    grid, _ = grid_and_std(1.0, 1.0, 5000)
    still = torch.zeros(5000, dtype=torch.float64)
    for _ in range(20):
        first = torch.randn(5000, dtype=torch.float64, generator=generator)
        second = first + torch.nn.functional.normalize(
            torch.randn(5000, dtype=torch.float64, generator=generator), dim=0
        )
        apart = on_grid(first, still.clone(), 1.0, grid) - on_grid(second, still.clone(), 1.0, grid)
        assert apart.norm() <= 1 + grid * math.sqrt(5000)
    half = torch.full((5000,), grid * 0.5000001, dtype=torch.float64)
    worst = on_grid(half, still.clone(), 1.0, grid) - on_grid(-half, still.clone(), 1.0, grid)
    # half of it by rounding
    assert float(worst.norm()) == pytest.approx(2 * grid * math.sqrt(5000), rel=1e-5)


def test_a_sum_beyond_the_grid_stays_at_its_end_and_pieces_of_a_large_tensor_join():
    grid, std = grid_and_std(1.0, 1.0, 1)
    far = torch.tensor([1e30, -torch.inf], dtype=torch.float64)
    assert on_grid(far, torch.zeros(2, dtype=torch.float64), std, grid).tolist() == [
        2.0**52 * grid,
        -(2.0**52) * grid,
    ]
    alone = privatize(
        zeros(a=(5,), b=(300_000,)),
        NoiseStream(KEY),
        step=0,
        grant=granted(),
        expected_batch_size=2,
    )
    joined = privatize(
        zeros(a=(300_005,)), NoiseStream(KEY), step=0, grant=granted(), expected_batch_size=2
    )
    assert torch.equal(torch.cat(list(alone.tensors.values())), joined.tensors["a"])
    with pytest.raises(ConfigError, match="sensitivity"):
        privatize(
            ClippedSum({"a": torch.zeros(3)}, 0.0),
            NoiseStream(KEY),
            step=0,
            grant=granted(),
            expected_batch_size=1.0,
        )


class Ranks(Comms):
    """Ranks that are threads of one process."""

    def __init__(self, rank, meeting, posted):
        super().__init__(rank, len(posted))
        self.meeting, self.posted = meeting, posted

    def _everyones(self, tensor):
        self.posted[self.rank] = tensor.clone()
        self.meeting.wait(30)
        found = list(self.posted)
        self.meeting.wait(30)
        return found

    def reduce_slice(self, flat):
        low, high = self.slice_of(flat.numel())
        return torch.stack(self._everyones(flat)).sum(0)[low:high]

    def gather_slices(self, mine, length):
        whole = torch.cat(self._everyones(mine))
        assert len(whole) == length
        return whole


def released_by(world, shapes):
    """What each of `world` ranks holds after the noise, one vector a rank; their sums are whole
    numbers that add up to 6 everywhere.
    """

    def on(comms):
        summed = ClippedSum({n: torch.full(s, 6.0 / world) for n, s in shapes.items()}, 2.0)
        made = privatize(
            summed, NoiseStream(KEY), step=5, grant=granted(1.5), expected_batch_size=4, comms=comms
        )
        assert {n: t.shape for n, t in made.tensors.items()} == shapes
        assert (made.step, made.noise_std) == (5, pytest.approx(0.75))
        return torch.cat([t.flatten() for t in made.tensors.values()])

    if world == 1:
        return [on(Comms.local())]
    meeting, posted = threading.Barrier(world), [None] * world
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: on(Ranks(rank, meeting, posted)), range(world)))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_coordinate_has_noise_of_its_own_however_tensors_and_ranks_cut_the_sum(world):
    large = (1 << 18) + 7  # so that each is noised apart, with small ones between
    shapes = {
        n: torch.Size(s)
        for n, s in {"a": (large,), "b": (3, 5), "c": (large,), "d": (2, large), "e": (4,)}.items()
    }
    count = sum(math.prod(s) for s in shapes.values())
    grid, std = grid_and_std(2.0, 1.5, count)
    expected = (
        on_grid(torch.full((count,), 6.0).double(), normals(KEY, 5, 0, count), std, grid)
        .div(4)
        .float()
    )
    for released in released_by(world, shapes):
        assert torch.equal(released, expected)


@pytest.mark.parametrize(
    ("start", "count", "size"),
    [(0, 10, 4), (3, 10, 4), (4, 8, 4), (7, 1, 4), (5, 0, 4), (9, 100, 16)],
)
def test_pieces_are_all_places_once_and_end_where_the_noise_does(start, count, size):
    pieces = list(_pieces(start, count, size))
    assert [place for low, high in pieces for place in range(low, high)] == list(range(count))
    assert all((start + high) % size == 0 for _, high in pieces[:-1])
    assert all(0 < high - low <= size for low, high in pieces)


def test_a_grant_serves_one_stream_and_is_no_other_class(tmp_path):
    grant, other = granted(steps=3), NoiseStream(bytes(31) + b"2")
    privatize(zeros(a=(3,)), NoiseStream(KEY), step=0, grant=grant, expected_batch_size=1)
    for stream in (other, NoiseStream(bytes(31) + b"3")):
        with pytest.raises(LedgerError, match="a second stream"):
            privatize(zeros(a=(3,)), stream, step=1, grant=grant, expected_batch_size=1)
    with pytest.raises(NoiseReuse, match="already drawn"):  # one noise for two sums
        privatize(zeros(a=(3,)), NoiseStream(KEY), step=0, grant=grant, expected_batch_size=1)
    privatize(zeros(a=(3,)), NoiseStream(KEY), step=1, grant=grant, expected_batch_size=1)

    class Mine(Grant):  # pyright: ignore[reportGeneralTypeIssues]
        def __post_init__(self, made_by):
            pass

    forged = Mine("s", "r", 1, 0, 0, 10**6, grant.mechanism)
    with pytest.raises(LedgerError, match="without a grant"):
        privatize(zeros(a=(3,)), other, step=0, grant=forged, expected_batch_size=1)
    assert not hasattr(grant, "__dict__")


def test_a_sum_of_estimated_norms_is_paid_for_as_such():
    size = {"step": 0, "expected_batch_size": 1}

    def released(probes, shared, paid):
        summed = dataclasses.replace(zeros(a=(3,)), estimated=(probes, shared))
        return privatize(summed, NoiseStream(KEY), grant=granted(probes=paid), **size)

    assert released(8, False, paid=8).noise_std > 0
    assert released(8, False, paid=4).noise_std > 0  # costs more
    for probes, shared, paid in ((8, False, 0), (8, False, 16), (8, True, 8)):
        with pytest.raises(LedgerError, match="norms are estimates"):
            released(probes, shared, paid)
