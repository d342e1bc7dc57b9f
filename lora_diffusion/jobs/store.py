"""The queue's database: what was asked for, in which order, and when things happened. Never what is so now.

Every function opens a connection of its own and makes one transaction, so any number of processes can use it, and one
that is killed leaves nothing half done. The journal is SQLite's plain one: WAL needs memory that processes share, which
network drives lack, and the switch to WAL fails where it would have to wait for another process.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from lora_diffusion.errors import UserError

Wanted = Literal["run", "pause", "stop"]
Kind = Literal["train", "caption"]
"""What a job does."""

_BUSY_TIMEOUT_S = 20.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL DEFAULT 'train',
    name TEXT NOT NULL,
    run TEXT NOT NULL,
    steps INTEGER NOT NULL,
    wanted TEXT NOT NULL DEFAULT 'run',
    waiting INTEGER NOT NULL,
    place REAL NOT NULL,
    created REAL NOT NULL,
    started REAL,
    launched REAL,
    attempt INTEGER NOT NULL DEFAULT 0,
    launcher_pid INTEGER,
    launcher_start REAL,
    exit INTEGER,
    ended REAL,
    asked REAL,
    forced REAL,
    forgotten REAL
)
"""


_NEW_COLUMNS = {"kind": "TEXT NOT NULL DEFAULT 'train'"}
"""What databases of earlier versions lack."""


class QueueError(UserError):
    """The queue cannot do that: no such job, or the job's state does not allow it."""


@dataclass(frozen=True)
class Entry:
    """One row. Times are seconds since 1970; None means not yet."""

    id: int
    kind: Kind
    name: str
    run: str
    """Run folder, relative to the workspace where it lies in it."""
    steps: int
    """Of the config, for as long as the run folder says nothing; 0 where they follow from the data set."""
    wanted: Wanted
    waiting: int
    """1 while it is the runner's turn to start it."""
    place: float
    created: float
    started: float | None
    """When it was launched for the first time."""
    launched: float | None
    """When it was launched for the last time."""
    attempt: int
    launcher_pid: int | None
    launcher_start: float | None
    exit: int | None
    """Exit status of the last launch, where a runner saw it; negative: the signal that ended it."""
    ended: float | None
    """When a runner saw the last launch end."""
    asked: float | None
    """When a pause or a stop was asked for."""
    forced: float | None
    """When the trainer was interrupted because it did not react."""
    forgotten: float | None

    @property
    def is_waiting(self) -> bool:
        """Also true if a runner took the job and was killed before it started anything: the next one will."""
        was_lost = self.launched is not None and self.launcher_pid is None and self.ended is None
        return bool(self.waiting) or (was_lost and self.wanted == "run")

    @property
    def needs_runner(self) -> bool:
        """Whether it waits to be started, or was started and no runner has seen it end."""
        return self.is_waiting or (self.launched is not None and self.ended is None)


_COLUMNS = ", ".join(field.name for field in fields(Entry))


