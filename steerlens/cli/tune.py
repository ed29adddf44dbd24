"""`steerlens tune`: choose heads and strengths, and prove the choice."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from steerlens.cli import guard, options, show
from steerlens.cli.guard import UsageError

if TYPE_CHECKING:
    from steerlens.examples import Example
    from steerlens.recipe import Recipe
    from steerlens.tuning.search import Outcome, Settings

# Held-out prompts of the world that nothing else draws.
FIRST_SEED, SEED_STEP = 1_000_000_000, 1_000_000


def tune(
    method: Annotated[str, typer.Option("--method", metavar="M", help="Method to tune; `list methods` names them.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            metavar="R.yaml",
            help="The recipe; beside it R.report.json, with --per head R.heads.json and .png for --heads, and "
            "R.tune.jsonl to resume from.",
        ),
    ],
    model: Annotated[str, typer.Option("--model", metavar="M", help="Alias, Hub id or local path.")] = "tiny",
    task: Annotated[
        str | None, typer.Option("--task", metavar="T", help="Prompts of a generated task; `list tasks` names them.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="F.jsonl",
            help="Your prompts: 'prompt' or 'messages', 'answer'; 'emphasize' or 'groups' "
            "{name: texts}; 'key' where several belong together and may not be split.",
        ),
    ] = None,
    profile_task: Annotated[
        list[str] | None,
        typer.Option(
            "--profile-task",
            metavar="T",
            help="Profile heads on this task instead; repeatable: a top k is then what the tasks' top k share.",
        ),
    ] = None,
    budget: Annotated[
        int, typer.Option("--budget", min=1, metavar="N", help="Forwards: one prompt for one candidate each.")
    ] = 10_000,
    objective: Annotated[
        Literal["logprob", "accuracy", "entropy"],
        typer.Option("--objective", help="Of the answer: log-probability or accuracy; entropy needs no answers."),
    ] = "logprob",
    per: Annotated[
        Literal["head", "index", "layer"],
        typer.Option("--per", help="Profile each head, head index over all layers, or layer."),
    ] = "head",
    heads: Annotated[
        str | None,
        typer.Option("--heads", metavar="SPEC", help='Choose among these heads: "1:*;3:0-4" or "scores.json:top50".'),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Parameter that is not searched; repeatable."),
    ] = None,
    sampler: Annotated[
        Literal["grid", "optuna"],
        typer.Option("--sampler", help="Strengths from a grid, or drawn by Optuna where installed."),
    ] = "grid",
    profile: Annotated[int, typer.Option("--profile", min=1, metavar="N", help="Prompts to profile heads on.")] = 60,
    validation: Annotated[int, typer.Option("--validation", min=2, metavar="N", help="Prompts to choose on.")] = 100,
    test: Annotated[int, typer.Option("--test", min=2, metavar="N", help="Prompts to compare on, once.")] = 200,
    controls: Annotated[
        int, typer.Option("--controls", min=0, metavar="N", help="Random sets of other heads in the test.")
    ] = 5,
    length: Annotated[
        int, typer.Option("--length", min=32, max=512, help="Longest prompt of a task, in tokens of tiny.")
    ] = 128,
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--begins",
            help="The answer must be all that the model says, or how it begins. "
            "Default: all for a task, begins for --data.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=900, help="Of splits, controls and intervals.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a search that was stopped.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report instead of the table.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Rows per forward.")] = 32,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    model_arg: options.ModelArgs = None,
    trust_remote_code: options.TrustRemoteCode = False,
    backend: options.BackendOption = options.Backend.auto,
) -> None:
    """Choose heads and strengths of a method, and compare the choice once on prompts that the search never saw.

    For example: steerlens tune --method pasta --model tiny --task conflict --output pasta.yaml

    Every unit is steered alone on the profile prompts, many candidates in one batch; sets of the best ones and the
    method's strengths are tried on the validation prompts; the choice, the method's defaults and random sets of other
    heads are compared with the unsteered model on the test prompts, in pairs.
    """
    from steerlens import examples as examples_
    from steerlens import methods as registry
    from steerlens.heads import Heads
    from steerlens.methods.base import EditMethod

    cls = registry.get(method)
    if not issubclass(cls, EditMethod):
        raise UsageError(f"--method {method}: tune searches heads and strengths of methods that edit attention")
    if (task is None) == (data is None):
        raise UsageError("give either --task T or --data F.jsonl: what to tune for")
    if data is not None and profile_task:
        raise UsageError("--profile-task goes with --task")
    paths = _paths(output)
    _check(output, [*paths.values(), *_heads(paths, cls.profile)], paths["journal"], resume)
    fixed = dict(options.assignment(text, "--set") for text in settings or [])
    # what is wrong with them is said before a model is loaded
    cls.from_parameters(({"heads": "all"} if "heads" in cls.__dataclass_fields__ else {}) | fixed)
    within = Heads.parse(heads if heads is not None else "all")
    if sampler == "optuna" and find_spec("optuna") is None:
        raise UsageError("--sampler optuna needs Optuna: pip install 'steerlens[tune]', or --sampler grid")
    sizes = {"profile": profile, "validation": validation, "test": test}
    splits = _splits(task, data, profile_task or [], sizes, seed, length)
    exact = data is None if exact is None else exact

    # torch loads only now that the call makes sense
    from steerlens.tuning.journal import Journal
    from steerlens.tuning.search import Settings

    sought = Settings(cls, fixed, objective, per, within, budget, controls, seed, sampler)
    chosen = options.ModelOptions.of(
        model,
        None,
        device=device,
        device_map=device_map,
        dtype=dtype,
        revision=revision,
        model_args=model_arg or [],
        trust_remote_code=trust_remote_code,
    )
    used = (*splits["profile"].values(), splits["validation"], splits["test"])
    run = {
        "model": model,
        "dtype": dtype,
        "revision": revision,
        "model_args": chosen.model_args,
        "task": task or str(data),
        "profile_tasks": list(splits["profile"]),
        "length": length if data is None else None,
        "examples": examples_.digest([example for found in used for example in found]),
        "sizes": sizes,
        "exact": exact,
        "backend": backend.value,
        "batch_size": batch_size,
    }
    journal = Journal(paths["journal"], {**run, **sought.to_dict()}, resume)
    try:
        outcome, facts = _search(chosen, sought, splits, journal, run)
    except guard.Stopped:
        show.note(f"stopped; {paths['journal']} keeps every score: run again with --resume to go on")
        raise
    finally:
        journal.close()
    _finish(outcome, sought, run, facts, output, paths, as_json)


def _search(
    chosen: options.ModelOptions, sought: Settings, splits: dict[str, Any], journal: Any, run: dict[str, Any]
) -> tuple[Outcome, Any]:
    from steerlens.tuning.scoring import Scorer
    from steerlens.tuning.search import Search, check

    model, tokenizer = chosen.load()
    scorer = Scorer(model, tokenizer, end=run["exact"], batch_size=run["batch_size"], backend=run["backend"])
    check(scorer, sought, splits["all"])
    search = Search(scorer, scorer.facts, sought, splits["profile"], splits["validation"], splits["test"], journal)
    if len(journal):
        show.note(f"going on: {len(journal)} scores are there")
    with show.progress(search.planned, what="forwards") as advance:

        def step(forwards: int) -> None:
            guard.check_stop()
            advance(forwards)

        search.advance = step
        return search.run(), scorer.facts


def _splits(
    task: str | None, data: Path | None, profile_tasks: list[str], sizes: dict[str, int], seed: int, length: int
) -> dict[str, Any]:
    from steerlens.examples import read, splits

    if data is not None:
        rows = read(data)
        found = splits(rows, sizes, seed)
        return {**found, "profile": {data.name: found["profile"]}, "all": rows}

    world = importlib.import_module("steerlens.evals.examples")
    first = FIRST_SEED + seed * SEED_STEP

    def draw(name: str, wanted: dict[str, int], at: int) -> dict[str, list[Example]]:
        rows = world.generate(name, sum(wanted.values()), first_seed=at, length=length)
        return splits(rows, wanted, seed)

    if not profile_tasks:
        found = draw(str(task), sizes, first)
        return {**found, "profile": {str(task): found["profile"]}, "all": []}
    # other seeds than the target's, as tasks may be the same
    rest = draw(str(task), {k: v for k, v in sizes.items() if k != "profile"}, first)
    others = {name: draw(name, {"profile": sizes["profile"]}, first + SEED_STEP // 2) for name in profile_tasks}
    held = {example.key for found in rest.values() for example in found}
    return {
        **rest,
        "all": [],
        "profile": {name: [e for e in found["profile"] if e.key not in held] for name, found in others.items()},
    }


def _paths(output: Path) -> dict[str, Path]:
    return {
        "journal": output.with_suffix(".tune.jsonl"),
        "report": output.with_suffix(".report.json"),
        "heads": output.with_suffix(".heads.json"),
    }


def _heads(paths: dict[str, Path], settings: Iterable[str]) -> list[Path]:
    """Files of head scores and their heat maps, for the settings that heads are profiled in."""
    found = [_heads_file(paths, setting) for setting in ("default", *settings)]
    return [path.with_suffix(suffix) for path in dict.fromkeys(found) for suffix in (".json", ".png")]


def _heads_file(paths: dict[str, Path], setting: str) -> Path:
    plain = paths["heads"]
    return plain if setting in ("default", "fixed") else plain.with_name(f"{plain.stem}-{setting}.json")


def _check(output: Path, paths: Sequence[Path], journal: Path, resume: bool) -> None:
    if output.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--output {output} must end in .yaml: it is a recipe")
    if not output.parent.is_dir():
        raise UsageError(f"--output {output}: there is no folder {output.parent}")
    if not os.access(output.parent, os.W_OK):
        raise UsageError(f"--output {output}: nothing can be written in {output.parent}; give another folder")
    for path in (output, *paths):
        if path.exists() and not resume:
            raise UsageError(f"--output: {path} exists: go on with that search by --resume, or name another file")
        if path.exists() and not journal.exists():
            raise UsageError(f"--resume: {path} exists, but there is no {journal} to go on from; name another --output")


def _finish(
    outcome: Outcome,
    sought: Settings,
    run: dict[str, Any],
    facts: Any,
    output: Path,
    paths: dict[str, Path],
    as_json: bool,
) -> None:
    from steerlens import files
    from steerlens.cli.jsonl import to_json
    from steerlens.tuning import outcome as outcomes

    report = outcomes.report(outcome, sought, run)
    described = {"id": run["model"], "layers": facts.layers, "heads": max(facts.heads)}
    written = [paths["report"]]
    for setting, scores in outcomes.head_scores(outcome, sought, described).items():
        path = _heads_file(paths, setting)
        scores.save(path)
        scores.heat_map(path.with_suffix(".png"))
        written += [path, path.with_suffix(".png")]
    files.write(paths["report"], to_json(report) + "\n")
    if outcome.gained:
        recipe: Recipe = outcomes.recipe(outcome, output.stem, run["model"], run["revision"], facts, run["task"])
        written.insert(0, recipe.save(output))
    if as_json:
        typer.echo(to_json(report))
    else:
        show.table(*outcomes.table(outcome, sought))
        typer.echo("\n".join(outcomes.sentences(outcome, sought)))
        values = " ".join(f"{k}={v}" for k, v in outcome.method.to_dict().items() if k not in ("method", "heads"))
        best = f"{outcome.method.name} {values} heads={getattr(outcome.method, 'heads', 'all')}"
        typer.echo(f"chosen: {best}" if outcome.gained else f"no recipe written; the best that was tried: {best}")
    show.note(f"{outcome.forwards} forwards; wrote {', '.join(map(str, written))}")
