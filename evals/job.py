"""Jobs: which models, steerings and tasks an evaluation runs, as a YAML file or from the command line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from steerlens.evals.doc import BASELINE, Steering, slug

from steerlens import methods as registry
from steerlens import plainyaml
from steerlens.errors import SteerlensError, nearest
from steerlens.methods.base import Method
from steerlens.models import ALIASES, DTYPES, resolve
from steerlens.recipe import load_recipe
from steerlens.recipe_schema import Methods, Part, RecipeModel, explain

if TYPE_CHECKING:
    from steerlens.evals.task import Task

_MOST_PROBLEMS = 20
_NOT_COMPARED = ("output",)
_PLACEMENT = ("device_map", "gpus_per_replica")
_COMPUTED = ("fingerprint", "task_fingerprints")
_LONGEST = 200
"""Bytes of a name in a path: file systems take 255, of which a date and an ending need some."""


class JobError(SteerlensError, ValueError):
    """A job that does not fit the schema, or names what does not exist."""

    exit_code = 2


def _named(key: str) -> BeforeValidator:
    """A text stands for a mapping with only `key`."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


def _dtype(value: str) -> str:
    if value not in DTYPES:
        raise ValueError(f"{value!r} is unknown; allowed: {', '.join(DTYPES)}{nearest(value, DTYPES)}")
    return value


def _model(name: str) -> str:
    if name in ALIASES or "/" in name or Path(name).is_dir():
        return name
    raise ValueError(
        f"{name!r} is neither an alias ({', '.join(ALIASES)}), nor a folder, nor a Hub id such as owner/name"
        f"{nearest(name, ALIASES)}"
    )


def _controls(value: Any) -> Any:
    return value if not isinstance(value, bool) else {} if value else {"random_heads": 0, "neutral": False}


