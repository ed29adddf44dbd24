"""Captured statistics as files, tables and the maps that viewers take. Shapes as in `captured.LayerRecord`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from steerlens import __version__, files
from steerlens.captured import STATS, Captured, LayerRecord
from steerlens.errors import SteeringStateError, UnsupportedError, nearest
from steerlens.massive import Massive

SCHEMA = 1
_TENSORS = (*STATS, "columns")
_MASSIVE = ("values", "channels", "median", "columns")
Columns = dict[str, np.ndarray]


def save(record: Captured, model: str, file: str | os.PathLike[str]) -> Path:
    """Write a record to a safetensors file, whole or not at all; returns its path.

    Tensors are named `<layer>.<attribute>`; the metadata entry `steerlens` is JSON with `schema`, `model`, `groups`,
    `stats`, `rows`, `versions` and per layer `heads` and `map_heads`.
    """
    tensors: dict[str, torch.Tensor] = {}
    for layer in record.layers:
        found = record[layer]
        held = {name: getattr(found, name) for name in _TENSORS}
        held["map"] = found.map
        if found.map is not None:
            held["map_rows"] = torch.tensor(found.map_rows)
        if found.massive is not None:
            held |= {f"massive.{name}": getattr(found.massive, name) for name in _MASSIVE}
        tensors |= {f"{layer}.{name}": t.cpu().contiguous() for name, t in held.items() if t is not None}
    about = {
        "schema": SCHEMA,
        "model": model,
        "groups": record.groups,
        "stats": record.stats,
        "rows": record.rows,
        "layers": {n: {"heads": record[n].heads, "map_heads": record[n].map_heads} for n in record.layers},
        "versions": {"steerlens": __version__} | {name: version(name) for name in ("torch", "transformers")},
    }
    path = Path(file)
    files.check(path)
    # beside the file, so that putting it in its place is one step
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / "record"
        save_file(tensors, temporary, {"steerlens": json.dumps(about)})
        with temporary.open("r+b") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    return path


def load(file: str | os.PathLike[str]) -> Captured:
    """A record that `Record.save` wrote, its tensors on the CPU.

    Raises:
        ValueError: if the file is no such record.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"record {str(path)!r}: there is no such file")
    try:
        with safe_open(path, "pt") as opened:
            about = json.loads((opened.metadata() or {})["steerlens"])
            if about["schema"] != SCHEMA:
                raise ValueError(
                    f"written by steerlens {about['versions']['steerlens']} as schema {about['schema']}, this version "
                    f"reads schema {SCHEMA}: read it with that version, or capture again"
                )
            names: list[str] = opened.keys()
            tensors = {name: opened.get_tensor(name) for name in names}
        layers = {int(layer): _layer(f"{layer}.", heads, tensors) for layer, heads in about["layers"].items()}
        return Captured(about["groups"], about["stats"], about["rows"], layers, about["model"])
    except KeyError as error:
        raise ValueError(f"{str(path)!r} is no record of steerlens.capture: it has no {error}") from error
    except (SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is no record that can be read: {error}") from error


def _layer(prefix: str, heads: dict[str, list[int]], tensors: dict[str, torch.Tensor]) -> LayerRecord:
    held = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    massive = Massive(*(held[f"massive.{name}"] for name in _MASSIVE)) if "massive.values" in held else None
    return LayerRecord(
        tuple(heads["heads"]),
        **{name: held.get(name) for name in _TENSORS},
        massive=massive,
        map_heads=tuple(heads["map_heads"]),
        map_rows=tuple(held["map_rows"].tolist()) if "map" in held else (),
        _maps=[held["map"]] if "map" in held else [],
    )


def to_pandas(record: Captured, table: str) -> Any:
    """See `Captured.to_pandas`."""
    return _package("pandas").DataFrame(_columns(record, table))


def to_arrow(record: Captured, table: str) -> Any:
    """See `Captured.to_arrow`."""
    return _package("pyarrow").table(_columns(record, table))


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"tables need {error.name}, which is not installed: pip install 'steerlens[export]'"
        ) from error


