"""The command line: results on stdout, logs and progress on stderr. torch loads only where it computes.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done with sample errors, 128+n stopped by signal n.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from steerlens import __version__
from steerlens.cli import bench, compare, doctor, eval, guard, heads, influence, listing, run, tune

app = typer.Typer(
    name="steerlens",
    help="Steer the attention of Hugging Face LLMs, without training.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"steerlens {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command("run", epilog=run.EXAMPLES)(guard.guarded(run.run))
app.command("list")(guard.guarded(listing.listing))
app.command("doctor")(guard.guarded(doctor.doctor))
app.command("bench")(guard.guarded(bench.bench))
app.command("eval")(guard.guarded(eval.evaluate))
app.command("compare")(guard.guarded(compare.compare))
app.command("tune")(guard.guarded(tune.tune))
app.command("influence")(guard.guarded(influence.influence))
app.add_typer(heads.app, name="heads")


def main() -> None:
    """The console script `steerlens`."""
    guard.quiet()
    guard.catch_signals()
    try:
        app(prog_name="steerlens")
    except guard.Stopped as stopped:
        guard.leave_quietly()
        sys.exit(stopped.code)


if __name__ == "__main__":
    main()
