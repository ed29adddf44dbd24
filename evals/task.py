"""Tasks: what is asked, what is right, where it lies, and by which metrics it is judged; each a YAML file.

task = load("needle", length=[64, 128])
docs = task.docs(100, seed=0)
task.score(docs[0], Output(("red",)))
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from steerlens.evals import metrics as registry
from steerlens.evals import sources
from steerlens.evals.doc import Doc, Output
from steerlens.evals.sources import Rows, Table, TaskError, TaskFetchError, World
from steerlens.evals.templates import compiled, listed, render

from steerlens import plainyaml
from steerlens.errors import SteerlensError, nearest
from steerlens.examples import Example
from steerlens.recipe_schema import Part, explain
from steerlens.selectors import Occurrence, Selector, Substring

__all__ = ["Task", "TaskError", "TaskFetchError", "load", "names"]

POOL = 1000
"""Rows that demonstrations are drawn from."""
_OCCURRENCES = ("all", "first", "last", "only")


def _template(text: str) -> str:
    compiled(text)
    return text


def _templates(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        for text in [value] if isinstance(value, str) else value:
            compiled(text)
        return value
    raise ValueError(f"{value!r:.80} is neither a template nor a list of templates")


def _span(value: Any) -> tuple[str, Occurrence | None]:
    if isinstance(value, str):
        return _template(value), None
    if not isinstance(value, Mapping) or set(value) != {"text", "occurrence"} or not isinstance(value["text"], str):
        raise ValueError(f"{value!r:.80} is neither a template nor {{text: a template, occurrence: which}}")
    which = value["occurrence"]
    if which not in _OCCURRENCES and (not isinstance(which, int) or isinstance(which, bool)):
        raise ValueError(f"occurrence {which!r:.80}; allowed: {', '.join(_OCCURRENCES)} or an integer")
    return _template(value["text"]), which


def _spans(value: Any) -> Any:
    return [_span(one) for one in value] if isinstance(value, list) else _span(value)


def _metric(value: Any) -> tuple[str, dict[str, Any]]:
    given = {"metric": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise ValueError(f"{value!r:.80} is neither a metric's name nor {{metric: name, argument: value}}")
    arguments = dict(given)
    if not isinstance(name := arguments.pop("metric", None), str):
        raise ValueError(f"{value!r:.80} names no metric; write {{metric: name, argument: value}}")
    registry.get(name).check(arguments)
    return name, arguments


Name = Annotated[str, Field(min_length=1, max_length=200)]
Template = Annotated[str, AfterValidator(_template)]
Templates = Annotated[Any, BeforeValidator(_templates)]


class Message(Part):
    """A message of a chat."""

    role: Name
    content: Template


class Shots(Part):
    """Demonstrations, put together as `shots`, and one by one in the list `demos`.

    Attributes:
        count: how many.
        prompt: a template of one, of its row's columns.
        separator: between two.
        balanced: as many of each answer, or one more.
    """

    count: Annotated[int, Field(ge=1, le=1000)]
    prompt: Template
    separator: str = "\n\n"
    balanced: bool = False


class Spec(Part):
    """A task file; see `evals/tasks/README.md`. Templates are checked, but not rendered."""

    schema_: Annotated[Literal[1], Field(alias="schema")]
    task: Name
    version: Annotated[int, Field(ge=0)] = 1
    summary: str = ""
    source: str = ""
    data: dict[str, Any]
    columns: list[Name] = Field(default_factory=list)
    map: dict[Name, dict[Any, Any]] = Field(default_factory=dict)
    where: dict[Name, Any] = Field(default_factory=dict)
    prompt: Template | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    turns: Templates | None = None
    shots: Shots | None = None
    answer: Template | None = None
    alternatives: Templates | None = None
    choices: Templates | None = None
    spans: dict[Name, Annotated[Any, BeforeValidator(_spans)]] = Field(default_factory=dict)
    cell: dict[Name, Template] = Field(default_factory=dict)
    chat: bool | Literal["auto"] = "auto"
    output: Literal["generate", "choices"] = "generate"
    max_new_tokens: Annotated[int, Field(ge=1, le=100_000)] = 64
    stop: list[Name] = Field(default_factory=list)
    metrics: Annotated[list[Annotated[Any, BeforeValidator(_metric)]], Field(min_length=1)]


_OF_ROWS = ("columns", "map", "where", "prompt", "messages", "turns", "shots", "answer", "alternatives", "choices")
_RENDERED = (*_OF_ROWS, "spans", "cell")


@dataclass(frozen=True)
class Task:
    """A task, without its documents.

    Attributes:
        name: also its file's.
        version: counted up when its documents or metrics change.
        summary: in a sentence.
        source: paper or data set.
        output: what is asked of the model: text, or log-likelihoods of choices.
        max_new_tokens: of a text.
        stop: texts that end one.
        chat: whether plain prompts go through the chat template too; messages always do.
        metrics: their names, the primary one first.
        config: the file as plain JSON types, with overrides.
        spec: the file, checked.
        data: where documents come from.
    """

    name: str
    version: int
    summary: str
    source: str
    output: Literal["generate", "choices"]
    max_new_tokens: int
    stop: tuple[str, ...]
    chat: bool
    metrics: tuple[str, ...]
    config: dict[str, Any] = field(repr=False)
    spec: Spec = field(repr=False)
    data: World | Table = field(repr=False)

    @property
    def higher_is_better(self) -> dict[str, bool]:
        """Direction of each metric."""
        return {name: registry.get(name).higher_is_better for name in self.metrics}

    @property
    def offline(self) -> bool:
        """Whether it needs neither Hub nor network."""
        return isinstance(self.data, World) or isinstance(self.data.spec, sources.File)

    @property
    def groups(self) -> frozenset[str]:
        """Span groups that its documents carry."""
        return self.data.generator.groups if isinstance(self.data, World) else frozenset(self.spec.spans)

    @property
    def shots(self) -> int:
        """Demonstrations in a prompt."""
        return self.spec.shots.count if self.spec.shots else 0

    @property
    def expected(self) -> tuple[int | None, int | None]:
        """Documents that it has, and tokens of a typical prompt, as declared; None where nothing is."""
        declared = self.data.generator if isinstance(self.data, World) else self.data.spec
        return declared.rows, declared.tokens

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of all that shapes documents and scores: the file with its templates, overrides, generator, a file's rows."""
        shaping = {key: value for key, value in self.config.items() if key not in ("summary", "source", "data")}
        shaping["data"] = self.data.described
        return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()

    def prefetch(self) -> None:
        """Load the data and what metrics need.

        Raises:
            TaskError, MetricError: for what is not there, not installed or not reached.
        """
        for name, arguments in self.spec.metrics:
            registry.get(name).prepare(arguments)
        if isinstance(self.data, Table):
            self._table()
            if self.spec.shots:
                self._table(shots=True)

    def docs(self, limit: int | None, seed: int) -> list[Doc]:
        """Documents with distinct prompts; a function of the arguments, and of the data.

        A larger limit adds documents to those of a smaller one. A task with a grid fills its places in turn.

        Args:
            limit: at most so many; None for all that there are.
            seed: of the draw, 0 to 999.

        Raises:
            TaskError: for data that do not fit the task, naming the place.
        """
        if limit is not None and not 1 <= limit <= 500_000:
            raise TaskError(f"task {self.name!r}: limit {limit}; allowed: 1 to 500000, or None for all documents")
        if not 0 <= seed < 1000:
            raise TaskError(f"task {self.name!r}: seed {seed}; allowed: 0 to 999")
        if isinstance(self.data, World):
            return [
                Doc(self.name, seed, i, item.example, item.choices, item.target, item.turns, item.data, cell)
                for i, (cell, item) in enumerate(self.data.items(limit, seed))
            ]
        found: dict[str, Doc] = {}
        table = self._table()
        shown = _Demonstrations(self, self.data, seed)
        for index in sources.order(len(table), f"{self.name}|{seed}"):
            if len(found) == limit:
                break
            row = self.row(table, index)
            if row is None:
                continue
            try:
                doc = self._doc(row, shown.of(index), seed, len(found), self.data.at(index))
            except ValueError as error:
                if isinstance(error, TaskError):
                    raise
                raise TaskError(f"task {self.name!r}: {self.data.at(index)}: {error}") from None
            found.setdefault(doc.prompt_hash, doc)
        if not found:
            raise TaskError(f"task {self.name!r}: no row of {self.data.place} fits where: {self.spec.where}")
        return list(found.values())

    def score(self, doc: Doc, output: Output) -> dict[str, float]:
        """What an output is worth, by each metric."""
        return {name: registry.get(name)(doc, output, **arguments) for name, arguments in self.spec.metrics}

    def aggregate(self, metric: str, values: Sequence[float]) -> float:
        """One number of all documents' values: their mean, unless the metric says otherwise."""
        if metric not in self.metrics:
            raise TaskError(
                f"task {self.name!r} has no metric {metric!r}; it has {', '.join(self.metrics)}"
                f"{nearest(metric, self.metrics)}"
            )
        return registry.get(metric).aggregate(values)

    def row(self, table: Rows, index: int, *, shots: bool = False) -> dict[str, Any] | None:
        """A row with its values replaced as `map` says; None if `where` leaves it out.

        Raises:
            TaskError: for a column without a value, or one that `map` does not know.
        """
        assert isinstance(self.data, Table)
        row = sources.plain(table[index])
        for column, wanted in self.spec.where.items():
            if row[column] not in (wanted if isinstance(wanted, list) else [wanted]):
                return None
        place = f"task {self.name!r}: {self.data.at(index, shots=shots)}"
        for column, values in self.spec.map.items():
            if not isinstance(row[column], str | int | float | None) or row[column] not in values:
                raise TaskError(
                    f"{place}: map has no entry for {column!r} {row[column]!r:.80}; it has "
                    f"{', '.join(map(repr, values))}"
                )
            row[column] = values[row[column]]
        for column in self.spec.columns:
            if row[column] is None:
                raise TaskError(
                    f"{place}: column {column!r} holds nothing; give the row a value, or take {column!r} out of "
                    "columns if the templates do without it"
                )
        return row

    def _table(self, *, shots: bool = False) -> Rows:
        assert isinstance(self.data, Table)
        table = self.data.rows(shots=shots)
        columns = dict.fromkeys([*self.spec.columns, *self.spec.map, *self.spec.where])
        sources.require(list(columns), table, self.data.named(shots=shots), self.name)
        return table

    def _doc(self, row: dict[str, Any], shown: list[str], seed: int, number: int, place: str) -> Doc:
        spec, values = self.spec, dict(row)
        if spec.shots:
            values |= {"demos": shown, "shots": spec.shots.separator.join(shown)}
        prompt: str | tuple[dict[str, str], ...]
        if spec.messages is not None:
            prompt = tuple({"role": m.role, "content": render(m.content, values)} for m in spec.messages)
            contents = [message["content"] for message in prompt]
        else:
            prompt = render(str(spec.prompt), values)
            contents = [str(prompt)]
        if not any(content.strip() for content in contents):
            raise ValueError("the prompt is empty")
        answer = None if spec.answer is None else render(spec.answer, values)
        choices = _texts(spec.choices, values)
        target = None
        if spec.output == "choices":
            if len(choices) < 2 or answer not in choices:
                raise ValueError(
                    f"the answer {answer!r:.80} must be one of at least two choices, not of {choices!r:.200}"
                )
            if choices.count(answer) > 1:
                raise ValueError(f"the answer {answer!r:.80} is there twice among the choices {choices!r:.200}")
            target = choices.index(answer)
        groups = {name: _selected(name, one, values, contents) for name, one in spec.spans.items()}
        alternatives = tuple(text for text in _texts(spec.alternatives, values) if text and text != answer)
        example = Example(prompt, answer, alternatives, groups, source=place)
        cell = {name: plainyaml.plain(render(text, values).strip()) for name, text in spec.cell.items()}
        turns = tuple(_texts(spec.turns, values))
        return Doc(self.name, seed, number, example, tuple(choices), target, turns, row, cell)


