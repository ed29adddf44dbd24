"""The benchmark measures what it says: schema, pairing, checks before timing. No timing is asserted."""

import importlib.util
import json
import math
import sys

import pytest
import torch
from typer.testing import CliRunner

from steerlens import backends, facts, steer
from steerlens.bench import (
    PRESETS,
    Settings,
    bench,
    cases,
    machine,
    memory,
    model,
    over_budget,
    over_memory,
    peers,
    timing,
)
from steerlens.bench.settings import FAMILIES, BenchError
from steerlens.cli import app
from steerlens.methods import ZeroTuning

QUICK = Settings.of("quick", threads=1, device="cpu")
COMMON = {"family", "phase", "head_dim", "batch", "padding", "tokens", "case", "backend", "method"}
TIMES = {"unsteered_ms", "steered_ms", "ratio", "moved", "check", "budget", "met"}
MEASURED = COMMON | TIMES | {"extra_mib", "extra_bound_mib", "extra_met"}


@pytest.fixture(scope="module")
def record():
    return bench(QUICK)


def test_the_record_has_the_schema_and_is_plain_json(record):
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert set(record) == {"schema", "settings", "machine", "rows"}
    assert record["settings"]["lengths"] == [64]
    assert {"date", "device", "threads", "versions", "git"} <= set(record["machine"])
    assert record["machine"]["versions"]["torch"] == torch.__version__
    for row in record["rows"]:
        if "skipped" in row:
            assert (set(row), row["case"]) == (COMMON | {"skipped"}, "pastalib")
            continue
        assert set(row) == MEASURED
        ratio = row["ratio"]
        assert all(math.isfinite(v) and v > 0 for v in (*ratio.values(), row["unsteered_ms"], row["steered_ms"]))
        assert ratio["min"] <= ratio["q1"] <= ratio["median"] <= ratio["q3"] <= ratio["max"]


def test_every_case_backend_and_phase_is_there(record):
    found = {(row["phase"], row["case"], row["backend"]) for row in record["rows"]}
    names = [case.name for case in cases.cases(QUICK, QUICK.layers)]
    assert found == (
        {(phase, name, "sdpa") for phase in ("prefill", "decode") for name in names}
        | {("prefill", name, "reference") for name in names}
        | {(phase, name, "peer") for phase in ("prefill", "decode") for name in QUICK.peers}
    )
    assert {row["ratio"]["n"] for row in record["rows"] if row["phase"] == "decode" and row["backend"] == "sdpa"} == {4}


def test_what_is_timed_was_checked_where_it_changes_something(record):
    for row in record["rows"]:
        if "skipped" in row:
            continue
        assert row["check"]["error"] <= 1e-4
        # The absolute threshold of ACT finds no sinks in a random model: its row is the cost of looking.
        acts = row["case"] not in ("neutral", "eager", "act/few", "act/all")
        assert (row["check"]["moved"] > 1e-3) == acts, row["case"]


def test_a_wrong_result_is_not_timed(monkeypatch):
    right = backends.attention
    monkeypatch.setattr(backends, "attention", lambda name, call: right(name, call) * (1.01 if name == "sdpa" else 1))
    settings = Settings.of("quick", threads=1, device="cpu", methods=("zerotuning",), peers=())
    rows = bench(settings)["rows"]
    wrong = [row for row in rows if "skipped" in row]
    assert {row["backend"] for row in wrong} == {"sdpa"}
    assert all("differs from the definition" in row["skipped"] for row in wrong)
    found = CliRunner().invoke(app, ["bench", "--quick", "--methods", "zerotuning", "--peers", "", "--threads", "1"])
    assert (found.exit_code, "differs from the definition" in found.stdout) == (1, True)


