"""The master key of a user, and the keys derived from it, one for each stream of each attempt."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from grape_ray.errors import ConfigError, StorageError
from grape_ray.storage import Storage

KEY_BYTES = 32
_SALT = b"grape-ray/v1"


def default_path() -> Path:
    """The file of the master key where no other is named."""
    return Path.home() / ".config" / "grape-ray" / "master.key"


def master_key(path: Path | str | None = None) -> bytes:
    """The 32 secret bytes of a key file, which is made from the operating system's generator where
    there is none yet.

    The file is created exclusively, with mode 0600, and appears whole or not at all; of two
    creators one wins and both return its key.

    Raises:
        StorageError: the file cannot be read or made, is readable by others than its owner, or does
            not hold 32 bytes.
    """
    path = default_path() if path is None else Path(path).expanduser()
    try:
        if not path.exists():
            _create(path)
        return _read(path)
    except OSError as error:
        raise StorageError(
            f"master key {path} cannot be used",
            str(error),
            "a readable file",
            "choose another path",
        ) from error


def _create(path: Path) -> None:
    """Makes the file whole or not at all; of two creators one wins."""
    try:
        Storage(path.parent).create(path.name, os.urandom(KEY_BYTES), private=True)
    except FileExistsError:
        return
    except StorageError as error:
        raise OSError(str(error)) from error


def _read(path: Path) -> bytes:
    """Read a key through one descriptor, so that what was checked is what is read."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise StorageError(
                f"master key {path} is no file", None, "a regular file", "choose another path"
            )
        if status.st_mode & 0o077:
            raise StorageError(
                f"master key {path} is open to others",
                f"mode {status.st_mode & 0o777:04o}",
                "mode 0600",
                "chmod 600 it",
            )
        # a byte more, so that a longer file shows
        key = file.read(KEY_BYTES + 1)
    if len(key) != KEY_BYTES:
        fix = "restore it from a copy, or move it away to have a new one made"
        raise StorageError(
            f"master key {path} is damaged", f"{status.st_size} bytes", f"{KEY_BYTES} bytes", fix
        )
    return key


def key_id(key: bytes) -> str:
    """A name of 16 hexadecimal digits that tells keys apart and tells nothing else about them
    (SHA-256).
    """
    # a domain of its own, so that no derived key can be this
    return hashlib.sha256(_SALT + b"/id" + key).hexdigest()[:16]


def derive(key: bytes, *labels: str | int) -> bytes:
    """The 32-byte key for a list of labels (HKDF-SHA256, RFC 5869).

    Two different lists never meet: each label is written with its type and length, so ("a", "b"),
    ("ab",), ("1",) and (1,) are four keys.

    Args:
        key: 32 secret bytes.
        labels: at least one string or integer, such as the ledger's id, study, run, attempt and
            stream.

    Raises:
        ConfigError: the key has another length, or a label another type.

    >>> derive(bytes(32), "run", 1) == derive(bytes(32), "run", "1")
    False
    """
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            "the key has a wrong length",
            len(key),
            f"{KEY_BYTES} bytes",
            "pass what master_key or derive returned",
        )
    if not labels:
        raise ConfigError(
            "a key is derived without a label", None, "one label at least", "name the stream"
        )
    return HKDF(
        algorithm=SHA256(), length=KEY_BYTES, salt=_SALT, info=b"".join(map(_encode, labels))
    ).derive(key)


def of_attempt(key: bytes, *labels: str | int) -> bytes:
    """The 32-byte key of one attempt, from which its streams are derived; another one at every
    call.

    It mixes fresh bytes of the operating system's in, which are kept nowhere: attempts that were
    given one number by two copies of a ledger have two keys all the same, and no attempt needs its
    key a second time, because a restarted one is a new attempt.

    Args, Raises: as of ``derive``.
    """
    return derive(key, *labels, "fresh", os.urandom(KEY_BYTES).hex())


def _encode(label: str | int) -> bytes:
    """Type, length and value of one label."""
    if isinstance(label, bool) or not isinstance(label, (str, int)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            "a label of a key has a wrong type",
            type(label).__name__,
            "a string or an integer",
            "convert it",
        )
    tag, text = (b"s", label.encode()) if isinstance(label, str) else (b"i", str(label).encode())
    return tag + len(text).to_bytes(8, "big") + text


def check_outside(path: Path | str, *folders: str) -> None:
    """Refuse a master key that lies in a folder which is copied, shared or published (runs,
    checkpoints, ledgers).

    Args:
        path: the key file.
        folders: local paths or URLs; those on remote storage hold no local file and pass.

    Raises:
        ConfigError: the key lies inside one of the folders.
    """
    # resolved: a symbolic link into the folder is inside it
    place = Path(path).expanduser().resolve()
    for folder in folders:
        scheme, separator, rest = folder.partition("://")
        if separator and scheme not in ("file", "local"):
            continue
        root = Path(rest if separator else folder).expanduser().resolve()
        if place.is_relative_to(root):
            fix = "keep the key apart from what it protects"
            raise ConfigError(
                "the master key lies inside a run's folder",
                str(place),
                f"a path outside {root}",
                fix,
            )