class _Demonstrations:
    """Demonstrations of a task's documents, by the seed of the draw."""

    def __init__(self, task: Task, table: Table, seed: int) -> None:
        self.shots = task.spec.shots
        self.key = f"{task.name}|{seed}|shots"
        self.place, self.apart = table.place, table.apart
        self.pool: dict[int, tuple[str, str]] = {}
        if self.shots is None:
            return
        rows = task._table(shots=True)
        for index in sources.order(len(rows), self.key):
            if len(self.pool) == POOL:
                break
            if (row := task.row(rows, index, shots=True)) is not None:
                answer = render(task.spec.answer or "", row)
                self.pool[index] = (answer, render(self.shots.prompt, row))

    def of(self, index: int) -> list[str]:
        """The demonstrations for a row, which is none of them."""
        if self.shots is None:
            return []
        rng = random.Random(f"{self.key}|{index}")
        there = [i for i in self.pool if self.apart or i != index]
        rng.shuffle(there)
        if self.shots.balanced:
            there = self._balanced(there)
        if len(there) < self.shots.count:
            raise ValueError(f"{self.shots.count} shots are asked for, there are {len(there)} rows for them")
        chosen = there[: self.shots.count]
        rng.shuffle(chosen)
        return [self.pool[i][1] for i in chosen]

    def _balanced(self, there: list[int]) -> list[int]:
        of_answer: dict[str, int] = {}
        turn = {}
        for i in there:
            turn[i] = of_answer[self.pool[i][0]] = of_answer.get(self.pool[i][0], -1) + 1
        return sorted(there, key=turn.__getitem__)