def test_a_backend_that_is_not_here_is_reported(monkeypatch):
    def check(name):
        raise backends.UnsupportedError(f"backend {name!r} is not here")

    monkeypatch.setattr(backends, "check", check)
    settings = Settings.of("quick", device="cpu", methods=("zerotuning",), backends=("triton",), peers=())
    assert {row["skipped"] for row in bench(settings)["rows"]} == {"backend 'reference' is not here"}


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "not installed"),
        (
            "import nothing_of_that_name",
            "its import fails: ModuleNotFoundError: No module named 'nothing_of_that_name'",
        ),
        (
            "class PASTA:\n    def __init__(self, *_):\n        raise ValueError('too new')",
            "steering fails: ValueError: too new",
        ),
    ],
)
def test_a_peer_that_cannot_run_says_why(source, reason, monkeypatch, tmp_path):
    for name in ("pastalib", "pastalib.pasta"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    if source is None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "pastalib" else find(n, *a))
    else:
        (tmp_path / "pastalib").mkdir()
        (tmp_path / "pastalib/__init__.py").touch()
        (tmp_path / "pastalib/pasta.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
    rows = bench(Settings.of("quick", device="cpu", methods=(), peers=("pastalib",)))["rows"]
    assert {row["skipped"] for row in rows} == {f"not runnable here: {reason}"}
    for name in ("pastalib", "pastalib.pasta"):
        sys.modules.pop(name, None)


def test_the_command_writes_the_record_and_prints_a_table(tmp_path):
    output = tmp_path / "bench.json"
    options = ["bench", "--quick", "--threads=1", "--device=cpu", "--methods=pasta", "--peers=additive-mask"]
    found = CliRunner().invoke(app, [*options, "--output", str(output)])
    assert found.exit_code == 0, found.output
    assert "pasta/few" in found.stdout and "additive-mask" in found.stdout
    assert "steerlens bench: llama D=16 prefill 64 pasta sdpa: " in found.stderr
    rows = json.loads(output.read_text())["rows"]
    assert {row["case"] for row in rows} == {"pasta", "pasta/few", "additive-mask"}
    as_json = CliRunner().invoke(app, [*options, "--json", "--head-dim", "8,16", "--decode-steps", "1"])
    assert {row["head_dim"] for row in json.loads(as_json.stdout)["rows"]} == {8, 16}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "cpu-budget"], "excludes"),
        (["--methods", "pastta"], "did you mean 'pasta'"),
        (["--lengths", "2k"], "whole numbers"),
        (["--heads", "6", "--kv-heads", "4"], "evenly"),
        (["--family", "lama"], "did you mean 'llama'"),
        (["--window", "0"], ">= 1"),
        (["--padding", "left"], "batch_size >= 2"),
        (["--padding", "0.9", "--batch-size", "2"], "0 to 0.5"),
        (["--padding", "right", "--batch-size", "2"], "none, left or a fraction"),
        (["--repeats", "0"], ">= 1"),
        (["--dtype", "int8"], "bfloat16"),
        (["--output", "/nowhere/at/all.json"], "no folder"),
    ],
)
def test_impossible_settings_are_usage_errors(options, said):
    found = CliRunner().invoke(app, ["bench", "--quick", *options])
    assert (found.exit_code, said in found.stderr) == (2, True), found.stderr


def test_an_unknown_size_names_the_nearest():
    with pytest.raises(BenchError, match="did you mean 'cpu-budget'"):
        Settings.of("cpu-budgt")


def test_what_was_measured_survives_an_interrupted_run(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(timing, "Decode", stop)
    output = tmp_path / "bench.json"
    options = ["bench", "--quick", "--methods", "pasta", "--peers", "", "--output", str(output)]
    assert CliRunner().invoke(app, options).exit_code == 130
    record = json.loads(output.read_text())
    assert [(row["phase"], row["case"]) for row in record["rows"]] == [("prefill", "pasta")]
    assert "seconds" not in record["machine"]


def test_budgets_are_those_of_the_design():
    kinds = {case.name: case for case in cases.cases(Settings(), 4)}

    def at(name, phase, tokens, backend="sdpa", device="cpu"):
        return cases.budget(kinds[name], phase, tokens, backend, device)

    assert [at("pasta", "prefill", n) for n in (512, 2048, 4096, 8192)] == [None, 1.10, 1.10, 1.15]
    assert [at(name, "prefill", 4096) for name in ("act/few", "act/all relative")] == [1.35, 2.5]
    assert [at("act/all", "decode", n) for n in (512, 1024, 8192)] == [None, 1.05, 1.05]
    assert at("pasta", "prefill", 4096, "reference") is at("pasta", "prefill", 4096, device="cuda") is None
    few = cases.few_heads(4, 16)
    assert (sum(map(len, few.values())), sorted(few)) == (6, [0, 1, 2, 3])
    rows = [{"met": None}, {"met": True}, {"met": False, "case": "a"}, {"skipped": "b"}]
    assert over_budget({"rows": rows}) == [{"met": False, "case": "a"}]


@pytest.mark.parametrize(("budget", "met"), [(None, None), (1.0, False), (2.0, True)])
def test_a_budget_is_met_by_the_median(budget, met, monkeypatch):
    monkeypatch.setattr(cases, "budget", lambda *a: budget)
    monkeypatch.setattr(timing, "summary", lambda found: {"ratio": timing.spread([0.5, 1.5, 1.5, 3.0])})
    options = {"methods": ("neutral",), "backends": ("sdpa",), "peers": (), "decode_lengths": (), "device": "cpu"}
    assert [(row["budget"], row["met"]) for row in bench(Settings.of("quick", **options))["rows"]] == [(budget, met)]


def test_sides_take_turns_in_going_first():
    order = []

    def side(name, seconds):
        def run():
            order.append(name)
            return seconds

        return run

    found = timing.pairs(side("a", 2.0), side("b", 3.0), count=3, warmup=1)
    assert found == [(2.0, 3.0)] * 3
    assert "".join(order) == "ab" + "abbaab"
    assert timing.summary(found) == {"unsteered_ms": 2000.0, "steered_ms": 3000.0, "ratio": timing.spread([1.5] * 3)}
    assert timing.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"n": 5, "min": 1, "q1": 2, "median": 3, "q3": 4, "max": 5}
    assert timing.spread([2.0]) == {"n": 1, "min": 2, "q1": 2, "median": 2, "q3": 2, "max": 2}


