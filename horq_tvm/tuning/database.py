"""What was measured, on disk: a folder keyed by target and workload. docs/tuning.md documents the format.

    DIR/format.json              {"format": "horq-tvm tuning database", "version": 1}
    DIR/<target>/target.json     what the target's code is compiled for, for people
    DIR/<target>/<workload>.jsonl   one record a line, only ever appended to

A record is written by one `write` under a lock of its file, so tuners may share a folder and a kill leaves whole lines.
Folders are merged by putting the lines of one behind those of the other. The package has a folder of its own,
`shipped`, with the picks of devices that were at hand (`Database.ship`). Nothing here needs the compiler.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from horq_tvm.datasets import cache_folder
from horq_tvm.errors import HorqError, UsageError
from horq_tvm.files import replacing
from horq_tvm.targets import Target

VERSION = 1
FORMAT = {"format": "horq-tvm tuning database", "version": VERSION}
FORMAT_FILE, TARGET_FILE, SUFFIX = "format.json", "target.json", ".jsonl"
SHIPPED = Path(__file__).parent / "shipped"
Kind = Literal["measurement", "confirmation"]


@dataclass(frozen=True)
class Record:
    """A candidate that was measured, or a final pick that was timed against the default in one interleaved run.

    `seconds` are the samples of one call that were kept, `default_seconds` those of the default in the same run (of a
    confirmation); `error` says why there are none. `used` is whether a confirmed pick was faster: builds take it then.
    """

    decisions: Mapping[str, int | str]
    seconds: tuple[float, ...] = ()
    error: str | None = None
    kind: Kind = "measurement"
    default_seconds: tuple[float, ...] = ()
    used: bool = False
    rule: str = ""
    seed: int = 0
    compiler: str = ""

    @property
    def median(self) -> float:
        """Seconds of one call, infinite where there is no sample."""
        return median(self.seconds)

    def to_line(self) -> str:
        """The record as one line of JSON, with the final newline."""
        return json.dumps({"v": VERSION, **asdict(self)}, separators=(",", ":"), sort_keys=True) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Record:
        """ValueError where the line is no record of this version; unknown keys are passed over."""
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError(f"a record is an object, not {type(found).__name__}")
        if found.get("v") != VERSION:
            raise ValueError(f"version {found.get('v')!r}; this horq-tvm reads version {VERSION}")
        if found.get("kind") not in ("measurement", "confirmation"):
            raise ValueError(f"kind {found.get('kind')!r}; accepted: measurement, confirmation")
        decisions = found["decisions"]
        if not isinstance(decisions, dict) or not all(type(v) in (int, str) for v in decisions.values()):
            raise ValueError("decisions: accepted are names with numbers or words")
        for key in ("seconds", "default_seconds"):
            if not all(type(v) is float and v > 0 for v in found[key]):
                raise ValueError(f"{key}: accepted are numbers above 0")
            found[key] = tuple(found[key])
        return cls(**{key: value for key, value in found.items() if key in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Best:
    """What is known of a workload: how many measurements, and the confirmed decisions (None: the default is taken)."""

    measurements: int = 0
    decisions: Mapping[str, int | str] | None = None


@dataclass(frozen=True)
class Merged:
    """How many records, of how many kernels (a kernel counts once a target)."""

    records: int
    kernels: int


def median(values: tuple[float, ...]) -> float:
    """Of an even number the lower one of the two; infinite of none."""
    return sorted(values)[(len(values) - 1) // 2] if values else float("inf")


@dataclass(frozen=True)
class Database:
    """A folder of records. HorqError where it is another version's or a line is no record: nothing is changed."""

    folder: Path
    _cache: dict[Path, tuple[tuple[int, int], tuple[Record, ...]]] = field(default_factory=dict, compare=False)

    @classmethod
    def open(cls, folder: str | Path, create: bool = False) -> Database:
        """The database in `folder`, which is made where it is missing if `create` says so.

        Raises:
            UsageError: there is no such folder, or it holds other things.
            HorqError: it is a database of another version, or its format file cannot be read.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"database {folder}: it is a file; accepted: a folder")
        if create and (not folder.exists() or not any(folder.iterdir())):
            folder.mkdir(parents=True, exist_ok=True)
            _write_json(folder / FORMAT_FILE, FORMAT)
        if not folder.is_dir():
            raise UsageError(f"database {folder}: there is no such folder; `horq-tvm tune` makes one")
        _check_format(folder / FORMAT_FILE)
        return cls(folder)

    def path(self, target: Target, workload: str) -> Path:
        """The file of a workload's records."""
        return self.folder / target_key(target) / f"{workload}{SUFFIX}"

    def append(self, target: Target, workload: str, record: Record) -> None:
        """Adds a record. HorqError where the file cannot be written or its last line is cut off."""
        path = self.path(target, workload)
        self._describe(target)
        data = record.to_line().encode()
        try:
            with path.open("a+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                size = file.seek(0, os.SEEK_END)
                if size:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        raise _corrupt(path, "last", "it is cut off")
                file.write(data)
        except OSError as error:
            raise HorqError(f"cannot write {path}: {error.strerror or error}") from error

    def records(self, target: Target, workload: str) -> tuple[Record, ...]:
        """What is known of a workload, in the order in which it was measured. HorqError names a line that is none."""
        path = self.path(target, workload)
        try:
            status = path.stat()
        except FileNotFoundError:
            return ()
        seen = (status.st_size, status.st_mtime_ns)
        if path not in self._cache or self._cache[path][0] != seen:
            self._cache[path] = seen, tuple(_read(path))
        return self._cache[path][1]

    def best(self, target: Target, workload: str) -> Best:
        """The last confirmation decides: its pick where it was faster than the default."""
        found = self.records(target, workload)
        measured = sum(record.kind == "measurement" for record in found)
        confirmed = _last_confirmation(found)
        return Best(measured, confirmed.decisions if confirmed and confirmed.used else None)

    def check(self) -> None:
        """Reads every line. HorqError names the first that is no record, or a target's description that is no JSON."""
        for path in self._files():
            for _ in _read(path):
                pass
            _description(path.parent)

    def merge(self, other: Database) -> Merged:
        """Takes over what `other` has and this one lacks, line by line; where both confirmed a pick, `other`'s counts.

        Raises:
            HorqError: a line of either is no record, found before anything is written; or a file cannot be written,
                which is then left as it was. A merge that was stopped half-way is completed by merging again.
        """
        other.check()
        for path in other._files():
            if (known := self.folder / path.relative_to(other.folder)).exists():
                list(_read(known))
        added = []
        for path in other._files():
            own = self.folder / path.relative_to(other.folder)
            try:
                own.parent.mkdir(exist_ok=True)
                described = _description(path.parent)
                if described is not None and not (own.parent / TARGET_FILE).exists():
                    _write_json(own.parent / TARGET_FILE, described)
                added.append(_take_over(path, own))
            except OSError as error:
                raise HorqError(f"cannot write {own}: {error.strerror or error}") from error
        return Merged(sum(added), sum(count > 0 for count in added))

    def ship(self, into: Path) -> Merged:
        """Puts what builds need into the database `into`, made where missing: of each kernel the pick that is used.

        A kernel's file there is replaced by that one record, and removed where this database confirmed that the
        default is faster; of other kernels nothing changes. The same records give the same bytes. Returns what `into`
        holds then. HorqError as `merge`; UsageError where `into` is this database, which would lose its measurements.
        """
        if into.resolve() == self.folder.resolve():
            raise UsageError(f"{into} is the database itself; accepted: another folder to ship")
        self.check()
        shipped = Database.open(into, create=True)
        for path in self._files():
            confirmed = _last_confirmation(tuple(_read(path)))
            own = shipped.folder / path.relative_to(self.folder)
            if confirmed is None:
                continue
            if not confirmed.used:
                own.unlink(missing_ok=True)
                continue
            own.parent.mkdir(exist_ok=True)
            if (described := _description(path.parent)) is not None:
                _write_json(own.parent / TARGET_FILE, described)
            with replacing(own) as partial:
                partial.write_text(confirmed.to_line())
        kept = shipped._files()
        return Merged(sum(len(list(_read(path))) for path in kept), len(kept))

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"*/*{SUFFIX}"))

    def _describe(self, target: Target) -> None:
        folder = self.folder / target_key(target)
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise HorqError(f"cannot write {folder}: {error.strerror or error}") from error
        if not (folder / TARGET_FILE).exists():
            _write_json(folder / TARGET_FILE, {"name": target.name, **_code_of(target)})


