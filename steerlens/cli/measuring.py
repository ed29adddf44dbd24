"""The frame of `steerlens heads`: the options that its sub-commands share, and what becomes of their scores."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from steerlens.cli import guard, options, show
from steerlens.cli.guard import UsageError

if TYPE_CHECKING:
    from steerlens.examples import Example
    from steerlens.measures.base import HeadScores

app = typer.Typer()
# The world's prompts that heads are measured on; evaluation and tuning draw theirs from lower seeds.
FIRST_SEED, SEED_STEP = 200_000, 10_000


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    """Score attention heads, for --heads FILE.json:top20 anywhere."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@dataclass(frozen=True)
class Run:
    """The options of every measure."""

    model: Annotated[str, typer.Option("--model", metavar="M", help="Alias, Hub id or local path.")] = "tiny"
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="F.json", help="Write the scores, and beside them a heat map F.png."),
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Write over an existing --output.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print what --output holds instead of the table.")] = False
    top: Annotated[int, typer.Option("--top", min=1, metavar="N", help="Heads in the table.")] = 20
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of everything that is drawn.")] = 0
    device: options.Device = None
    device_map: options.DeviceMap = None
    dtype: options.Dtype = "auto"
    revision: options.Revision = None
    model_arg: options.ModelArgs = None
    trust_remote_code: options.TrustRemoteCode = False

    drawn: dict[str, Any] = dataclasses.field(default_factory=dict, init=False)
    """What the scores' settings say of the prompts."""
    given: set[str] = dataclasses.field(default_factory=set, init=False)
    """Names of the options that the command line has, the measure's own included."""

    def check(self) -> None:
        """Raise `UsageError` for an output that cannot be written, before anything is loaded."""
        if self.output is None:
            return
        if self.output.suffix != ".json":
            raise UsageError(f"--output {self.output} must end in .json, so that --heads takes it as a file")
        if not self.output.parent.is_dir():
            raise UsageError(f"--output {self.output}: there is no folder {self.output.parent}")
        if not os.access(self.output.parent, os.W_OK):
            raise UsageError(
                f"--output {self.output}: nothing can be written in {self.output.parent}; give another folder"
            )
        for path in (self.output, self.output.with_suffix(".png")):
            if path.is_dir():
                raise UsageError(f"--output: {path} is a folder; give the name of a file")
            if path.exists() and not self.force:
                raise UsageError(f"--output: {path} exists; give another name, or --force to write over it")

    def load(self) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        return options.ModelOptions.of(
            self.model,
            None,
            device=self.device,
            device_map=self.device_map,
            dtype=self.dtype,
            revision=self.revision,
            model_args=self.model_arg or [],
            trust_remote_code=self.trust_remote_code,
        ).load()

    @contextmanager
    def progress(self, total: int, what: str = "prompts") -> Iterator[Callable[[int], None]]:
        """A function that moves a progress bar forward, and ends the run if a signal has arrived."""
        with show.progress(total, what=what) as advance:

            def step(done: int) -> None:
                guard.check_stop()
                advance(done)

            yield step

    def finish(self, found: HeadScores) -> None:
        """Write and print the scores."""
        loading = ("dtype", "revision", "model_arg")
        settings = {
            **self.drawn,
            **found.settings,
            **{key: getattr(self, key) for key in loading if getattr(self, key)},
        }
        # a path of the installation says less than the alias
        found = dataclasses.replace(found, model={**found.model, "id": self.model}, settings=settings)
        if self.output is not None:
            # first what takes long: a signal meanwhile leaves no scores without a heat map
            found.heat_map(self.output.with_suffix(".png"))
            found.save(self.output)
        if self.as_json:
            typer.echo(json.dumps(found.to_dict(), allow_nan=False))
        else:
            show.table(*found.table(self.top))
            for name, value in found.summary.items():
                typer.echo(f"{name.replace('_', ' ')}: {value if isinstance(value, str) else json.dumps(value)}")
        if self.output is not None:
            use = f"--heads {self.output}:top{min(self.top, len(found.scores))}"
            show.note(f"wrote {self.output} and {self.output.with_suffix('.png')}; use: {use}")


@dataclass(frozen=True)
class DataRun(Run):
    """The options of measures on prompts."""

    task: Annotated[
        str | None, typer.Option("--task", metavar="T", help="Prompts of a generated task; `list tasks` names them.")
    ] = None
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="F.jsonl", help="Your prompts: 'prompt' or 'messages', 'answer', 'groups', 'emphasize'."
        ),
    ] = None
    samples: Annotated[int, typer.Option("--samples", min=1, metavar="N", help="Most prompts to measure on.")] = 50
    length: Annotated[
        int, typer.Option("--length", min=32, max=512, help="Longest prompt of a task, in tokens of tiny.")
    ] = 256
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Prompts per forward.")] = 8

    def check(self) -> None:
        super().check()
        if self.task is not None and self.data is not None:
            raise UsageError("--task and --data exclude each other")
        if self.data is not None and "length" in self.given:
            raise UsageError("--length shapes the prompts of a task; leave it out with --data")

    def examples(self, default: str) -> list[Example]:
        """The prompts of `--data` or `--task`, else those of the task `default`."""
        if self.data is not None:
            from steerlens import examples

            self.drawn["data"] = str(self.data)
            return examples.read(self.data)[: self.samples]
        self.drawn.update(task=self.task or default, samples=self.samples, length=self.length, seed=self.seed)
        first = FIRST_SEED + self.seed * SEED_STEP
        return list(self.world().generate(self.task or default, self.samples, first_seed=first, length=self.length))

    @staticmethod
    def world() -> Any:
        """The module that generates prompts."""
        return importlib.import_module("steerlens.evals.examples")


def command(**defaults: Any) -> Callable[[Callable[..., HeadScores]], Callable[..., HeadScores]]:
    """Make a function that returns scores a sub-command of `steerlens heads`.

    Its first parameter, annotated `Run` or `DataRun`, stands for the options of that class; `defaults` are
    their defaults where this measure's differ. Its other parameters are options of its own. The function must
    check its options before it calls `run.load()`.
    """

    def decorate(function: Callable[..., HeadScores]) -> Callable[..., HeadScores]:
        first, *own = inspect.signature(function, eval_str=True).parameters.values()
        kind = first.annotation
        hints = get_type_hints(kind, include_extras=True)
        shared = [
            inspect.Parameter(
                option.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(option.name, option.default),
                annotation=hints[option.name],
            )
            for option in dataclasses.fields(kind)
            if option.init
        ]

        def call(context: typer.Context, **given: Any) -> None:
            sources = {name: context.get_parameter_source(name) for name in given}
            run = kind(**{option.name: given.pop(option.name) for option in shared})
            run.given.update(
                name for name, source in sources.items() if source is not None and source.name != "DEFAULT"
            )
            run.check()
            try:
                run.finish(function(run, **given))
            except guard.Stopped:
                show.note("stopped; no scores were written")
                raise

        guarded = guard.guarded(call)
        guarded.__doc__ = function.__doc__
        options_first = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        asked = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        guarded.__signature__ = inspect.Signature([asked, *options_first, *shared])  # type: ignore[attr-defined]
        app.command(function.__name__)(guarded)
        return function

    return decorate


def numbers(text: str, option: str, least: int, most: int) -> list[int]:
    """Whole numbers of a list such as "0,50,100"."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and least <= int(part) <= most for part in parts):
        raise UsageError(f"{option} {text!r} is not a list of whole numbers from {least} to {most}, such as 10,50,100")
    return [int(part) for part in parts]