def test_an_accelerator_is_waited_for_before_and_after(monkeypatch):
    order = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: order.append(device.type))
    timing.clock(lambda: order.append("run"), torch.device("cuda"))
    timing.clock(lambda: order.append("run"), torch.device("cpu"))
    assert order == ["cuda", "run", "cuda", "run"]


def test_decode_steps_start_again_from_the_prompt():
    small = model.build(QUICK, 16, "cpu", layers=1, positions=64, mlp=1, dtype="float32")
    decode = timing.Decode(small, model.tokens(1, 20, 0, "cpu"), steps=3)
    seen = []
    with torch.inference_mode():
        for _ in range(7):
            decode()
            seen.append(decode.cache.get_seq_length())
    assert seen == [21, 22, 23, 21, 22, 23, 21]


def test_steps_beyond_a_window_start_again_too():
    small = model.build(QUICK, 16, "cpu", layers=1, positions=64, mlp=1, dtype="float32", family="mistral", window=8)
    decode = timing.Decode(small, model.tokens(1, 20, 0, "cpu"), steps=2)
    layer, seen = decode.cache.layers[0], []
    before = layer.keys.clone()
    with torch.inference_mode():
        for _ in range(3):
            decode()
            seen.append((layer.get_seq_length(), layer.keys[..., -1, :].clone()))
    assert [length for length, _ in seen] == [21, 22, 21]
    assert torch.equal(seen[0][1], seen[2][1]) and not torch.equal(seen[0][1], seen[1][1])
    decode.rewind()
    assert torch.equal(layer.keys, before)


def test_every_family_is_built_to_the_shape():
    assert tuple(model.FAMILIES) == FAMILIES
    for family in FAMILIES:
        small = model.build(QUICK, 16, "cpu", layers=2, positions=64, mlp=1, dtype="float32", family=family, window=8)
        cache = small(model.tokens(1, 20, 0, "cpu"), use_cache=True).past_key_values
        wide = 24 if family == "deepseek_v3" else 16
        heads = 2 if model.FAMILIES[family].grouped else 4
        if family != "deepseek_v3":  # whose cache may hold latents
            assert {layer.keys.shape[1::2] for layer in cache.layers} == {(heads, wide)}, family
        kept = sorted(layer.keys.shape[2] for layer in cache.layers)
        windowed = {"mistral": [7, 7]}.get(family, [7, 20] if model.FAMILIES[family].windowed else [20, 20])
        assert kept == windowed, family
        assert memory.bound(small.config, 1, 20, 20, 4) == 2 * 4 * 20 * (4 * wide + heads * (wide + 16)), family


def test_positions_reach_to_the_last_decode_step():
    options = {"methods": ("neutral",), "backends": ("sdpa",), "peers": (), "device": "cpu"}
    long = Settings.of("quick", families=("gpt2",), decode_lengths=(400,), decode_steps=3, repeats=1, **options)
    assert [row["tokens"] for row in bench(long)["rows"]] == [64, 400]