def user_database() -> Database | None:
    """The database in the user's cache folder, None where there is none. HorqError as `Database.open`."""
    folder = cache_folder() / "tuning"
    return Database.open(folder) if folder.is_dir() else None


def shipped_database() -> Database | None:
    """The database of the package, None where it was installed without one."""
    return Database.open(SHIPPED) if SHIPPED.is_dir() else None


def target_key(target: Target) -> str:
    """The folder of a target: what LLVM compiles for, and a digest of everything that a kernel depends on.

    Not the target's name: `native` on a machine and the preset of its CPU compile the same code.
    """
    code = json.dumps(_code_of(target), sort_keys=True)
    return f"{re.sub('[^0-9A-Za-z.-]', '_', target.mcpu)}-{hashlib.sha256(code.encode()).hexdigest()[:12]}"


def _code_of(target: Target) -> dict[str, Any]:
    keys = ("family", "mtriple", "mcpu", "popcount", "vector_bits", "vector_registers", "word_bits")
    return {**{key: getattr(target, key) for key in keys}, "mattr": sorted(target.mattr)}


def _check_format(path: Path) -> None:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(
            f"database {path.parent}: no {FORMAT_FILE} in it, so it is none; accepted: what `horq-tvm tune` made, or an"
            " empty folder to tune into"
        ) from None
    except (OSError, ValueError) as error:
        raise HorqError(f"{path} cannot be read ({error}); nothing was changed") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT["format"]:
        raise HorqError(f"{path} does not say {FORMAT['format']!r}; nothing was changed")
    if found.get("version") != VERSION:
        raise HorqError(
            f"the database {path.parent} is of version {found.get('version')!r}; this horq-tvm reads version"
            f" {VERSION}; nothing was changed"
        )