def _distinct(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise ValueError(f"{values!r:.80}: a value is there twice")
    return values


Name = Annotated[str, Field(min_length=1, max_length=1000)]
Count = Annotated[int, Field(ge=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class Shape(Part):
    """Sizes of a model, for what is planned without its files.

    Attributes:
        parameters: of all weights.
        layers: of the decoder.
        heads: query heads per layer.
        kv_heads: key/value heads per layer.
        head_dim: width of a head.
        width: of the hidden state.
        vocab: entries of the vocabulary.
        positions: longest sequence, in tokens.
    """

    parameters: Annotated[float, Field(gt=0)]
    layers: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    width: Count
    vocab: Count
    positions: Count | None = None


class ModelEntry(Part):
    """A model and how it is loaded.

    Attributes:
        id: alias, Hub id or folder.
        label: what results call it; its id unless given.
        gpus_per_replica: GPUs that a copy is spread over; each process on a machine takes the next ones.
        args: further loading options, such as load_in_4bit.
        shape: see `Shape`.
    """

    id: Annotated[Name, AfterValidator(_model)]
    label: Name | None = None
    revision: Name | None = None
    dtype: Annotated[str, AfterValidator(_dtype)] = "auto"
    device_map: Any = None
    gpus_per_replica: Count | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    trust_remote_code: bool = False
    shape: Shape | None = None

    @model_validator(mode="after")
    def _placed_once(self) -> Self:
        if self.device_map not in (None, "auto") and self.gpus_per_replica is not None:
            raise ValueError("gpus_per_replica spreads a copy by device_map 'auto'; leave device_map out")
        return self

    @property
    def name(self) -> str:
        """What results call it."""
        return self.label or self.id

    @property
    def target(self) -> str:
        """The Hub id or folder behind an alias."""
        return resolve(self.id)


class SteeringEntry(Part):
    """A steering, or a series of them that differ in one parameter.

    Attributes:
        label: what results call it; the recipe's name, or the methods', unless given.
        recipe: a file, a shipped name or a Hub repository; its methods are used.
        methods: in order of composition, in place of a recipe.
        sweep: one parameter, such as `pasta.alpha`, with the values it takes; a steering each.
        tasks, models: names of those it is run on; all that it can be run on unless given.
        made_for: the model that the recipe is for.
    """

    label: Name | None = None
    recipe: Name | None = None
    methods: Annotated[Methods, Field(min_length=1)] | None = None
    sweep: (
        Annotated[
            dict[str, Annotated[list[Number], Field(min_length=1), AfterValidator(_distinct)]],
            Field(min_length=1, max_length=1),
        ]
        | None
    ) = None
    tasks: Annotated[list[Name], Field(min_length=1)] | None = None
    models: Annotated[list[Name], Field(min_length=1)] | None = None
    made_for: RecipeModel | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.recipe is None) == (self.methods is None):
            raise ValueError("needs either 'recipe' or 'methods'")
        return self

    def resolved(self) -> SteeringEntry:
        """The same with the recipe's methods written out."""
        if self.recipe is None:
            assert self.methods is not None
            label = self.label or " + ".join(method.name for method in self.methods)
            return self.model_copy(update={"label": label})
        recipe = load_recipe(self.recipe)
        update = {
            "label": self.label or recipe.name,
            "recipe": None,
            "methods": recipe.methods,
            "made_for": recipe.model,
        }
        return self.model_copy(update=update)

    def steerings(self) -> list[Steering]:
        """The steering, or one per value of the sweep."""
        label, methods = str(self.label), tuple(self.methods or ())
        if self.sweep is None:
            return [Steering(label, methods)]
        ((key, values),) = self.sweep.items()
        place, parameter = _swept(methods, key)
        found = []
        for value in values:
            varied = registry.from_dict(methods[place].to_dict() | {parameter: value})
            dose = (f"{varied.name}.{parameter}", value)
            steered = (*methods[:place], varied, *methods[place + 1 :])
            found.append(Steering(f"{label} {parameter}={value:g}", steered, "sweep", label, dose))
        return found


def _swept(methods: Sequence[Method], key: str) -> tuple[int, str]:
    """Which method's parameter is meant by `pasta.alpha` or `alpha`."""
    name, dot, parameter = key.rpartition(".")
    known = [
        (place, field)
        for place, method in enumerate(methods)
        for field, value in method.to_dict().items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    found = [
        (place, field) for place, field in known if field == parameter and (not dot or methods[place].name == name)
    ]
    if len(found) != 1:
        full = [f"{methods[place].name}.{field}" for place, field in known]
        why = "is there more than once" if found else "is no number of these methods"
        raise ValueError(f"sweep: {key!r} {why}; they have {', '.join(full) or 'none'}{nearest(key, full)}")
    return found[0]


class TaskEntry(BaseModel):
    """A task of this package, a task file, or a task of lm-eval.

    Attributes:
        task: a shipped name, or a task file.
        lm_eval: a task of lm-eval, in place of `task`.
        limit: most documents; the job's unless given.
        num_fewshot: demonstrations of an lm-eval task.
        include_path: folder with task files of lm-eval.
        rows, tokens: documents of an lm-eval task and tokens of a prompt, for a dry run.

    Other keys replace parameters of the task's data, such as `length`; of an lm-eval task they are settings such as
    `tags`, which name its spans (`steerlens.evals.harness.KEYS`).
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    task: Name | None = None
    lm_eval: Name | None = None
    limit: Count | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    include_path: Name | None = None
    rows: Count | None = None
    tokens: Count | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.task is None) == (self.lm_eval is None):
            raise ValueError("needs either 'task' or 'lm_eval'")
        own = ("num_fewshot", "include_path", "rows", "tokens")
        if self.task is not None and (given := [key for key in own if getattr(self, key) is not None]):
            raise ValueError(f"{', '.join(given)}: only a task of lm-eval has them; write 'lm_eval: {self.task}'")
        if self.lm_eval is not None and self.overrides:
            from steerlens.evals import harness

            allowed = [*(key for key in type(self).model_fields if key != "task"), *harness.KEYS]
            for key in self.overrides:
                if key not in allowed:
                    raise ValueError(
                        f"unknown key {key!r:.80}; a task of lm-eval has {', '.join(dict.fromkeys(allowed))}"
                        f"{nearest(key, allowed)}"
                    )
        return self

    @property
    def overrides(self) -> dict[str, Any]:
        """Parameters of the task's data that are replaced."""
        return dict(self.model_extra or {})


class Controls(Part):
    """What a steering is compared with besides the unsteered model.

    Attributes:
        random_heads: sets of as many other heads, for steerings of chosen heads.
        neutral: the steering at the strength that changes nothing.
    """

    random_heads: Annotated[int, Field(ge=0, le=100)] = 3
    neutral: bool = True


class Published(Part):
    """A published figure to compare with, in `unit`: a percentage, or the metric's own.

    `model` is one of the job's; `other_model` is the one that the figure is of where the job does not run it.
    """

    steering: Name
    task: Name
    metric: Name | None = None
    model: Name | None = None
    other_model: Name | None = None
    baseline: Number | None = None
    steered: Number | None = None
    unit: Name = "percent"
    source: Name
    note: Name | None = None


@dataclass(frozen=True)
class LmTask:
    """A task that lm-eval runs, with what its entry says.

    Attributes:
        name: in lm-eval.
        groups: span groups that its tags mark.
        expected: documents and tokens per prompt, where the job says so.
    """

    entry: TaskEntry

    @property
    def name(self) -> str:
        return str(self.entry.lm_eval)

    @property
    def groups(self) -> frozenset[str]:
        tags = self.entry.overrides.get("tags")
        if isinstance(tags, Mapping):
            return frozenset(map(str, tags))
        pairs = str(tags).split(";") if tags and tags is not True else []
        return frozenset(pair.partition(":")[2].strip() or "emphasis" for pair in pairs or ["em"] * bool(tags))

    @property
    def settings(self) -> dict[str, Any]:
        """The entry as `steerlens.evals.harness.run` takes it."""
        own = {"lm_eval": self.name, "num_fewshot": self.entry.num_fewshot, "include_path": self.entry.include_path}
        return {key: value for key, value in own.items() if value is not None} | self.entry.overrides

    @property
    def expected(self) -> tuple[int | None, int | None]:
        return self.entry.rows, self.entry.tokens

    @property
    def fingerprint(self) -> str:
        """Of its settings; its version stands in lm-eval's results."""
        return _digest(self.settings)


class Job(Part):
    """Models × steerings × tasks × seeds, and how they are run. Fields as in the file; recipes are written out.

    Attributes:
        limit: most documents per task and seed; all unless given.
        batch_size: most documents per batch.
        batch_tokens: most tokens per batch: its rows, one per document or choice, times its longest prompt.
        chat: whether prompts are rendered by the chat template; the task's own choice unless given.
        max_new_tokens: longest answer; the task's own unless given.
        published: figures that the report compares with.
    """

    version: Annotated[Literal[1], Field(alias="schema")] = 1
    name: Name
    models: Annotated[list[Annotated[ModelEntry, _named("id")]], Field(min_length=1)]
    steerings: list[Annotated[SteeringEntry, _named("recipe")]] = Field(default_factory=list)
    tasks: Annotated[list[Annotated[TaskEntry, _named("task")]], Field(min_length=1)]
    seeds: Annotated[list[Annotated[int, Field(ge=0, le=900)]], Field(min_length=1), AfterValidator(_distinct)] = Field(
        default_factory=lambda: [0]
    )
    limit: Count | None = None
    batch_size: Count = 16
    batch_tokens: Count | None = None
    controls: Annotated[Controls, BeforeValidator(_controls)] = Field(
        default_factory=lambda: Controls(random_heads=0, neutral=False)
    )
    backend: Literal["auto", "reference", "sdpa", "triton"] = "auto"
    chat: bool | None = None
    max_new_tokens: Count | None = None
    output: Name | None = None
    published: list[Published] = Field(default_factory=list)
    _source: str = PrivateAttr("")
    _lines: plainyaml.Lines = PrivateAttr(default_factory=dict)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """The job in a YAML file, else the one shipped under that name.

        Task files, recipes and folders in it are looked up beside it first.

        Raises:
            JobError: naming the file, the line, the place, what is allowed and the nearest name.
        """
        known = shipped()
        if str(path) in known and not path.exists():
            path = known[str(path)]
        try:
            data, lines = plainyaml.read(path.read_bytes())
        except FileNotFoundError:
            raise JobError(
                f"{path} is neither a file nor a shipped job ({', '.join(known)}){nearest(str(path), known)}"
            ) from None
        except OSError as error:
            raise JobError(f"{path} cannot be read: {error.strerror or error}") from None
        except plainyaml.PlainYamlError as error:
            raise JobError(f"{path}: {error}") from None
        if isinstance(data, dict):
            data = {"name": path.stem} | data
        return cls.from_dict(data, str(path), lines, path.parent)

    @classmethod
    def from_dict(
        cls, data: Any, source: str = "job", lines: plainyaml.Lines | None = None, beside: Path | None = None
    ) -> Self:
        """A job from plain data; recipes are read, tasks are not yet."""
        if not isinstance(data, Mapping):
            raise JobError(f"{source}: a job is a mapping with schema, models, steerings and tasks")
        if "schema" not in data:
            raise JobError(f"{source}: 'schema' is missing; write 'schema: 1'")
        try:
            job = cls.model_validate(_located(dict(data), beside))
        except ValidationError as error:
            raise JobError(explain(error, cls, source, lines or {}, _PARTS)) from error
        return job._resolved(source, lines or {})

    @classmethod
    def of(
        cls,
        *,
        model: Mapping[str, Any],
        methods: Sequence[Method],
        label: str | None,
        made_for: RecipeModel | None,
        tasks: Sequence[Mapping[str, Any]],
        **settings: Any,
    ) -> Self:
        """The job that the options of `steerlens eval` describe: a model, a steering, some tasks.

        Args:
            model: a `ModelEntry` as a mapping.
            methods: of the steering; none evaluates the unsteered model alone.
            label: what results call the steering.
            made_for: the model of the recipe that they come from.
            tasks: a `TaskEntry` each, as mappings.
            settings: other fields of a job.
        """
        steering: dict[str, Any] = {"label": label, "methods": list(methods), "made_for": made_for}
        entries = [steering] if methods else []
        name = " ".join(filter(None, (label or " + ".join(m.name for m in methods) or BASELINE, str(model["id"]))))
        data = {"schema": 1, "name": name, "models": [model], "steerings": entries, "tasks": tasks, **settings}
        return cls.from_dict(data, "")

    def _resolved(self, source: str, lines: plainyaml.Lines) -> Self:
        problems, entries = [], []
        labels: dict[str, str] = {slug(BASELINE): BASELINE}
        for index, entry in enumerate(self.steerings):
            where = _where(source, lines, ("steerings", index))
            try:
                found = entry.resolved()
                for label in self._labels(found):
                    _check_length("label", label)
                    first = labels.setdefault(slug(label).lower(), label)
                    if first is not label:
                        raise ValueError(
                            f"the label {label!r} is taken by {first!r} (letters, digits and '.=+-' tell "
                            "labels apart, and controls have labels too); give another 'label'"
                        )
                entries.append(found)
            except SteerlensError as error:
                if getattr(error, "exit_code", 2) != 2:
                    raise
                problems.append(f"{where}{error}")
            except ValueError as error:
                problems.append(f"{where}{error}")
        seen: set[str] = set()
        for index, model in enumerate(self.models):
            if slug(model.name).lower() in seen:
                problems.append(
                    f"{_where(source, lines, ('models', index))}the name {model.name!r} is there twice; "
                    "give one of them a 'label'"
                )
            seen.add(slug(model.name).lower())
            try:
                _check_length("name", model.name)
            except ValueError as error:
                problems.append(f"{_where(source, lines, ('models', index))}{error}")
        problems += self._unknown_names(source, lines, entries)
        if problems:
            raise JobError("\n".join(problems[:_MOST_PROBLEMS]))
        job = self.model_copy(update={"steerings": entries})
        job._source, job._lines = source, lines
        return job

    def changed(self, **values: Any) -> Self:
        """The same job with other values of some fields."""
        return self.from_dict(self.to_dict() | values, self._source, lines=self._lines)

    def _labels(self, entry: SteeringEntry) -> list[str]:
        """What results call the steerings of an entry and their controls."""
        found = [steering.label for steering in entry.steerings()]
        if entry.sweep is None:
            found += [f"{found[0]} random {number}" for number in range(1, self.controls.random_heads + 1)]
            found += [f"{found[0]} neutral"] * self.controls.neutral
        return found

    def _unknown_names(self, source: str, lines: plainyaml.Lines, entries: Sequence[SteeringEntry]) -> list[str]:
        known = [model.name for model in self.models]
        asked = [
            (("steerings", index, "models"), name, known)
            for index, entry in enumerate(entries)
            for name in entry.models or ()
        ]
        steerings = [str(entry.label) for entry in entries]
        steerings += [s.label for entry in entries for s in entry.steerings() if s.label not in steerings]
        for index, figure in enumerate(self.published):
            asked.append((("published", index, "steering"), figure.steering, steerings))
            if figure.model is not None:
                asked.append((("published", index, "model"), figure.model, known))
        return [
            f"{_where(source, lines, place)}{name!r} is not in this job; it has {', '.join(names)}"
            f"{nearest(name, names)}"
            for place, name, names in asked
            if name not in names
        ]

    @cached_property
    def loaded(self) -> dict[str, Task | LmTask]:
        """The tasks by name, in the job's order; their documents are not read yet.

        Raises:
            JobError, TaskError: for a task that does not exist, is there twice or has a wrong parameter.
        """
        from steerlens.evals import task as own

        found: dict[str, Task | LmTask] = {}
        for index, entry in enumerate(self.tasks):
            task: Task | LmTask
            place = _where(self._source, self._lines, ("tasks", index))
            if entry.lm_eval is not None:
                task = LmTask(entry)
            else:
                try:
                    task = own.load(str(entry.task), **entry.overrides)
                except own.TaskError as error:
                    raise JobError(f"{place}{error}") from error
                task = self._with_settings(task)
            if task.name in found:
                raise JobError(
                    f"{place}the task {task.name!r} is in the job twice; to vary a parameter copy its file under "
                    "another name, or run two jobs"
                )
            found[task.name] = task
        try:
            members = self._check_lm_eval([task for task in found.values() if isinstance(task, LmTask)])
        except SteerlensError as error:
            raise JobError(f"{_where(self._source, {}, ())}{error}") from error
        files: dict[str, str] = {}
        written = {name: index for index, name in enumerate(found)}
        for name in dict.fromkeys([*found, *members]):
            if (other := files.setdefault(slug(name).lower(), name)) != name:
                path: tuple[str | int, ...] = ("tasks", written[name]) if name in written else ()
                raise JobError(
                    f"{_where(self._source, self._lines, path)}the tasks {other!r} and {name!r} would share the file "
                    f"samples_{slug(name)} (letters, digits and '.=+-' tell names apart); rename one of them"
                )
        names = {entry.task: task.name for entry, task in zip(self.tasks, found.values(), strict=True)}
        for steering in self.steerings:
            for name in steering.tasks or ():
                if name not in found and name not in names:
                    raise JobError(
                        f"steering {steering.label!r}: the task {name!r} is not in this job; it has "
                        f"{', '.join(found)}{nearest(name, found)}"
                    )
        for figure in self.published:
            if figure.task not in found and figure.task not in names:
                raise JobError(
                    f"published: the task {figure.task!r} is not in this job; it has {', '.join(found)}"
                    f"{nearest(figure.task, found)}"
                )
        return found

    def _with_settings(self, task: Task) -> Task:
        given = {"chat": self.chat, "max_new_tokens": self.max_new_tokens}
        changed: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        return replace(task, **changed) if changed else task

    @staticmethod
    def _check_lm_eval(tasks: Sequence[LmTask]) -> list[str]:
        """The tasks that the names stand for."""
        if not tasks:
            return []
        from steerlens.evals import harness

        found: list[str] = []
        for folder in dict.fromkeys(task.entry.include_path for task in tasks):
            found += harness.check([task.name for task in tasks if task.entry.include_path == folder], folder)
        return found

    def limit_of(self, name: str) -> int | None:
        """Most documents of a task per seed."""
        entry = dict(zip(self.loaded, self.tasks, strict=True))[name]
        return entry.limit if entry.limit is not None else self.limit

    def model(self, name: str) -> ModelEntry:
        """The model of that name."""
        return next(model for model in self.models if model.name == name)

    def names_task(self, entry: SteeringEntry, name: str) -> bool:
        """Whether a steering is meant for a task: every one, unless it names some."""
        if entry.tasks is None:
            return True
        written = dict(zip(self.loaded, (task.task for task in self.tasks), strict=True))[name]
        return name in entry.tasks or written in entry.tasks

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """The job that a folder of results belongs to."""
        path = folder / "job.json"
        try:
            data = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise JobError(f"{folder} holds no job: {path.name} cannot be read ({error}); run one first") from None
        return cls.from_dict({k: v for k, v in dict(data).items() if k not in _COMPUTED}, str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads it back."""
        return json.loads(self.model_dump_json(by_alias=True, exclude_none=True))

    def described(self) -> dict[str, Any]:
        """As `to_dict`, with names in place of this machine's paths: what a report may show."""
        found: dict[str, Any] = {key: value for key, value in self.to_dict().items() if key != "output"}
        for task, name in zip(found["tasks"], self.loaded, strict=True):
            task.pop("include_path", None)
            if "task" in task:
                task["task"] = name
        made_for = [entry["made_for"] for entry in found["steerings"] if "made_for" in entry]
        for model in (*found["models"], *made_for):
            if Path(model["id"]).is_absolute():
                model["id"] = Path(model["id"]).name
        return found

    def compared(self) -> dict[str, Any]:
        """All that shapes the results, by key: what two runs in one folder must share; where they run may change."""
        shaping = {key: value for key, value in self.to_dict().items() if key not in _NOT_COMPARED}
        shaping["models"] = [
            {key: value for key, value in model.items() if key not in _PLACEMENT} for model in shaping["models"]
        ]
        return shaping | {"task_fingerprints": {name: task.fingerprint for name, task in self.loaded.items()}}

    @property
    def fingerprint(self) -> str:
        """Of `compared`."""
        return _digest(self.compared())


def shipped() -> dict[str, Path]:
    """The jobs that come with the package, by name."""
    files = (Path(str(file)) for file in resources.files("steerlens.evals.jobs").iterdir())
    return {path.stem: path for path in sorted(files) if path.suffix == ".yaml"}


def _check_length(what: str, name: str) -> None:
    """Raise `ValueError` for a name that no folder can have."""
    if len(slug(name).encode()) > _LONGEST:
        raise ValueError(f"the {what} {name!r:.80} is longer than {_LONGEST} bytes; give a shorter 'label'")


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _located(data: dict[str, Any], beside: Path | None) -> dict[str, Any]:
    """The job with its files and folders, beside it or in the working directory, as paths that hold anywhere."""

    def found(value: Any) -> Any:
        if not isinstance(value, str) or not (os.sep in value or value.endswith((".yaml", ".yml"))):
            return value
        paths = [folder / value for folder in (beside, Path.cwd()) if folder is not None]
        return next((str(path.resolve()) for path in paths if path.exists()), value)

    for key, fields in {"tasks": ("task", "include_path"), "steerings": ("recipe",), "models": ("id",)}.items():
        if isinstance(data.get(key), list):
            data[key] = [
                {name: found(value) if name in fields else value for name, value in item.items()}
                if isinstance(item, dict)
                else found(item)
                for item in data[key]
            ]
    return data


_PARTS: dict[str, type[BaseModel]] = {
    "models": ModelEntry,
    "steerings": SteeringEntry,
    "tasks": TaskEntry,
    "controls": Controls,
    "published": Published,
    "shape": Shape,
    "made_for": RecipeModel,
}


def _where(source: str, lines: plainyaml.Lines, path: tuple[str | int, ...]) -> str:
    """What a message begins with; nothing for a job that comes from options."""
    line = next((lines[path[:i]] for i in range(len(path), 0, -1) if path[:i] in lines), None)
    return f"{source}:{line}: " if line else f"{source}: " if source else ""
