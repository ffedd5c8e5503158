"""Remembered calibrations: found again, bound to their question, and never believed without a
proof.
"""

import json

import pytest

from grape_ray.accounting import Mechanism, affords, cache, calibration, noise_multiplier

QUESTION = (3.0, 1e-5, 0.02, 50)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "grape-ray" / "calibration"


def never(*_):
    raise AssertionError("searched again")


def test_an_answer_is_found_again(monkeypatch):
    first = noise_multiplier(*QUESTION)
    monkeypatch.setattr(calibration, "_least_noise", never)
    assert noise_multiplier(*QUESTION) == first
    with pytest.raises(AssertionError, match="searched again"):
        noise_multiplier(3.0, 1e-5, 0.02, 51)


@pytest.mark.parametrize("forged", [0.3, 0.0, float("nan"), 1e9, "much"])
def test_an_edited_answer_is_searched_anew(folder, forged):
    first = noise_multiplier(*QUESTION)
    (path,) = folder.iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text()), "answer": forged}))
    assert noise_multiplier(*QUESTION) == first
    assert affords(Mechanism("poisson_gaussian", 0.02, first), 50, 3.0, 1e-5)


@pytest.mark.parametrize("question", [QUESTION, (3.0, 1e-5, 1.0, 40)])
def test_an_answer_that_is_safe_but_wasteful_is_searched_anew(folder, question):
    first = noise_multiplier(*question)
    (path,) = folder.iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text()), "answer": first * 1.013}))
    assert noise_multiplier(*question) == first


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert noise_multiplier(*QUESTION) > 0
    assert cache.recall({"sampling_prob": 0.02}) is None
