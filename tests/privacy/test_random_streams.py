"""Streams hold the published vectors, are bitwise the same on the path of devices, and have the
laws that are promised of them.
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from grape_ray.privacy import box_muller, chacha20, random_streams
from grape_ray.privacy.random_streams import normals, public_bits, public_normals

CPU, KEY = torch.device("cpu"), bytes(range(32))
FALSE_ALARM = 1e-6  # of each statistical test below; seeds are pinned, so a pass is for ever
# RFC 8439, sections 2.3.2 and A.1: key, counter, nonce, block
VECTORS = [
    (
        KEY.hex(),
        1,
        "000000090000004a00000000",
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    (
        "00" * 32,
        0,
        "00" * 12,
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        "00" * 31 + "01",
        1,
        "00" * 12,
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    (
        "00ff" + "00" * 30,
        2,
        "00" * 12,
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
    (
        "00" * 32,
        0,
        "00" * 11 + "02",
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
    ),
]


def as_words(tensor):
    return tensor.numpy().view("<u8")


@pytest.mark.parametrize(("key", "counter", "nonce", "block"), VECTORS)
def test_words_are_the_published_blocks(key, counter, nonce, block):
    # the upper half of the counter is the first word of the nonce
    counter += int.from_bytes(bytes.fromhex(nonce)[:4], "little") << 32
    step = int.from_bytes(bytes.fromhex(nonce)[4:], "little")
    words = chacha20.words(bytes.fromhex(key), step, 8 * counter, 8)
    assert words.tobytes().hex() == block
    on_device = chacha20.words_on(bytes.fromhex(key), step, 8 * counter, 8, CPU)
    assert (as_words(on_device) == words).all()


@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 1), (3, 20), (7, 1), (8 * 2**31 - 9, 40), (8 * 2**32 - 5, 30), (2**63 + 1, 3), (5, 0)],
)
@pytest.mark.parametrize("step", [0, 2**31, 2**64 - 1])
def test_words_are_bitwise_the_same_by_tensor_operations(first, count, step):
    words = chacha20.words(KEY, step, first, count)
    assert words.dtype == np.uint64
    assert len(words) == count
    assert (as_words(chacha20.words_on(KEY, step, first, count, CPU)) == words).all()
    for place in range(count):
        assert chacha20.words(KEY, step, first + place, 1)[0] == words[place]


@pytest.mark.slow
def test_compiled_rounds_are_bitwise_the_same():
    compiled = chacha20._rounds.__wrapped__(CPU)
    assert compiled is not chacha20.blocks
    state = torch.randint(-(2**31), 2**31, (16, 50), dtype=torch.int64).to(torch.int32).unbind()
    assert torch.equal(compiled(*state), chacha20.blocks(*state))


def test_a_compiler_that_fails_or_errs_is_not_used(monkeypatch):
    def failing(function, **_):
        def call(*state):
            raise RuntimeError("no compiler here")

        return call

    def erring(function, **_):
        return lambda *state: function(*state) + 1

    for compiler, reason in [(failing, "no compiler here"), (erring, "its bits are others")]:
        monkeypatch.setattr(torch, "compile", compiler)
        with pytest.warns(UserWarning, match=reason):
            assert chacha20._rounds.__wrapped__(CPU) is chacha20.blocks


@pytest.mark.statistical
def test_bits_of_words_are_fair_and_tell_nothing_of_each_other():
    words = chacha20.words(KEY, 5, 0, 200_000)
    bits = (words[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    z = stats.norm.isf(FALSE_ALARM / 2 / 64)
    assert np.abs(bits.mean(0) - 0.5).max() < z / 2 / math.sqrt(len(words))
    counts = np.bincount(words.view(np.uint8), minlength=256)
    assert stats.chisquare(counts).pvalue > FALSE_ALARM
    share = words.astype(np.float64) / 2**64
    others = [chacha20.words(KEY, 6, 0, len(words)), chacha20.words(b"k" * 32, 5, 0, len(words))]
    others += [chacha20.words(KEY, 5, lag, len(words)) for lag in (1, 2, 8, 16)]
    bound = stats.norm.isf(FALSE_ALARM / 2 / len(others)) / math.sqrt(len(words))
    for other in others:
        assert abs(np.corrcoef(share, other.astype(np.float64))[0, 1]) < bound


@pytest.mark.parametrize(("start", "count"), [(0, 10), (16_383, 2), (777, 40_001), (5, 0)])
def test_normals_of_devices_differ_by_rounding_alone(start, count):
    words = chacha20.words_on(KEY, 9, start // 16384 * 16384, 4 * 16384, CPU)
    tensors = box_muller.doubles_on(words, lambda places: np.full(len(places), 1 << 63))
    assert tensors.dtype == torch.float64
    ours = normals(KEY, 9, start, count)
    theirs = tensors[start % 16384 :][:count]
    # of the radius, by some units in the last place of logarithm and tangent
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-14)


def test_normals_are_made_where_they_are_asked_for(monkeypatch):
    """The device's path in whole: another type of device, whose tensors are this machine's."""

    class Device:
        type = "elsewhere"

    made = chacha20.words_on

    def words_on(key, step, first, count, _device):
        return made(key, step, first, count, CPU)

    monkeypatch.setattr(random_streams, "words_on", words_on)
    for start, count in [(0, 70_000), (16_383, 2), (777, 30_001)]:
        found = normals(KEY, 3, start, count, Device())  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(found, normals(KEY, 3, start, count), rtol=0, atol=1e-14)
    for rows in (slice(None), slice(3, 8), slice(4, 4)):
        at = {"shape": (9, 5), "rows": rows}
        elsewhere = {**at, "device": Device()}
        found = public_normals(b"k", "w", 2, **elsewhere)
        torch.testing.assert_close(found, public_normals(b"k", "w", 2, **at), rtol=0, atol=1e-5)
        assert torch.equal(public_bits(b"k", "w", 2, **elsewhere), public_bits(b"k", "w", 2, **at))


def test_threads_move_no_bit():
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append((normals(KEY, 1, 5, 300_000), public_normals(b"k", "w", 0, (999, 301))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*found))


@pytest.mark.statistical
def test_tails_of_normals_are_as_fine_as_their_body():
    """Radii whose 52 bits are the least possible: alone, 8.49 again and again."""
    chunks, half = 5, box_muller.CHUNK // 2
    words = np.full((chunks, 2, half), (1 << 64) - 1, dtype=np.uint64)
    words[:, 1] = 0  # no angle: the cosine is 1 and the second half of a chunk holds radii
    out = np.empty(words.size)
    asked = []

    def refine(places):
        asked.append(places)
        return chacha20.words(KEY, 0, 0, len(places))

    given = words.copy()
    box_muller.doubles(given.reshape(-1), refine, out)
    assert (asked[0] == np.arange(chunks * half)).all()
    radii = out.reshape(words.shape)[:, 1].ravel()
    uniforms = np.exp(-(radii**2) / 2) * 2.0**52
    assert len(np.unique(radii)) > 0.99 * radii.size
    assert stats.kstest(uniforms, "uniform").pvalue > FALSE_ALARM
    torch.testing.assert_close(
        box_muller.doubles_on(torch.from_numpy(words.reshape(-1).view(np.int64)), refine),
        torch.from_numpy(out),
        rtol=0,
        atol=1e-13,
    )


def test_each_radius_is_refined_by_a_word_of_its_own(monkeypatch):
    """Every radius is called a tail here, and every slice has the same normals still."""
    monkeypatch.setattr(box_muller, "TAIL", 2.0)
    asked = []

    def words(key, step, first, count):
        asked.append((first, count))
        return chacha20.words(key, step, first, count)

    monkeypatch.setattr(random_streams, "words", words)
    whole = normals(KEY, 0, 0, 2 * box_muller.CHUNK)
    refining = [first for first, count in asked if count == 1]
    assert sorted(refining) == [(1 << 63) + place for place in range(box_muller.CHUNK)]
    part = normals(KEY, 0, box_muller.CHUNK + 5, 100)
    assert torch.equal(part, whole[box_muller.CHUNK + 5 :][:100])


@pytest.mark.statistical
def test_public_normals_are_normal_and_independent():
    sample = public_normals(b"k", "w", 0, (1000, 500)).numpy().ravel()
    assert sample.dtype == np.float32
    assert stats.kstest(sample, "norm").pvalue > FALSE_ALARM
    assert stats.kstest(sample * 1.02, "norm").pvalue < FALSE_ALARM  # the test has power
    assert np.abs(sample).max() > 4.5
    bound = stats.norm.isf(FALSE_ALARM / 2) / math.sqrt(sample.size - 500)
    others = [sample[lag : sample.size - 500 + lag] for lag in (1, 2, 16, 500)]
    others += [
        public_normals(key, label, period, (1000, 500)).numpy().ravel()[500:]
        for key, label, period in [(b"q", "w", 0), (b"k", "v", 0), (b"k", "w", 1)]
    ]
    for other in others:
        assert abs(np.corrcoef(sample[: len(other)], other)[0, 1]) < bound
        assert abs(np.corrcoef(sample[: len(other)] ** 2, other**2)[0, 1]) < 2 * bound


@pytest.mark.statistical
def test_public_bits_are_uniform():
    bits = public_bits(b"k", "w", 0, (1000, 400))
    assert bits.dtype == torch.int16
    counts = np.bincount(bits.numpy().ravel().view(np.uint16) >> 8, minlength=256)
    assert stats.chisquare(counts).pvalue > FALSE_ALARM
    assert (public_bits(b"k", "w", 1, (1000, 400)) != bits).float().mean() > 0.99