def test_threads_are_given_back(monkeypatch):
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    bench(Settings.of("quick", threads=1 + torch.get_num_threads(), device="cpu", methods=(), peers=()))
    assert given == [1 + torch.get_num_threads(), torch.get_num_threads()]


def test_models_are_made_from_the_seed_alone():
    def weights(settings):
        small = model.build(settings, 16, "cpu", layers=1, positions=64, mlp=1, dtype="float32")
        return small.get_input_embeddings().weight

    before = torch.get_rng_state()
    first = weights(QUICK)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert torch.equal(weights(QUICK), first) and not first.requires_grad
    assert not torch.equal(weights(Settings.of("quick", seed=1)), first)
    assert not torch.equal(model.tokens(1, 20, 0, "cpu"), model.tokens(1, 20, 1, "cpu"))


def test_queries_and_keys_are_sharpened():
    for family, scale in (("qwen3", 4), ("gemma3", 3)):  # gemma counts from 0
        sharp = model.build(QUICK, 16, "cpu", layers=1, positions=64, mlp=1, dtype="float32", family=family, sharpen=4)
        norms = [w for name, w in sharp.named_parameters() if "q_norm" in name or "k_norm" in name]
        assert len(norms) == 2 and all((w == scale).all() for w in norms)
    plain, sharp = (
        model.build(QUICK, 16, "cpu", layers=1, positions=64, mlp=1, dtype="float32", sharpen=s).model.layers[0]
        for s in (1, 4)
    )
    for name, factor in (("q_proj", 4), ("k_proj", 4), ("v_proj", 1)):
        one, other = (getattr(layer.self_attn, name).weight for layer in (plain, sharp))
        assert torch.equal(other, factor * one)


@pytest.fixture(scope="module")
def of_families():
    families = ("mistral", "gemma2", "gpt2")
    return bench(Settings.of("quick", threads=1, device="cpu", families=families, backends=("auto",), peers=("eager",)))


def test_families_have_rows_of_their_own(of_families):
    cells = {(row["family"], row["phase"], row["case"]) for row in of_families["rows"]}
    names = [case.name for case in cases.cases(QUICK, QUICK.layers)]
    assert cells == {
        (family, phase, name)
        for family in ("mistral", "gemma2", "gpt2")
        for phase in ("prefill", "decode")
        for name in [*names, "eager"]
    }
    for row in of_families["rows"]:
        assert row["check"]["error"] <= 1e-4
        if row["case"].split("/")[-1] in ("zerotuning", "pasta", "few relative", "all relative"):
            assert row["check"]["moved"] > 1e-3, row


def test_a_refused_family_and_a_peer_of_another_say_so(monkeypatch):
    monkeypatch.setattr(facts, "REFUSED", {"mistral": "is not supported"})
    options = {"methods": ("pasta",), "peers": ("eager", "additive-mask"), "device": "cpu"}
    rows = bench(Settings.of("quick", families=("mistral", "qwen2"), backends=("sdpa",), **options))["rows"]
    refused = [row["skipped"] for row in rows if row["family"] == "mistral" and row["case"] != "additive-mask"]
    assert len(refused) == 6 and all("family 'mistral' is not supported" in reason for reason in refused)
    other = {row["skipped"] for row in rows if row["family"] == "qwen2" and "skipped" in row}
    assert other == {"not runnable here: written for llama, not for qwen2"}


