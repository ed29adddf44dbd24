"""Tables of a record on stdout, progress on stderr."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from steerlens.kernels.benching.record import Record, Values
from steerlens.kernels.benching.timing import median, relative_spread

WIDTH = 150
PHASES = ("prefill", "decode")


def progress(line: str) -> None:
    """One line on stderr."""
    Console(stderr=True, width=WIDTH, soft_wrap=True).print(escape(line), highlight=False)


def line(row: Values, done: int, total: int, seconds: float) -> str:
    """What is said of a row as soon as it is there."""
    said = row.get("reason") or ""
    if "ms" in row:
        said = f"{median(row):.4g} ms" + (f", ratio {row['ratio']:.3f}" if "ratio" in row else "")
    return f"{seconds:5.0f}s {done}/{total} {row['section']}: {row['name']}: {row['status']} {said}"[:400]


def kernels(rows: list[Values]) -> None:
    """What the compiler made of every launch."""
    table = _table("kernels as compiled", "launch", "kernel", "warps", "stages", "registers", "stack", "shared", "mma")
    names = ("warps", "stages", "registers", "spilled", "shared", "matrix")
    for row in rows:
        if "error" in row:
            table.add_row(row["launch"], row["error"][:60])
        else:
            table.add_row(row["launch"], row["name"].removesuffix("_kernel"), *(str(row[name]) for name in names))
    _print(table)


def tables(record: Record) -> None:
    """The record in short."""
    console = Console(width=WIDTH)
    rates = {name: record.rate(name) for name in ("copy", "matmul")}
    said = f"copy {(rates['copy'] or 0) / 1e12:.3g} TB/s, matmul {(rates['matmul'] or 0) / 1e12:.4g} TFLOP/s"
    console.print(f"{record.path}: {said}; gates {_gates(record)}", highlight=False, soft_wrap=True)
    for section, where in (("prefill", " T="), ("decode", " B=")):
        _pivot(record.of(section), section, where)
    _model(record.of("model"))
    for row in record.of("tune"):
        if row["status"] == "ok":
            over = "not timed" if row["chosen_over_fastest"] is None else f"{row['chosen_over_fastest']:.3f}"
            said = f"tune {row['name']}: fastest {row['fastest']}, chosen over it {over}"
            console.print(escape(said), highlight=False, soft_wrap=True)
    for row in record.rows:
        if row["status"] in ("failed", "error"):
            said = f"{row['status']}: {row['section']}: {row['name']}: {row['reason']}"
            console.print(escape(said[:400]), highlight=False, soft_wrap=True)
    skipped = [f"{row['section']}: {row['name']}" for row in record.rows if row["status"] == "skipped"]
    if skipped:
        console.print(escape(f"skipped ({len(skipped)}): {'; '.join(skipped)}"[:1500]), highlight=False, soft_wrap=True)


def _gates(record: Record) -> str:
    return ", ".join(f"{name} {record.gate(name)}" for name in ("prefill", "decode", "columns"))


def _pivot(rows: list[Values], section: str, where: str) -> None:
    """Cases by shapes: ms (ratio) and whether the bound is met."""
    if not rows:
        return
    split = [(*row["name"].rsplit(where, 1), row) for row in rows if where in row["name"]]
    columns = list(dict.fromkeys(at for _, at, _ in split))
    table = _table(f"{section}: ms ±spread (ratio to SDPA)", "case", *(f"{where.strip()}{at}" for at in columns))
    for name in dict.fromkeys(name for name, _, _ in split):
        cells = {at: _cell(row) for other, at, row in split if other == name}
        table.add_row(name, *(cells.get(at, "") for at in columns))
    _print(table)


def _cell(row: Values) -> str:
    if "ms" not in row:
        return row["status"]
    text = f"{median(row):.4g} ±{relative_spread(row):.0%}"
    if "ratio" in row:
        text += f" ({row['ratio']:.2f})"
    if row.get("gate") in ("red", "unchecked"):
        return f"{text} {row['gate'].upper()}"
    return text + {True: " met", False: " MISSED"}.get(row.get("met"), "")


def _model(rows: list[Values]) -> None:
    if not rows:
        return
    table = _table("model: steered over unsteered", "row", "prefill", "decode", "GPU busy", "peak memory", "status")
    for row in rows:
        prefill, decode = (f"{row[phase]['ratio']['median']:.3f}" if phase in row else "" for phase in PHASES)
        busy = f"{row['decode_busy']['ratio']:.3f}" if "decode_busy" in row else ""
        memory = row.get("peak_memory_ratio")
        table.add_row(row["name"], prefill, decode, busy, f"{memory:.4f}" if memory else "", row["status"])
    _print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=None, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    return table


def _print(table: Table) -> None:
    Console(width=WIDTH).print(table, highlight=False)