def _read(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        text = file.read()
    lines = text.split(b"\n")
    if lines.pop():
        raise _corrupt(path, "last", "it is cut off")
    for number, line in enumerate(lines, 1):
        try:
            yield Record.from_line(line.decode())
        except (ValueError, KeyError, TypeError) as error:
            raise _corrupt(path, str(number), f"{type(error).__name__}: {error}") from error


def _last_confirmation(records: tuple[Record, ...]) -> Record | None:
    return next((record for record in reversed(records) if record.kind == "confirmation"), None)


def _take_over(source: Path, own: Path) -> int:
    """Adds the lines of `source` that `own` lacks, all of them or none; how many."""
    with own.open("a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        before = file.read()
        known = set(before.splitlines())
        new = [line for line in source.read_bytes().splitlines() if line not in known]
        data = b"".join(line + b"\n" for line in new)
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(len(before))
            raise
    return len(new)


def _description(folder: Path) -> Any:
    """What a target's folder says of it, None where it does not. HorqError where that is no JSON."""
    path = folder / TARGET_FILE
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise HorqError(f"{path} cannot be read ({error}); nothing was changed") from error


def _corrupt(path: Path, line: str, why: str) -> HorqError:
    return HorqError(f"{path}, line {line}: no record ({why}); mend or remove that line, nothing was changed")


def _write_json(path: Path, value: object) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n")