def test_both_sides_of_a_padded_batch_get_its_mask(monkeypatch):
    build, masks = model.build, []

    def hooked(*args, **kwargs):
        made = build(*args, **kwargs)
        made.register_forward_pre_hook(lambda _, a, k: masks.append((a, k.get("attention_mask"))), with_kwargs=True)
        return made

    monkeypatch.setattr(model, "build", hooked)
    settings = Settings.of(
        "quick", device="cpu", batch_size=3, padding=0.5, backends=("sdpa",), peers=("eager", "eager-edit")
    )
    rows = bench(settings)["rows"]
    measured = [row for row in rows if "skipped" not in row]
    assert {(row["batch"], row["padding"]) for row in rows} == {(3, 0.5)}
    assert {row["case"] for row in rows if "skipped" in row} == {"eager-edit"}
    assert {row["skipped"] for row in rows if "skipped" in row} == {"not runnable here: knows no left padding"}
    assert {row["case"] for row in measured} == {c.name for c in cases.cases(settings, 2)} | {"eager"}
    assert all(row["check"]["error"] <= 1e-4 for row in measured)
    assert {mask.shape[1] for _, mask in masks} == {318, 319, 320, 64, 32, 33, 34}
    for _, mask in masks:
        pads = (mask == 0).sum(1).tolist()
        prompt = {318: 318, 319: 318, 320: 318, 64: 64}.get(mask.shape[1], 32)
        assert pads == [0, round(prompt / 4), prompt // 2]
        assert all(not mask[row, :n].any() for row, n in enumerate(pads))
    assert cases.spans(100, [0, 40]) == [[(25, 50)], [(55, 70)]]


def test_memory_is_measured_against_its_bound(record, monkeypatch):
    for row in record["rows"]:
        if "skipped" in row:
            continue
        exempt = row["backend"] in ("reference", "peer")
        assert isinstance(row["extra_mib"], float)
        assert (row["extra_met"] is None, row["extra_bound_mib"] is None) == (exempt, exempt)
        rows = row["tokens"] if row["phase"] == "prefill" else 1
        if not exempt:
            assert row["extra_bound_mib"] == round(2 * 2 * 16 * (4 * rows + 2 * 2 * row["tokens"]) / 2**20, 2)
    right = backends.attention

    def wasteful(name, call):
        kept = torch.ones(1 << 20)
        return right(name, call) + kept[0] - 1

    monkeypatch.setattr(backends, "attention", wasteful)
    options = {"methods": ("neutral", "pasta"), "backends": ("sdpa",), "peers": (), "device": "cpu"}
    found = bench(Settings.of("quick", decode_lengths=(), **options))
    assert [row["case"] for row in over_memory(found)] == ["pasta", "pasta/few"]
    assert all(row["extra_mib"] == pytest.approx(4, abs=0.1) for row in over_memory(found))


def test_the_bound_of_a_step_counts_the_keys_of_the_widest_layer():
    options = {"methods": ("neutral",), "backends": ("sdpa",), "peers": (), "lengths": (), "decode_lengths": (400,)}
    rows = bench(Settings.of("quick", families=("mistral", "gemma2"), window=8, device="cpu", **options))["rows"]
    for row, keys in zip(rows, (7, 400), strict=True):
        assert row["extra_bound_mib"] == round(2 * 2 * 16 * (4 + 2 * 2 * keys) / 2**20, 2), row["family"]


def test_presets_are_settings_and_reach_the_lengths_of_the_budgets():
    made = {name: Settings.of(name) for name in PRESETS}
    assert max(made["cpu-long"].lengths) == 32768
    for name in ("cpu-d64", "cpu-d128"):
        assert {1024, 8192} <= set(made[name].decode_lengths) and {2048, 8192} <= set(made[name].lengths)
    assert made["cpu-padded"].pads(4096) == [0, 341, 683, 1024]
    assert "mistral" in made["cpu-families"].families and made["cpu-d64"].families == ("llama",)


def test_a_shared_model_has_the_same_weights_and_its_own_steering():
    small = model.build(QUICK, 16, "cpu", layers=1, positions=64, mlp=1, dtype="float32")
    twin = model.share(small)
    assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in small.parameters()]
    ids = model.tokens(1, 20, 0, "cpu")
    with torch.no_grad():
        before = small(ids).logits
        with steer(twin, ZeroTuning(gamma=4)):
            assert torch.equal(small(ids).logits, before)
            assert not torch.equal(twin(ids).logits, before)


def test_peers_say_what_they_need_and_what_fails(monkeypatch):
    assert peers.memory("eager", 1, 16, 4096, 2) == 16 * 4096**2 * 10
    monkeypatch.setattr(machine, "free_memory", lambda device: 1000)
    settings = Settings.of("quick", device="cpu", methods=(), peers=("eager",), decode_lengths=())
    assert "GiB are free" in bench(settings)["rows"][0]["skipped"]
    monkeypatch.setattr(machine, "free_memory", lambda device: 100)
    for needed, skipped in ((69, False), (71, True)):
        monkeypatch.setattr(peers, "memory", lambda *a, needed=needed: needed)
        assert ("skipped" in bench(settings)["rows"][0]) == skipped
    short = Settings.of("quick", device="cpu", methods=(), peers=("eager",), decode_lengths=(), peer_limit=32)
    assert bench(short)["rows"][0]["skipped"] == "longer than peer_limit=32"
