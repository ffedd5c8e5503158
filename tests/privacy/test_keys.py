"""The master key's file, and keys that never meet."""

import itertools
import os
import stat
import threading

import pytest

from grape_ray.errors import ConfigError, StorageError
from grape_ray.privacy import keys


def test_the_key_file_is_private_and_kept(tmp_path):
    path = tmp_path / "config" / "master.key"
    key = keys.master_key(path)
    assert len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys.master_key(path) == key
    assert os.listdir(path.parent) == ["master.key"]
    assert keys.master_key(tmp_path / "other.key") != key


def test_creators_at_one_time_get_one_key(tmp_path):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(keys.master_key(tmp_path / "k")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_key_open_to_others_is_refused(tmp_path, mode):
    keys.master_key(tmp_path / "k")
    (tmp_path / "k").chmod(mode)
    with pytest.raises(StorageError, match="open to others"):
        keys.master_key(tmp_path / "k")


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_key_of_another_length_is_refused(tmp_path, size):
    path = tmp_path / "k"
    path.touch(mode=0o600)
    path.write_bytes(b"x" * size)
    with pytest.raises(StorageError, match="damaged"):
        keys.master_key(path)


def test_a_folder_in_the_keys_place_is_refused(tmp_path):
    with pytest.raises(StorageError):
        keys.master_key(tmp_path)


def test_labels_are_unambiguous():
    key = bytes(range(32))
    lists = [
        ("a", "b"),
        ("ab",),
        ("a", "b", ""),
        ("", "a", "b"),
        ("b", "a"),
        ("1",),
        (1,),
        (-1,),
        (11,),
        (1, 1),
        ("a\x00b",),
        ("s",),
    ]
    derived = [keys.derive(key, *labels) for labels in lists]
    assert all(len(d) == 32 for d in derived)
    assert all(a != b for a, b in itertools.combinations(derived, 2))
    assert keys.derive(key, "a", 1) == keys.derive(key, "a", 1)
    assert keys.derive(key, "a") != keys.derive(bytes(32), "a")
    # Pinned: a change of the encoding would change every run's noise.
    assert keys.derive(key, "ledger", "study", 1).hex()[:16] == "9f5665a563c7f10d"


@pytest.mark.parametrize("labels", [(), (True,), (1.0,), (None,), (b"a",)])
def test_labels_of_other_types_are_refused(labels):
    with pytest.raises(ConfigError):
        keys.derive(bytes(32), *labels)


def test_key_id_is_short_and_no_key():
    assert len(keys.key_id(bytes(32))) == 16
    assert keys.key_id(bytes(32)) != keys.key_id(bytes(31) + b"\x01")


def test_the_key_stays_outside_of_runs(tmp_path):
    keys.check_outside(tmp_path / "keys" / "k", str(tmp_path / "runs"), "s3://bucket/runs")
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    for path in (
        tmp_path / "runs" / "a" / "k",
        tmp_path / "keys" / ".." / "runs" / "k",
        tmp_path / "link" / "k",
    ):
        with pytest.raises(ConfigError, match="inside"):
            keys.check_outside(path, str(tmp_path / "elsewhere"), f"file://{tmp_path}/runs")