def names() -> list[str]:
    """Tasks that come with the package, in alphabetical order."""
    return sorted(_shipped())


def load(name: str | os.PathLike[str], **overrides: Any) -> Task:
    """A task from a file, else one shipped under that name. No data is read.

    Args:
        name: a path or a name.
        overrides: parameters of its data in place of the file's, such as `length=256` or `split="train"`; a path
            among them is relative to the working directory.

    Raises:
        TaskError: if there is none, or it does not fit the schema; names the file, the line, the place and, for an
            unknown name, the nearest.
    """
    given = os.fspath(name)
    for key in ("file", "shots_file"):
        if isinstance(overrides.get(key), str | os.PathLike):
            overrides[key] = str(Path(overrides[key]).expanduser().absolute())
    try:
        path = Path(given)
        if path.is_file():
            with path.open("rb") as stream:
                return _read(stream.read(plainyaml.MAX_BYTES + 1), given, path.parent, overrides)
    except (OSError, ValueError) as error:
        if isinstance(error, SteerlensError):
            raise
        raise TaskError(f"{given!r:.200} cannot be read: {error}") from error
    shipped = _shipped()
    if given not in shipped:
        raise TaskError(
            f"task {given!r:.200} is neither a file nor a shipped task; known: {', '.join(sorted(shipped))}"
            f"{nearest(given[:80], shipped)}"
        )
    return _read(shipped[given].read_bytes(), f"{given}.yaml", Path(str(shipped[given])).parent, overrides)