@dataclass(frozen=True)
class Store:
    """path: the database file, which is made when it is first used."""

    path: Path

    def entries(self) -> list[Entry]:
        """All of them, also the forgotten; those that wait in their order, and before them the others by age."""
        if not self.path.exists():
            return []
        with self._transaction(write=False) as db:
            rows = db.execute(f"SELECT {_COLUMNS} FROM jobs ORDER BY waiting, CASE waiting WHEN 1 THEN place END, id")
            return [Entry(*row) for row in rows]

    def entry(self, id: int) -> Entry:
        """Raises QueueError if there is none."""
        with self._transaction(write=False) as db:
            return _entry(db, id)

    def add(
        self,
        name: str,
        steps: int,
        prepare: Callable[[int, set[str]], str],
        *,
        kind: Kind = "train",
        waiting: bool = True,
    ) -> int:
        """A new entry, at the end of the queue; returns its id.

        prepare: given the new id and all run folders in use, makes the files of the job and returns its run folder.
        It runs before anyone else can see the entry or choose a folder.
        """
        with self._transaction() as db:
            cursor = db.execute(
                "INSERT INTO jobs (kind, name, run, steps, waiting, place, created) "
                "VALUES (?, ?, '', ?, ?, (SELECT coalesce(max(place), 0) + 1 FROM jobs), ?)",
                (kind, name, steps, int(waiting), time.time()),
            )
            id = cursor.lastrowid
            assert id is not None
            taken = {row[0] for row in db.execute("SELECT run FROM jobs WHERE id != ?", (id,))}
            db.execute("UPDATE jobs SET run = ? WHERE id = ?", (prepare(id, taken), id))
            return id

    def change(self, id: int, **values: Any) -> None:
        """Set columns of one entry."""
        with self._transaction() as db:
            _entry(db, id)
            names = ", ".join(f"{name} = :{name}" for name in values)
            db.execute(f"UPDATE jobs SET {names} WHERE id = :id", values | {"id": id})

    def enqueue(self, *ids: int, first: bool) -> None:
        """Let the entries wait for their turn in this order, before or behind all others."""
        with self._transaction() as db:
            place = "min(place) - 1" if first else "max(place) + 1"
            for id in reversed(ids) if first else ids:
                _entry(db, id)
                db.execute(
                    "UPDATE jobs SET waiting = 1, wanted = 'run', asked = NULL, forced = NULL, "
                    f"place = (SELECT {place} FROM jobs) WHERE id = ?",
                    (id,),
                )

    def move(self, id: int, position: int) -> None:
        """Put a waiting entry at `position`, counted from 1, of those that wait. Raises QueueError if it does not."""
        with self._transaction() as db:
            order = [row[0] for row in db.execute("SELECT id FROM jobs WHERE waiting = 1 ORDER BY place, id")]
            if id not in order:
                raise QueueError(f"Job {id} does not wait in the queue; only waiting jobs have a position.")
            order.remove(id)
            order.insert(max(position, 1) - 1, id)
            db.executemany("UPDATE jobs SET place = ? WHERE id = ?", [(place, id) for place, id in enumerate(order)])

    def take_next(self, last: int | None = None) -> Entry | None:
        """The first that waits, which no longer waits: whoever gets it starts it. last: the greatest id it may have."""
        with self._transaction() as db:
            row = db.execute(
                "SELECT id FROM jobs WHERE waiting = 1 AND id <= coalesce(?, id) ORDER BY place, id LIMIT 1", (last,)
            ).fetchone()
            if row is None:
                return None
            now = time.time()
            db.execute(
                "UPDATE jobs SET waiting = 0, launched = ?, started = coalesce(started, ?), attempt = attempt + 1, "
                "launcher_pid = NULL, launcher_start = NULL, exit = NULL, ended = NULL, asked = NULL, forced = NULL "
                "WHERE id = ?",
                (now, now, row[0]),
            )
            return _entry(db, row[0])

    @contextmanager
    def _transaction(self, *, write: bool = True) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise QueueError(f"{self.path.parent} cannot be made: {error.strerror}. Choose another --root.") from error
        try:
            with closing(sqlite3.connect(self.path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)) as db:
                db.execute(_SCHEMA)
                _add_new_columns(db)
                db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                try:
                    yield db
                except BaseException:
                    db.execute("ROLLBACK")
                    raise
                db.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            raise QueueError(
                f"{self.path} cannot be used: {error}. If it is damaged, delete it: the order of the queue is lost, "
                "the runs stay."
            ) from error


def _add_new_columns(db: sqlite3.Connection) -> None:
    def missing() -> list[str]:
        return [name for name in _NEW_COLUMNS if name not in {row[1] for row in db.execute("PRAGMA table_info(jobs)")}]

    if missing():
        db.execute("BEGIN IMMEDIATE")
        for name in missing():  # looked up again: another process may have been faster
            db.execute(f"ALTER TABLE jobs ADD COLUMN {name} {_NEW_COLUMNS[name]}")
        db.execute("COMMIT")


def _entry(db: sqlite3.Connection, id: int) -> Entry:
    row = db.execute(f"SELECT {_COLUMNS} FROM jobs WHERE id = ?", (id,)).fetchone()
    if row is None:
        raise QueueError(f"There is no job {id}. `lora-diffusion queue list` shows those there are.")
    return Entry(*row)
