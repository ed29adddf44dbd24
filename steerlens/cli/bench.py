"""`steerlens bench`: time steered against unsteered attention on a random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from steerlens.cli.guard import UsageError


def bench(
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            help="cpu-budget (default), cpu-d64, cpu-d128, cpu-long, cpu-families, cpu-padded, small, 8b or quick; "
            "other options override it.",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Seconds, to see that it works: --size quick.")] = False,
    family: Annotated[
        str | None,
        typer.Option(
            "--family",
            metavar="NAME,…",
            help="llama (default), qwen2, qwen3, mistral, gemma2, gemma3, gpt2, gpt_oss, deepseek_v3.",
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option("--layers", help="Layers of the random model.")] = None,
    heads: Annotated[int | None, typer.Option("--heads", help="Query heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option("--kv-heads", help="Key/value heads.")] = None,
    head_dim: Annotated[str | None, typer.Option("--head-dim", metavar="N,…", help="Head dims.")] = None,
    window: Annotated[int | None, typer.Option("--window", help="Keys that a sliding-window layer sees.")] = None,
    lengths: Annotated[str | None, typer.Option("--lengths", metavar="N,…", help="Prompt tokens, prefill.")] = None,
    decode_lengths: Annotated[
        str | None, typer.Option("--decode-lengths", metavar="N,…", help="Cached tokens, decode.")
    ] = None,
    decode_steps: Annotated[int | None, typer.Option("--decode-steps", help="Steps per repeat.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Sequences.")] = None,
    padding: Annotated[
        str | None,
        typer.Option(
            "--padding",
            metavar="none|left|F",
            help="Left-pad the batch: left is a quarter of the last row, F another fraction up to 0.5.",
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="bfloat16, float16 or float32.")] = None,
    methods: Annotated[
        str | None,
        typer.Option("--methods", metavar="NAME,…", help="neutral, zerotuning, pasta, headmask, act."),
    ] = None,
    backends: Annotated[
        str | None, typer.Option("--backends", metavar="NAME,…", help="auto, sdpa, reference, triton.")
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option("--peers", metavar="NAME,…", help='eager, eager-edit, additive-mask, pastalib; "" for none.'),
    ] = None,
    peer_limit: Annotated[int | None, typer.Option("--peer-limit", help="Longest prompt of the peers.")] = None,
    repeats: Annotated[int | None, typer.Option("--repeats", help="Timed pairs per row.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads. Default: torch's choice.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="Default: cuda, xpu, mps or cpu.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of weights and tokens.")] = None,
    output: Annotated[Path | None, typer.Option("--output", metavar="F.json", help="Write the record.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record instead of the table.")] = False,
) -> int:
    """Time steered against unsteered attention: prefill and decode, per backend and method, beside peers.

    Exit 1 if a result differs from the definition; a missed budget of time or memory is reported, not an error.
    """
    if quick and size not in (None, "quick"):
        raise UsageError(f"--quick is --size quick; it excludes --size {size}")
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"--output {output}: there is no folder {output.parent}")
    from steerlens.bench import Settings, over_budget, over_memory
    from steerlens.bench import bench as measure

    settings = Settings.of(
        "quick" if quick else size or "cpu-budget",
        families=_names(family),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dims=_numbers(head_dim, "--head-dim"),
        window=window,
        lengths=_numbers(lengths, "--lengths"),
        decode_lengths=_numbers(decode_lengths, "--decode-lengths"),
        decode_steps=decode_steps,
        batch_size=batch_size,
        padding=_padding(padding),
        dtype=dtype,
        methods=_names(methods),
        backends=_names(backends),
        peers=_names(peers),
        peer_limit=peer_limit,
        repeats=repeats,
        threads=threads,
        device=device,
        seed=seed,
    )

    def progress(record: dict[str, Any]) -> None:
        typer.echo(f"steerlens bench: {_line(record['rows'][-1])}", err=True)
        if output is not None:
            output.write_text(_text(record), encoding="utf-8")

    record = measure(settings, progress)
    if output is not None:
        output.write_text(_text(record), encoding="utf-8")
    if as_json:
        typer.echo(_text(record), nl=False)
    else:
        _table(record)
        bound = [row for row in record["rows"] if row.get("met") is not None]
        typer.echo(f"{len(over_budget(record))} of {len(bound)} rows that have a budget are over it")
        held = [row for row in record["rows"] if row.get("extra_met") is not None]
        typer.echo(f"{len(over_memory(record))} of {len(held)} rows that have a bound on extra memory are over it")
    return int(any("differs from the definition" in row.get("skipped", "") for row in record["rows"]))


def _text(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1, allow_nan=False) + "\n"


def _line(row: dict[str, Any]) -> str:
    found = f"{row['ratio']['median']:.2f}" if "ratio" in row else "skipped"
    return f"{row['family']} D={row['head_dim']} {row['phase']} {row['tokens']} {row['case']} {row['backend']}: {found}"


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    names = _names(text)
    if names is None:
        return None
    if not all(name.isdecimal() for name in names):
        raise UsageError(f"{option} {text!r} is not a list of whole numbers such as 2048,4096")
    return tuple(int(name) for name in names)


def _padding(text: str | None) -> float | None:
    if text in (None, "none", "left"):
        return {None: None, "none": 0.0, "left": 0.25}[text]
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--padding {text!r}; allowed: none, left or a fraction such as 0.25") from None


def _table(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    place, chosen = record["machine"], record["settings"]
    table = Table(
        title=f"{place['device']['name']}, {place['threads']} threads, torch {place['versions']['torch']}, "
        f"{chosen['dtype']}, {chosen['layers']} layers, {chosen['heads']}/{chosen['kv_heads']} heads, "
        f"batch {chosen['batch_size']}" + f", up to {chosen['padding']:.0%} left padding" * (chosen["padding"] > 0),
        caption="ratio: steered over unsteered, median of pairs taken side by side, with quartiles; "
        "*: it found nothing to steer; MiB: peak memory over unsteered, and its bound",
    )
    left = ("family", "phase", "case", "backend")
    for name in (*left[:2], "D", "tokens", *left[2:], "unsteered ms", "steered ms", "ratio", "budget", "MiB"):
        table.add_column(name, justify="left" if name in left else "right")
    for row in record["rows"]:
        start = (row["family"], row["phase"], str(row["head_dim"]), str(row["tokens"]))
        if "skipped" in row:
            table.add_row(*start, row["case"], row["backend"], "", "", "skipped", "", "", style="dim")
            continue
        ratio, bound = row["ratio"], row["budget"]
        idle = " *" if row["moved"] == 0 and row["case"] != "neutral" else ""
        table.add_row(
            *start,
            row["case"] + idle,
            row["backend"],
            f"{row['unsteered_ms']:.1f}",
            f"{row['steered_ms']:.1f}",
            f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]".replace("[", r"\["),
            "" if bound is None else f"{bound:.2f} {'met' if row['met'] else 'MISSED'}",
            _mebibytes(row),
            style="red" if False in (row["met"], row["extra_met"]) else None,
        )
    # A redirected table is for a file, not for 80 columns.
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)
    reasons = {(r["family"], r["case"], r["backend"], r["skipped"]) for r in record["rows"] if "skipped" in r}
    for family, case, backend, reason in sorted(reasons):
        typer.echo(f"skipped: {family} {case} ({backend}): {reason}")


def _mebibytes(row: dict[str, Any]) -> str:
    if row["extra_mib"] is None:
        return ""
    bound = "" if row["extra_met"] is None else f" / {row['extra_bound_mib']:.1f}"
    return f"{row['extra_mib']:.1f}{bound}" + " MISSED" * (row["extra_met"] is False)