def _shipped() -> dict[str, Any]:
    files = (f for f in resources.files("steerlens.evals.tasks").iterdir() if f.name.endswith(".yaml"))
    return {f.name.removesuffix(".yaml"): f for f in files}


def _read(content: bytes, source: str, folder: Path, overrides: Mapping[str, Any]) -> Task:
    try:
        data, lines = plainyaml.read(content)
    except plainyaml.PlainYamlError as error:
        raise TaskError(f"{source}: {error}") from error
    if not isinstance(data, Mapping):
        raise TaskError(f"{source}: a task is a mapping with schema, task, data and metrics, not {data!r:.80}")
    if "schema" not in data:
        raise TaskError(f"{source}: 'schema' is missing; write 'schema: 1'")
    try:
        spec = Spec.model_validate(dict(data))
    except ValidationError as error:
        parts: dict[str, type[Part]] = {"shots": Shots, "messages": Message}
        raise TaskError(explain(error, Spec, source, lines, parts)) from error
    inside = {path[1:]: line for path, line in lines.items() if path[:1] == ("data",)}
    origin = sources.parse(spec.data, source, inside, folder, overrides)
    problem = _misfit(spec, origin)
    if problem is not None:
        key, told = problem
        line = lines.get((key,))
        raise TaskError(f"{source}{f':{line}' if line else ''}: {key}: {told}")
    config = json.loads(json.dumps({**data, "data": {**spec.data, **overrides}}, default=str))
    chat = spec.messages is not None if spec.chat == "auto" else spec.chat
    if isinstance(origin, World):
        chat = origin.generator.chat if spec.chat == "auto" else spec.chat
    return Task(
        name=spec.task,
        version=spec.version,
        summary=spec.summary,
        source=spec.source,
        output=spec.output,
        max_new_tokens=spec.max_new_tokens,
        stop=tuple(spec.stop),
        chat=chat,
        metrics=tuple(name for name, _ in spec.metrics),
        config=config,
        spec=spec,
        data=origin,
    )


