"""What a hub with `--data DIR` keeps over a restart: identities with their keys, twins, sessions, jobs.

Memory is the truth; every change is written in the callback that made it, before it is answered. A killed
process loses nothing that was answered; after a power cut the last moments may be missing (SQLite, WAL with
synchronous=NORMAL).
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .registry import Identity
from .twins import Twin

_TWIN = (
    "tags",
    "desired",
    "reported",
    "desired_version",
    "reported_version",
    "etag_counter",
    "desired_metadata",
    "reported_metadata",
)
_FORMAT = 1


class Storage:
    """The file hub.db in a folder, made when it is not there; it holds keys, so nobody else may read it.

    ValueError: the file is none of a hub's, or of a newer one. OSError: another hub uses it, or the folder
    cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "hub.db"
        path.touch(mode=0o600)
        # Made in one thread and used in the hub's.
        self._database = sqlite3.connect(path, timeout=1.0, isolation_level=None, check_same_thread=False)
        try:
            self._database.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            version = self._database.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _FORMAT):
                raise ValueError(
                    f"{path} has format {version}, this hub knows {_FORMAT}: use a newer release"
                )
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS kept "
                "(id TEXT PRIMARY KEY, identity TEXT, twin TEXT, session TEXT)"
            )
            self._database.execute("CREATE TABLE IF NOT EXISTS jobs (id TEXT PRIMARY KEY, job TEXT)")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS outcomes "
                "(job TEXT, device TEXT, outcome TEXT, PRIMARY KEY (job, device))"
            )
            self._database.execute(f"PRAGMA user_version={_FORMAT}")
        except sqlite3.OperationalError as error:
            self._database.close()
            raise OSError(f"{path} cannot be used, another hub may do so: {error}") from None
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise ValueError(f"{path} is no hub's data: {error}") from None
        except ValueError:
            self._database.close()
            raise

    def close(self) -> None:
        self._database.close()

    def policy_key(self, key: str | None) -> str | None:
        """The key of the hub's policies: this one from now on, or what was kept."""
        if key is not None:
            self._database.execute(
                "INSERT INTO kept (id, identity) VALUES ('', ?) ON CONFLICT (id) DO UPDATE SET identity = ?",
                (key, key),
            )
            return key
        found = self._database.execute("SELECT identity FROM kept WHERE id = ''").fetchone()
        return found[0] if found else None

    def load(self) -> Iterator[tuple[Identity, Twin, dict[str, int] | None]]:
        """Every identity with its twin and its session's subscriptions, in the order of creation."""
        rows = self._database.execute(
            "SELECT identity, twin, session FROM kept WHERE id != '' ORDER BY rowid"
        )
        for identity_text, twin_text, session_text in rows.fetchall():
            fields: dict[str, Any] = json.loads(identity_text)
            fields["thumbprints"] = tuple(fields["thumbprints"])
            session = None if session_text is None else json.loads(session_text)
            yield Identity(**fields), Twin(**json.loads(twin_text)), session

    def save(self, identity: Identity, twin: Twin, subscriptions: dict[str, int] | None) -> None:
        """Keep an identity as it is now. subscriptions: of its session, None if there is none to keep."""
        values = (
            identity.id,
            json.dumps(asdict(identity)),
            json.dumps({name: getattr(twin, name) for name in _TWIN}),
            None if subscriptions is None else json.dumps(subscriptions),
        )
        self._database.execute(
            "INSERT INTO kept VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE "
            "SET identity = excluded.identity, twin = excluded.twin, session = excluded.session",
            values,
        )

    def remove(self, identity_id: str) -> None:
        self._database.execute("DELETE FROM kept WHERE id = ?", (identity_id,))

    # ------------------------------------------------------------------ jobs

    @contextmanager
    def together(self) -> Iterator[None]:
        """Have all that is written meanwhile be kept, or nothing of it."""
        self._database.execute("BEGIN")
        try:
            yield
        finally:
            # Memory is the truth: what was done is kept, whatever came after it.
            self._database.execute("COMMIT")

    def load_jobs(self) -> Iterator[tuple[dict[str, Any], dict[str, dict[str, Any]]]]:
        """Every job with what became of it on each device, in the order of creation."""
        for name, text in self._database.execute("SELECT id, job FROM jobs ORDER BY rowid").fetchall():
            rows = self._database.execute(
                "SELECT device, outcome FROM outcomes WHERE job = ? ORDER BY rowid", (name,)
            )
            yield json.loads(text), {device: json.loads(outcome) for device, outcome in rows.fetchall()}

    def save_job(self, job: dict[str, Any]) -> None:
        """Keep a job as it is now, without what became of it on its devices."""
        text = json.dumps(job)
        self._database.execute(
            "INSERT INTO jobs VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET job = excluded.job",
            (job["id"], text),
        )

    def save_outcome(self, job_id: str, device_id: str, outcome: dict[str, Any]) -> None:
        """Keep what became of a job on one device."""
        self._database.execute(
            "INSERT INTO outcomes VALUES (?, ?, ?) "
            "ON CONFLICT (job, device) DO UPDATE SET outcome = excluded.outcome",
            (job_id, device_id, json.dumps(outcome)),
        )

    def remove_job(self, job_id: str) -> None:
        with self.together():
            self._database.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
            self._database.execute("DELETE FROM outcomes WHERE job = ?", (job_id,))
