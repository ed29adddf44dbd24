"""Captured statistics as safetensors files, tables and the maps that viewers take."""

import dataclasses
import importlib
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import steerlens
from steerlens import export, facts
from steerlens.errors import SteeringStateError, UnsupportedError
from steerlens.methods import ZeroTuning
from steerlens.recording import KNOWN, LayerRecord, load
from steerlens.spans import Spans

SPANS = Spans.of({"emphasis": [[(9, 12)], [(10, 13), (15, 16)], [(8, 11)]], "query": [[(17, 20)]] * 3})


@pytest.fixture
def record(model_of, prompts):
    """Left-padded rows of 20, 13 and 17 tokens and three generated ones (two of them rows); layers 0 and 2."""
    model, (ids, mask) = model_of("llama-gqa"), prompts("left")
    steered = steerlens.steer(model, ZeroTuning(3.0))
    with steered, steerlens.capture(model, SPANS, KNOWN, heads="0:1,6;2:*", maps="0:3;2:1,2") as record:
        model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    return record


def tensors(layer: LayerRecord) -> dict:
    held = {name: getattr(layer, name) for name in (*KNOWN[:-1], "columns", "map")}
    return held | {
        f"massive {field.name}": getattr(layer.massive, field.name) for field in dataclasses.fields(layer.massive)
    }


class TestFiles:
    def test_round_trip(self, record, tmp_path):
        path = record.save(tmp_path / "record.safetensors")
        read = load(path)
        assert path == tmp_path / "record.safetensors" and [p.name for p in tmp_path.iterdir()] == [path.name]
        assert (read.groups, read.stats, read.rows) == (("emphasis", "query"), KNOWN, "all")
        assert read.layers == record.layers == (0, 2) and isinstance(read[0], LayerRecord)
        for layer in read.layers:
            got, expected = read[layer], record[layer]
            assert (got.heads, got.map_heads, got.map_rows) == (expected.heads, expected.map_heads, expected.map_rows)
            for name, values in tensors(expected).items():
                assert tensors(got)[name].dtype == values.dtype, name
                assert torch.equal(tensors(got)[name].nan_to_num(7), values.nan_to_num(7)), name
        assert read[0].map.shape == (3, 1, 22, 22) and read[2].heads == tuple(range(8))
        assert read.to_pandas().equals(record.to_pandas())
        assert all(map(torch.equal, read.attentions(1), record.attentions(1)))
        again = load(read.save(tmp_path / "again"))
        assert torch.equal(again[2].argmax, record[2].argmax)

    def test_metadata_says_what_it_is(self, record, model_of, tmp_path):
        with safe_open(record.save(tmp_path / "r"), "pt") as opened:
            about = json.loads(opened.metadata()["steerlens"])
        assert about["versions"] == {
            "steerlens": steerlens.__version__,
            "torch": importlib.metadata.version("torch"),
            "transformers": importlib.metadata.version("transformers"),
        }
        assert about["layers"] == {
            "0": {"heads": [1, 6], "map_heads": [3]},
            "2": {"heads": list(range(8)), "map_heads": [1, 2]},
        }
        assert (about["groups"], about["rows"], about["stats"]) == (["emphasis", "query"], "all", list(KNOWN))
        assert about["model"] == facts.read(model_of("llama-gqa").config).name

    def test_a_part_of_the_statistics(self, model_of, prompts, tmp_path):
        model = model_of("llama-gqa")
        with torch.no_grad(), steerlens.capture(model, stats=["lse"], rows="last", heads={1: [3]}) as record:
            model(prompts()[0])
        read = load(record.save(tmp_path / "r"))
        assert (
            torch.equal(read[1].lse, record[1].lse) and read[1].columns.tolist() == [[19]] * 3 and read.rows == "last"
        )
        assert read[1].mass is read[1].massive is read[1].map is None and read[1].map_rows == ()

    def test_written_whole_or_not_at_all(self, record, tmp_path, monkeypatch):
        path = tmp_path / "record.safetensors"
        path.write_text("before")

        def interrupted(tensors, file, metadata):
            file.write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(export, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            record.save(path)
        assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]

    def test_files_that_are_no_records(self, record, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"record '.*none'"):
            load(tmp_path / "none")
        (tmp_path / "text").write_text("hello, this is no safetensors file")
        with pytest.raises(ValueError, match="text' is no record that can be read"):
            load(tmp_path / "text")
        save_file({"x": torch.zeros(1)}, tmp_path / "other")
        with pytest.raises(ValueError, match=r"other' is no record of steerlens\.capture: it has no 'steerlens'"):
            load(tmp_path / "other")
        about = json.dumps({"schema": 9, "versions": {"steerlens": "7.0"}})
        save_file({"x": torch.zeros(1)}, tmp_path / "later", {"steerlens": about})
        with pytest.raises(ValueError, match=r"written by steerlens 7\.0 as schema 9, this version reads schema 1"):
            load(tmp_path / "later")


