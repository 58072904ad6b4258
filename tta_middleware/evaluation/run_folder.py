"""The folder of a run: its settings, the commands that filled it, its results so far, its summary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from tta_middleware.errors import ConfigurationError
from tta_middleware.files.jsonl import Record, dump, recover

PROMPTS = "prompts_sha256"
"""The setting that holds digests of the prompt files."""


class RunFolder:
    """Appends results; takes up where an earlier run with the same settings was cut off.

    Args:
        settings: everything but the methods and seeds that changes results.
        methods: the settings of each method by its name. Methods, prompts and seeds may be added to a run.
        command: how it was called, kept with those of earlier calls.
        judges: names of those whose opinions every result has. Judges may be added, none may be left out.

    Raises:
        ConfigurationError: the folder cannot be made, holds a run with other settings, or is being written by another
            process.
        DataError: a line of the earlier results is broken.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        methods: Mapping[str, str],
        command: str = "",
        judges: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.results = folder / "results.jsonl"
        self.commands: list[str] = []
        self.methods: tuple[str, ...] = ()
        """The run's methods, this command's and those before, in the order in which they were asked for."""
        self.keeps_text = bool(settings.get("keep_text"))
        self._unnamed_judge = ""
        self._make()
        self._lock = FileLock(folder / ".lock", timeout=0)
        self._take()
        try:
            self._agree({"settings": dict(settings), "methods": dict(methods), "judges": list(judges)}, command)
            self.records: list[Record] = [self._with_names(record) for record in recover(self.results)]
            self._file = self.results.open("a", encoding="utf-8")
        except BaseException:
            self._lock.release()
            raise

    @property
    def finished(self) -> set[tuple[str, int, str]]:
        """The (id, seed, method) triples that have a result."""
        return {(str(r.get("id")), int(r.get("seed") or 0), str(r.get("method"))) for r in self.records}

    def append(self, record: Record) -> None:
        """Write one result through to the system at once."""
        self._file.write(dump(record) + "\n")
        self._file.flush()
        self.records.append(record)

    def rewrite(self) -> None:
        """Write all records anew, as they are now; the file is replaced as a whole."""
        beside = self.results.with_suffix(".new")
        beside.write_text("".join(f"{dump(record)}\n" for record in self.records), encoding="utf-8")
        self._file.close()
        beside.replace(self.results)
        self._file = self.results.open("a", encoding="utf-8")

    def write_summary(self, summary: Mapping[str, Any], table: str) -> None:
        """Write ``summary.json`` and ``summary.md``."""
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        (self.folder / "summary.md").write_text(table, encoding="utf-8")

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._lock.release()

    def _take(self) -> None:
        try:
            self._lock.acquire()
        except Timeout:
            raise ConfigurationError(
                f"another run is writing to {self.folder}; wait for it, or give another --out"
            ) from None

    def _make(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"cannot write to the folder {self.folder}: {error.strerror}") from None

    def _agree(self, run: dict[str, Any], command: str) -> None:
        """Hold the settings against those of an earlier run, and note them."""
        path = self.folder / "run.json"
        if path.exists():
            earlier = _read(path)
            self._unnamed_judge = earlier["unnamed_judge"]
            self._refuse_other(earlier, run)
            run |= {"unnamed_judge": self._unnamed_judge} if self._unnamed_judge else {}
            run["methods"] = {**earlier["methods"], **run["methods"]}
            self.commands = earlier["commands"]
        elif self.results.exists():
            raise ConfigurationError(f"{self.results} exists without run.json; give another --out")
        self.methods = tuple(run["methods"])
        self.commands += [command] if command and command not in self.commands else []
        path.write_text(json.dumps(run | {"commands": self.commands}, indent=2) + "\n", encoding="utf-8")

    def _with_names(self, record: Record) -> Record:
        """Results from before there could be several judges do not name theirs; the run's settings do."""
        said = record.pop("judge", None)
        return record if said is None else {**record, "judges": {self._unnamed_judge: said}}

    def _refuse_other(self, earlier: dict[str, Any], run: dict[str, Any]) -> None:
        differ = _differences(earlier["settings"], run["settings"])
        shared = [name for name in run["methods"] if name in earlier["methods"]]
        differ += [f"method {name}" for name in shared if earlier["methods"][name] != run["methods"][name]]
        differ += [f"judge {name} before, not now" for name in earlier["judges"] if name not in run["judges"]]
        if differ:
            raise ConfigurationError(
                f"{self.folder} holds a run with other settings ({'; '.join(differ)}); "
                "give another --out, or the same settings to go on"
            )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], within: str = "") -> list[str]:
    """What differs between two runs' settings, each by its own name: of a policy its threshold, not all of it."""
    told: list[str] = []
    for name in (name for name in {**old, **new} if old.get(name) != new.get(name)):
        before, now = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            told += _differences(before, now, f"{within}{name}.")
        elif name == PROMPTS:
            told.append("other prompt files, or other lines in them")
        else:
            told.append(f"{within}{name} {before!r} before, {now!r} now")
    return told


def _read(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        settings = dict(run["settings"])
        unnamed = settings.pop("judge", None) or run.get("unnamed_judge", "")
        return {
            "settings": settings,
            "methods": dict(run["methods"]),
            "judges": list(run.get("judges", [unnamed] if unnamed else [])),
            "unnamed_judge": unnamed,
            "commands": list(run.get("commands", [])),
        }
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigurationError(f"{path} cannot be read; give another --out") from None