def _columns(record: Captured, table: str) -> Columns:
    if table not in _TABLES:
        raise ValueError(f"table {table!r} is unknown; allowed: {', '.join(_TABLES)}{nearest(table, _TABLES)}")
    make, wanted = _TABLES[table]
    if not set(wanted) & set(record.stats):
        raise ValueError(
            f"table {table!r} shows {', '.join(wanted)}, but captured were {', '.join(record.stats) or 'maps alone'}: "
            f"capture with stats={wanted[:1]!r} or more of them"
        )
    parts = [part for layer in record.layers for part in make(record, layer, record[layer])]
    if not parts:
        raise SteeringStateError("nothing is captured yet: run the model inside `with steerlens.capture(…) as record`")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _rows(record: Captured, layer: int, found: LayerRecord) -> Iterator[Columns]:
    if found.columns is None:
        return
    B, H, Tq = len(found.columns), len(found.heads), found.columns.shape[1]
    columns = found.columns[:, None].expand(B, H, Tq).cpu()
    keep = columns >= 0
    part = _places(layer, found.heads, keep, "query_column", columns)
    for stat in ("entropy", "lse", "argmax"):
        values = getattr(found, stat)
        if values is not None:
            part[stat] = _number(values.cpu()[keep])
    if found.mass is not None:
        part |= {f"mass_{group}": _number(found.mass[..., g].cpu()[keep]) for g, group in enumerate(record.groups)}
    yield part


def _keys(record: Captured, layer: int, found: LayerRecord) -> Iterator[Columns]:
    if found.column_mean is None:
        return
    mean = found.column_mean.cpu()
    keep = ~mean.isnan()
    part = _places(layer, found.heads, keep, "key_column", torch.arange(mean.shape[2]).expand(mean.shape))
    yield part | {"column_mean": _number(mean[keep])}


def _massive(record: Captured, layer: int, found: LayerRecord) -> Iterator[Columns]:
    if found.massive is None:
        return
    values, channels, median, columns = (t.cpu() for t in found.massive.tensors())
    keep = (columns >= 0)[..., None].expand(values.shape)
    row, token, rank = keep.nonzero(as_tuple=True)
    yield {
        "layer": np.full(len(row), layer, np.int32),
        "batch_row": _number(row),
        "query_column": _number(columns[row, token]),
        "rank": _number(rank),
        "channel": _number(channels[keep]),
        "value": _number(values[keep]),
        "median": _number(median[row, token]),
    }


def _places(layer: int, heads: tuple[int, ...], keep: torch.Tensor, name: str, columns: torch.Tensor) -> Columns:
    """Where each kept entry of a [B, H, T] statistic is."""
    row, head, _ = keep.nonzero(as_tuple=True)
    return {
        "layer": np.full(len(row), layer, np.int32),
        "head": np.asarray(heads, np.int32)[head.numpy()],
        "batch_row": _number(row),
        name: _number(columns[keep]),
    }


def _number(values: torch.Tensor) -> np.ndarray:
    return values.to(torch.float32 if values.is_floating_point() else torch.int32).numpy()


_TABLES: dict[str, tuple[Callable[[Captured, int, LayerRecord], Iterator[Columns]], tuple[str, ...]]] = {
    "rows": (_rows, ("entropy", "lse", "argmax", "mass")),
    "keys": (_keys, ("column_mean",)),
    "massive": (_massive, ("massive",)),
}


def attentions(record: Captured, row: int) -> tuple[torch.Tensor, ...]:
    """See `Captured.attentions`."""
    found: list[torch.Tensor] = []
    for layer in record.layers:
        held = record[layer]
        if held.map is None:
            continue
        B, _, _, Tk = held.map.shape
        if not 0 <= row < B:
            raise ValueError(f"attentions: batch row {row} is out of range; captured are rows 0..{B - 1}")
        if held.map_rows != tuple(range(Tk)):
            raise ValueError(
                f"attentions: the map of layer {layer} has {len(held.map_rows)} rows of {Tk} columns, and a square "
                "needs each column's row once: capture(…, maps=…, map_rows='all') around one forward or generate"
            )
        square = held.map[row].cpu()
        pads = square.isnan().all(1).all(0)
        found.append(square[:, ~pads][:, :, ~pads][None])
    if not found:
        raise ValueError("attentions: there are no dense maps; ask for heads: capture(…, maps='0:1,3') or maps='all'")
    return tuple(found)