class TestTables:
    def test_rows(self, record):
        table = record.to_pandas()
        assert list(table) == [
            "layer", "head", "batch_row", "query_column", "entropy", "lse", "argmax", "mass_emphasis", "mass_query"
        ]  # fmt: skip
        assert len(table) == (20 + 13 + 17 + 3 * 2) * (2 + 8) and not table.isna().any().any()
        assert sorted(table[table.layer == 0]["head"].unique()) == [1, 6]
        one = table[(table.layer == 0) & (table["head"] == 6) & (table.batch_row == 1)].set_index("query_column")
        assert list(one.index) == list(range(7, 22))
        got = record[0]
        for column in (7, 13, 21):
            assert (
                one.entropy[column] == got.entropy[1, 1, column].item()
                and one.lse[column] == got.lse[1, 1, column].item()
            )
            assert one["argmax"][column] == got.argmax[1, 1, column].item()
            assert one.mass_query[column] == got.mass[1, 1, column, 1].item()

    def test_keys(self, record):
        table = record.to_pandas("keys")
        assert list(table) == ["layer", "head", "batch_row", "key_column", "column_mean"]
        assert len(table) == (20 + 13 + 17 + 3 * 2) * (2 + 8)
        one = (
            table[(table.layer == 2) & (table["head"] == 5) & (table.batch_row == 2)]
            .set_index("key_column")
            .column_mean
        )
        assert list(one.index) == list(range(3, 22)) and one[10] == record[2].column_mean[2, 5, 10].item()

    def test_massive(self, record):
        table = record.to_pandas("massive")
        assert list(table) == ["layer", "batch_row", "query_column", "rank", "channel", "value", "median"]
        assert len(table) == (20 + 13 + 17 + 3 * 2) * 2 * 3 and not table.isna().any().any()
        one = table[(table.layer == 2) & (table.batch_row == 1) & (table.query_column == 20)]
        assert list(one["rank"]) == [0, 1, 2] and list(one.value) == record[2].massive.values[1, 20].tolist()
        assert list(one.channel) == record[2].massive.channels[1, 20].tolist()
        assert set(one["median"]) == {record[2].massive.median[1, 20].item()}

    def test_arrow(self, record):
        for name in ("rows", "keys", "massive"):
            table = record.to_arrow(name)
            assert table.to_pandas().equals(record.to_pandas(name))
        assert [str(kind) for kind in record.to_arrow("keys").schema.types] == ["int32"] * 4 + ["float"]

    def test_the_last_rows(self, model_of, prompts):
        model, (ids, mask) = model_of("llama-gqa"), prompts("left")
        with steerlens.capture(model, stats=["entropy"], rows="last", heads={0: [0]}) as record:
            model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        assert record.to_pandas().query_column.tolist() == [19, 20, 21] * 3

    def test_what_is_not_there(self, model_of, record, monkeypatch):
        with pytest.raises(
            ValueError, match="table 'key' is unknown; allowed: rows, keys, massive; did you mean 'keys'"
        ):
            record.to_pandas("key")
        model = model_of("llama-gqa")
        with pytest.raises(SteeringStateError, match="nothing is captured yet"):
            steerlens.capture(model).to_pandas()
        with pytest.raises(
            ValueError, match=r"'keys' shows column_mean, but captured were mass: .*stats=\('column_mean',\)"
        ):
            steerlens.capture(model, stats=["mass"]).to_arrow("keys")
        for name, make in (("pandas", record.to_pandas), ("pyarrow", record.to_arrow)):
            monkeypatch.setitem(importlib.sys.modules, name, None)
            with pytest.raises(UnsupportedError, match=rf"need {name}.*pip install 'steerlens\[export\]'"):
                make()