def _misfit(spec: Spec, origin: World | Table) -> tuple[str, str] | None:
    """The first key whose value does not go with the others, and why."""
    counted = [name for name, _ in spec.metrics]
    if len(set(counted)) < len(counted):
        return "metrics", f"{', '.join(counted)}: a metric is there twice"
    for name in counted:
        if (wanted := registry.get(name).output) != spec.output:
            return "metrics", f"{name!r} is for output: {wanted}, this task's is {spec.output}"
    if isinstance(origin, World):
        for key in _RENDERED:
            if getattr(spec, key):
                return key, "the world's generator makes whole documents; leave it out"
        if (spec.output == "choices") != origin.generator.choices:
            made = "choices" if origin.generator.choices else "generate"
            return "output", f"the world's {origin.generator.name!r} is for output: {made}"
        if origin.generator.chat and spec.chat is False:
            return "chat", f"the world's {origin.generator.name!r} makes chats; write chat: auto"
        return None
    if (spec.prompt is None) == (spec.messages is None):
        return "prompt", f"needs exactly one of prompt and messages, not {'none' if spec.prompt is None else 'both'}"
    if spec.messages is not None and spec.chat is False:
        return "chat", "messages need the chat template; write chat: auto, or a prompt in place of messages"
    if (spec.output == "choices") != (spec.choices is not None):
        return "choices", f"go with output: choices, this task's is {spec.output}"
    if spec.output == "choices" and (spec.answer is None or spec.turns is not None):
        return "output", "choices need an answer, which is one of them, and no turns"
    if spec.shots and spec.shots.balanced and spec.answer is None:
        return "shots", "balanced ones need an answer, by which they are balanced"
    for name in counted:
        for need in registry.get(name).needs:
            if getattr(spec, need) is None:
                return "metrics", f"{name!r} needs {need!r}, which this task does not have"
    return None


def _texts(template: Any, values: Mapping[str, Any]) -> list[str]:
    if template is None:
        return []
    if isinstance(template, list):
        return [render(one, values) for one in template]
    return listed(render(template, values))


def _selected(
    group: str,
    spans: tuple[str, Occurrence | None] | list[tuple[str, Occurrence | None]],
    values: Mapping[str, Any],
    contents: Sequence[str],
) -> tuple[Selector, ...]:
    found: list[Selector] = []
    for text, occurrence in _sought(spans, values):
        if not text.strip():
            continue
        bare = text.strip()  # chat templates trim contents
        if not any(bare in content for content in contents):
            raise ValueError(f"span {group!r}: the text {bare!r:.80} is not in the prompt {contents[-1]!r:.120}")
        found.append(bare if occurrence is None else Substring(bare, occurrence))
    return tuple(found)


def _sought(spans: Any, values: Mapping[str, Any]) -> Iterator[tuple[str, Occurrence | None]]:
    if isinstance(spans, list):
        yield from ((render(template, values), occurrence) for template, occurrence in spans)
    else:
        template, occurrence = spans
        yield from ((text, occurrence) for text in listed(render(template, values)))
