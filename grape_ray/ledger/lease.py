"""A lease of a ledger: which cluster charges it, and a beat that shows that the cluster lives."""

from __future__ import annotations

import json
import os
import platform
import threading
import time

from grape_ray.errors import GrapeRayError, LedgerError
from grape_ray.storage import Json, Storage

LEASE_FILE = "claim.json"  # its name in ledgers that exist
BEAT_S = 2.0
_PATIENCE_BEATS = 4


class Lease:
    """A file beside the entries that its holder rewrites every few seconds.

    It keeps a second cluster out while the first lives, and lets it in when the first has died. It
    compares no clocks: a lease lives while its beat changes. What must never happen does not rest
    on it: a holder that was overtaken is barred by the chain's epochs.

    Args:
        storage: the ledger's folder. cluster: a name that all processes of one cluster share, and
            no others.
    """

    def __init__(self, storage: Storage, cluster: str, beat_s: float = BEAT_S):
        self._storage, self._cluster, self._beat_s = storage, cluster, beat_s
        self._beats, self._over = 0, threading.Event()

    def take(self) -> None:
        """Hold the ledger from now on: at once where nobody else does, after some beats where the
        other holder is silent.

        Raises:
            LedgerError: another cluster holds it and lives, or storage cannot be reached.
        """
        seen, changes, quiet_since = self._read(), 0, time.monotonic()
        while seen is not None and seen["cluster"] != self._cluster:
            time.sleep(self._beat_s / 4)
            now = self._read()
            if now != seen:
                seen, changes, quiet_since = now, changes + 1, time.monotonic()
            # one change may be the last beat of a holder that died while this one looked
            if seen is not None and changes >= 2:
                got = f"process {seen['pid']} on {seen['host']}"
                fix = (
                    "run in that cluster, wait for its end, or give this sweep a ledger of its own"
                )
                raise LedgerError(
                    f"another cluster holds the ledger {self._storage.url}",
                    got,
                    "a ledger that no other cluster charges",
                    fix,
                )
            if time.monotonic() - quiet_since > _PATIENCE_BEATS * self._beat_s:
                break
        self._write()
        threading.Thread(target=self._keep, daemon=True).start()

    def release(self) -> None:
        """Give the ledger up, so that the next cluster need not wait."""
        self._over.set()
        # another cluster's lease is not this one's to remove
        if self._mine(self._read()):
            self._storage.remove(LEASE_FILE)

    def _keep(self) -> None:
        """Beat until the lease is given up, or is no longer this cluster's."""
        while not self._over.wait(self._beat_s):
            try:
                seen = self._read()
                if seen is not None and not self._mine(seen):
                    return
                if seen is not None:  # a folder that is away is not to be made anew
                    self._write()
            # Storage is away: charges fail by themselves, and the beat continues when it is back.
            except GrapeRayError:
                continue

    def _mine(self, seen: Json | None) -> bool:
        return seen is not None and (seen["cluster"], seen["pid"]) == (self._cluster, os.getpid())

    def _read(self) -> Json | None:
        try:
            return json.loads(self._storage.read(LEASE_FILE))
        except FileNotFoundError:
            return None
        except (ValueError, OSError, GrapeRayError) as error:
            fix = "nothing was granted; check the location and try again"
            raise LedgerError(
                f"the lease of {self._storage.url} cannot be read",
                str(error),
                "storage that can be used",
                fix,
            ) from error

    def _write(self) -> None:
        self._beats += 1
        lease = {
            "cluster": self._cluster,
            "pid": os.getpid(),
            "host": platform.node(),
            "beat": self._beats,
        }
        self._storage.write(LEASE_FILE, json.dumps(lease).encode(), private=True)
