"""Where a task's documents come from: the generated world, a dataset on the Hub, or a JSONL file."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field, ValidationError
from steerlens.evals.world.generators import GENERATORS, Generator, Item

from steerlens import plainyaml
from steerlens.errors import SteerlensError, nearest
from steerlens.examples import ExampleError, objects
from steerlens.recipe_schema import Part, explain

KINDS = ("world", "hub", "file")
FIRST_SEED = 2_000_000_000
"""First seed of evaluation documents: `tune` and `heads` draw from seeds far below."""
SEED_STEP = 1_000_000
_TRIES = 20


class TaskError(SteerlensError, ValueError):
    """A task that does not fit the schema, or documents that do not fit the task."""

    exit_code = 2


class TaskFetchError(TaskError):
    """A dataset that could not be reached: a failed run, not a wrong task."""

    exit_code = 1


class Hub(Part):
    """A dataset on the Hub, or one in a folder.

    Attributes:
        hub: its id.
        config: which of its configurations.
        split: which documents are evaluated.
        revision: commit, tag or branch.
        rows: documents in the split, for plans that are made without the data.
        tokens: of a typical prompt, likewise.
        shots_split: where demonstrations come from; the split itself unless given.
    """

    hub: Annotated[str, Field(min_length=1, max_length=1000)]
    config: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    split: Annotated[str, Field(min_length=1, max_length=200)] = "test"
    revision: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    rows: Annotated[int, Field(ge=1)] | None = None
    tokens: Annotated[int, Field(ge=1)] | None = None
    shots_split: Annotated[str, Field(min_length=1, max_length=200)] | None = None


class File(Part):
    """A JSONL file, a document a line.

    Attributes:
        file: its path, relative to the task's file.
        rows: as in `Hub`.
        tokens: as in `Hub`.
        shots_file: where demonstrations come from; the file itself unless given.
    """

    file: Annotated[str, Field(min_length=1, max_length=1000)]
    rows: Annotated[int, Field(ge=1)] | None = None
    tokens: Annotated[int, Field(ge=1)] | None = None
    shots_file: Annotated[str, Field(min_length=1, max_length=1000)] | None = None


class Rows(Protocol):
    """A table of documents, as `datasets.Dataset`."""

    column_names: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class World:
    """A generator of the world with its parameters."""

    generator: Generator

    @property
    def place(self) -> str:
        """Its name in messages, with the parameters."""
        settings = self.generator.model_dump(mode="json", exclude={"rows"})
        return f"world {self.generator.name} ({', '.join(f'{key}: {value}' for key, value in settings.items())})"

    def items(self, limit: int | None, seed: int) -> Iterator[tuple[dict[str, Any], Item]]:
        """Places of the grid, in turn, with an item each; prompts are distinct.

        Raises:
            TaskError: if there are not as many distinct prompts.
        """
        cells, seen = self.generator.cells, set()
        count = self.generator.rows if limit is None else limit
        number = FIRST_SEED + seed * SEED_STEP
        last = number + min(SEED_STEP, _TRIES * count + 1000)
        for index in range(count):
            cell = cells[index % len(cells)]
            while True:
                if number == last:
                    raise TaskError(
                        f"the world's {self.generator.name!r} has fewer than {count} distinct prompts with these "
                        f"parameters, {index} were found; give a smaller limit"
                    )
                item = self.generator.draw(number, cell)
                number += 1
                key = json.dumps([item.example.prompt, item.turns])
                if key not in seen:
                    seen.add(key)
                    break
            yield dict(cell), item

    @property
    def described(self) -> dict[str, Any]:
        """What makes its documents, in plain JSON types."""
        version = self.generator.version
        return {"world": self.generator.name, "generator_version": version, **self.generator.model_dump(mode="json")}


@dataclass(frozen=True)
class Table:
    """A dataset on the Hub or a file.

    Attributes:
        spec: where it is.
        folder: what a file's path is relative to.
    """

    spec: Hub | File
    folder: Path

    @property
    def place(self) -> str:
        """Its name in messages."""
        return self.named()

    def named(self, *, shots: bool = False) -> str:
        """Its name in messages, or with `shots` that of what demonstrations are drawn from."""
        if isinstance(self.spec, File):
            return str(self._path((shots and self.spec.shots_file) or self.spec.file))
        named = f"{self.spec.hub} ({self.spec.config})" if self.spec.config else self.spec.hub
        return f"{named}, split {(shots and self.spec.shots_split) or self.spec.split!r}"

    def at(self, index: int, *, shots: bool = False) -> str:
        """Where a row stands, for messages: "file:line", or the dataset and the row from 0."""
        place = self.named(shots=shots)
        if isinstance(self.spec, File):
            lines = self._lines.get(place) or self._lines.setdefault(place, _filled(Path(place)))
            if index < len(lines):
                return f"{place}:{lines[index]}"
        return f"{place}, row {index}"

    @cached_property
    def _lines(self) -> dict[str, list[int]]:
        """Per file the lines where its documents stand."""
        return {}

    @property
    def apart(self) -> bool:
        """Whether demonstrations come from other rows than documents."""
        if isinstance(self.spec, File):
            return self.spec.shots_file not in (None, self.spec.file)
        return self.spec.shots_split not in (None, self.spec.split)

    def rows(self, *, shots: bool = False) -> Rows:
        """All documents, or with `shots` what demonstrations are drawn from.

        Raises:
            TaskError: for a file that cannot be read or holds nothing, `datasets` not installed, or no such split.
            TaskFetchError: for a dataset that is neither in the cache nor reached.
        """
        if isinstance(self.spec, File):
            return self._of_file(self._path((shots and self.spec.shots_file) or self.spec.file))
        split = (shots and self.spec.shots_split) or self.spec.split
        named = f"dataset {self.spec.hub!r}"
        try:
            return _datasets().load_dataset(self.spec.hub, self.spec.config, split=split, revision=self.spec.revision)
        except TaskError:
            raise
        except ValueError as error:  # no such split or configuration; the message lists those there are
            raise TaskError(f"{named}: {_line(error)}") from error
        except Exception as error:  # what requests, httpx, the Hub's client and pyarrow raise
            raise TaskFetchError(
                f"{named} cannot be loaded: {_line(error)}; check the id and the network, or fetch it once and set "
                "HF_HUB_OFFLINE=1"
            ) from error

    @property
    def described(self) -> dict[str, Any]:
        """What makes its documents, in plain JSON types; a file's content counts, not its place."""
        found: dict[str, Any] = self.spec.model_dump(mode="json")
        if isinstance(self.spec, File):
            for key in ("file", "shots_file"):
                if found[key] is not None:
                    found[key] = _digest(self._path(found[key]))
        return {key: value for key, value in found.items() if key not in ("rows", "tokens")}

    def _path(self, file: str) -> Path:
        return self.folder / Path(file).expanduser()

    @staticmethod
    def _of_file(path: Path) -> Rows:
        try:
            with path.open(encoding="utf-8") as stream:
                if not sum(bool(line.strip()) for line in stream):
                    raise TaskError(f"{path} holds no document; it needs a JSON object a line")
        except OSError as error:
            raise TaskError(f"{path} cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise TaskError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from None
        try:
            return _datasets().load_dataset("json", data_files=str(path), split="train")
        except TaskError:
            raise
        except Exception as error:  # pyarrow's, pandas' and datasets' own
            try:
                collections.deque(objects(path), maxlen=0)
            except ExampleError as found:  # which says where it is
                raise TaskError(str(found)) from error
            raise TaskError(f"{path} is no JSONL file with an object a line: {_line(error)}") from error


def parse(
    data: Mapping[str, Any], source: str, lines: plainyaml.Lines, folder: Path, overrides: Mapping[str, Any]
) -> World | Table:
    """The source that a task's `data` describes.

    Args:
        data: its keys and values in the file.
        source: the file, for messages.
        lines: of the keys, with paths that begin in `data`.
        folder: what a file's path is relative to.
        overrides: values in place of the file's.

    Raises:
        TaskError: naming the file, the line, the key and the nearest known one.
    """
    kinds = [kind for kind in KINDS if kind in data]
    if len(kinds) != 1:
        line = next(iter(lines.values()), None)
        raise TaskError(
            f"{source}{f':{line}' if line else ''}: data: needs exactly one of {', '.join(KINDS)}, not "
            f"{' and '.join(kinds) or 'none'}; it has {', '.join(f'{key!r:.40}' for key in data) or 'no key'}"
        )
    models: dict[str, type[Part]] = {"hub": Hub, "file": File, **GENERATORS}
    given = dict(data)
    if kinds == ["world"]:
        name = given.pop("world")
        if not isinstance(name, str) or name not in GENERATORS:
            raise TaskError(
                f"{source}:{lines.get(('world',), 1)}: data.world: {name!r:.80} is no generator; known: "
                f"{', '.join(GENERATORS)}{nearest(str(name)[:80], GENERATORS)}"
            )
        model = models[name]
    else:
        model = models[kinds[0]]
    for key in overrides:
        if key not in model.model_fields:
            raise TaskError(
                f"{source}: unknown parameter {key!r:.80}; its data have {', '.join(model.model_fields)}"
                f"{nearest(str(key)[:80], model.model_fields)}"
            )
    try:
        found = model.model_validate({**given, **overrides})
    except ValidationError as error:
        told = {path: line for path, line in lines.items() if path[:1] and path[0] not in overrides}
        raise TaskError(explain(error, model, source, told)) from error
    if isinstance(found, Generator):
        return World(found)
    assert isinstance(found, Hub | File)
    return Table(found, folder)


def order(count: int, key: str) -> list[int]:
    """The numbers below `count`, shuffled by `key`."""
    numbers = list(range(count))
    random.Random(key).shuffle(numbers)
    return numbers


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row in plain JSON types."""
    found: dict[str, Any] = json.loads(json.dumps(row, default=str))
    return found


def require(columns: Sequence[str], rows: Rows, place: str, task: str) -> None:
    """Raises `TaskError` for a column that is not there."""
    for column in columns:
        if column not in rows.column_names:
            raise TaskError(
                f"task {task!r}: {place} has no column {column!r}; it has {', '.join(rows.column_names)}"
                f"{nearest(str(column), rows.column_names)}"
            )


def _filled(path: Path) -> list[int]:
    with path.open(encoding="utf-8") as stream:
        return [number for number, line in enumerate(stream, 1) if line.strip()]


def _datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise TaskError(
            f"{error.name} is not installed, which tasks on the Hub's or your own data need: "
            "pip install 'steerlens[eval]'"
        ) from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def _digest(path: Path) -> str:
    with contextlib.suppress(OSError):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return "not there"


def _line(error: BaseException) -> str:
    """The first cause's words on one line: what wraps it says only that something failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