class TestAttentions:
    def test_shapes_without_pads(self, model_of, prompts):
        model, (ids, mask) = model_of("llama-gqa", "eager"), prompts("left")
        with torch.no_grad(), steerlens.capture(model, stats=(), maps="all") as record:
            model(ids, attention_mask=mask)
        for row, length in enumerate((20, 13, 17)):
            with torch.no_grad():
                alone = model(ids[row : row + 1, 20 - length :], output_attentions=True).attentions
            got = record.attentions(row)
            assert len(got) == 3 and all(layer.shape == (1, 8, length, length) for layer in got)
            assert max((a - b).abs().max() for a, b in zip(got, alone, strict=True)) < 1e-5
        assert torch.cat(record.attentions(2)).shape == (3, 8, 17, 17)

    def test_pads_on_the_right_and_generated_rows(self, model_of, prompts, record):
        model, (ids, mask) = model_of("llama-gqa"), prompts("right")
        with torch.no_grad(), steerlens.capture(model, stats=(), maps={0: [3]}) as right:
            model(ids, attention_mask=mask)
        assert right.attentions(1)[0].shape == (1, 1, 13, 13)
        assert [tuple(layer.shape) for layer in record.attentions(1)] == [(1, 1, 15, 15), (1, 2, 15, 15)]
        assert (record.attentions(1)[1].sum(-1) - 1).abs().max() < 1e-5

    def test_what_gives_no_square(self, model_of, prompts, record):
        model, (ids, _) = model_of("llama-gqa"), prompts()
        with pytest.raises(ValueError, match=r"row 3 is out of range; captured are rows 0\.\.2"):
            record.attentions(3)
        with torch.no_grad(), steerlens.capture(model, stats=(), maps={0: [1]}, map_rows="last") as last:
            model(ids)
        with pytest.raises(ValueError, match="map of layer 0 has 1 rows of 20 columns"):
            last.attentions()
        with torch.no_grad(), steerlens.capture(model, stats=(), maps={0: [1]}, map_rows=range(10, 20)) as twice:
            model(ids), model(ids)
        with pytest.raises(ValueError, match="map of layer 0 has 20 rows of 20 columns, and a square"):
            twice.attentions()
        with torch.no_grad(), steerlens.capture(model, stats=["lse"]) as without:
            model(ids)
        with pytest.raises(ValueError, match="no dense maps; ask for heads"):
            without.attentions()


def test_numbers_are_numpy_of_32_bits(record):
    assert {column.dtype for column in export._columns(record, "rows").values()} == {
        np.dtype("int32"),
        np.dtype("float32"),
    }


def test_a_place_where_nothing_can_be_written(tmp_path, model_of, prompts):
    model, (ids, _) = model_of("llama-gqa"), prompts()
    with torch.no_grad(), steerlens.capture(model, stats="entropy") as record:
        model(ids)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        record.save(tmp_path / "none" / "record.safetensors")
    with pytest.raises(IsADirectoryError, match="is a folder; give the name of a file"):
        record.save(tmp_path)
    assert not list(tmp_path.iterdir())
