"""The bench of the kernels: end to end in the interpreter, its plan, its gate, its record. No time is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from steerlens.kernels.benching.record import SECTIONS, Failed, NotRunnable, Record, Task, execute

ROOT = Path(__file__).parents[1]
BENCH = "steerlens.kernels.bench"


def python(*arguments, **environment):
    """A fresh interpreter: TRITON_INTERPRET is read when triton is imported."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


SMOKE = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
import fast_interpreter
from steerlens.kernels import bench
fast_interpreter.install()
sys.exit(bench.main(["--smoke", "--output", sys.argv[1], "--commit", "abc-dirty"]))
"""


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "smoke.json"
    ran = python("-c", SMOKE, path, PYTHONPATH=str(ROOT / "tests"))
    return ran, json.loads(path.read_text())


def test_the_record_says_where_it_comes_from_and_has_every_section(smoke):
    ran, record = smoke
    assert {"schema", "smoke", "machine", "settings", "complete", "green", "exit_status", "rows"} <= set(record)
    assert record["smoke"] and record["complete"] and record["green"] and record["running"] is None
    assert record["machine"]["git"] == {"commit": "abc", "dirty": True}
    assert {"torch", "triton", "transformers"} <= set(record["machine"]["versions"])
    assert {row["section"] for row in record["rows"]} == set(SECTIONS)
    names = [(row["section"], row["name"]) for row in record["rows"]]
    assert len(names) == len(set(names))
    assert "static span" in ran.stdout and "checks: " in ran.stderr


def test_every_row_ran_or_says_why_not(smoke):
    ran, record = smoke
    wrong = [row for row in record["rows"] if row["status"] in ("failed", "error")]
    assert not wrong and ran.returncode == record["exit_status"] == 0
    skipped = {row["name"]: row["reason"] for row in record["rows"] if row["status"] == "skipped"}
    assert skipped == {"kernels": "interpreted: nothing to compile", "peer flex T=32": "needs CUDA"}


def test_timed_rows_have_shape_spread_floor_ratio_and_gate(smoke):
    _, record = smoke
    rows = [row for row in record["rows"] if row["section"] in ("prefill", "decode") and row["status"] == "ok"]
    assert len(rows) >= 15
    for row in rows:
        assert {"batch", "rows", "keys", "dim", "dtype", "ms", "timed", "floor_ms", "over_floor"} <= set(row)
        assert {"n", "q1", "median", "q3"} <= set(row["ms"])
        if "peer" not in row:
            assert row["gate"] == "green" and row["ratio"] > 0
            assert row["met"] == (None if row["bound"] is None else row["ratio"] <= row["bound"])
    steered = [row for row in record["rows"] if row["section"] == "model" and row["name"].endswith("sdpa")]
    assert all(row["prefill"]["ratio"]["n"] and row["decode"]["ratio"]["n"] and row["moved"] > 0 for row in steered)


BROKEN = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import dataclasses, sys
from steerlens.kernels import attention, bench
from steerlens.kernels.benching import checks, prefill
right, grid = attention.attention, list(checks.grid(True))
def wrong(*inputs, **given):
    found = right(*inputs, **given)
    return dataclasses.replace(found, output=found.output * (1.05 if inputs[0].shape[2] != 32 else 1))
attention.attention = wrong
checks.grid = lambda smoke: grid[:1]
prefill.CASES, prefill.PEERS = prefill.CASES[:1], ()
sys.exit(bench.main(["--smoke", "--only", "checks,prefill", "--output", sys.argv[1]]))
"""


def test_a_failing_check_turns_the_gate_red_and_the_exit_status(tmp_path):
    ran = python("-c", BROKEN, tmp_path / "broken.json")
    record = json.loads((tmp_path / "broken.json").read_text())
    check, plain, _ = record["rows"]
    assert ran.returncode == 1 and not record["green"]
    assert check["status"] == "failed" and check["error"] > check["allowed"] and "allowed" in check["reason"]
    assert (plain["name"], plain["status"], plain["gate"], plain["met"]) == ("plain T=32", "ok", "red", None)
    assert "RED" in ran.stdout


def test_a_case_that_is_wrong_at_its_full_length_is_timed_and_fails(tmp_path):
    ran = python("-c", BROKEN.replace("!= 32", "== 32"), tmp_path / "broken.json")
    check, plain, _ = json.loads((tmp_path / "broken.json").read_text())["rows"]
    assert ran.returncode == 1 and check["status"] == "ok"
    assert (plain["status"], plain["gate"], plain["met"]) == ("failed", "red", None) and plain["ms"]["median"] > 0


HANGING = """
import sys, time
from steerlens.kernels import bench
arguments = ["--smoke", "--only", "floors", "--patience=-2", "--output", sys.argv[1]]
import os
os.environ["TRITON_INTERPRET"] = "1"
from steerlens.kernels.benching import timing
timing.Timer.times = lambda *given, **more: time.sleep(100)
bench.main(arguments)
"""


def test_a_row_that_does_not_return_is_an_error_and_the_rest_run_in_a_new_process(tmp_path):
    ran = python("-c", HANGING, tmp_path / "hanging.json")
    copy, product = json.loads((tmp_path / "hanging.json").read_text())["rows"]
    assert (copy["status"], copy["reason"]) == ("error", "the process ended while this row ran")
    assert product["status"] == "ok" and product["per_second"] > 0
    assert ran.returncode == 1 and "does not return" in ran.stderr


@pytest.mark.parametrize("output", [[], ["--output", ROOT / "kernels" / "records" / "x.json"]])
def test_a_smoke_run_is_never_a_record(output):
    ran = python("-m", BENCH, "--smoke", *output)
    assert ran.returncode == 2 and "no measurement" in ran.stderr


def test_compile_only_tells_what_the_compiler_made(tmp_path):
    ran = python(
        "-m",
        BENCH,
        "--compile-only",
        "--jobs",
        1,
        "--match",
        "decode plain B=1 Tk=4096",
        TRITON_CACHE_DIR=str(tmp_path),
    )
    assert ran.returncode == 0, ran.stderr
    assert "steered_decode" in ran.stdout and "steered_merge" in ran.stdout


def plan(*tasks):
    return [Task("checks", name, run, importance, seconds) for name, run, importance, seconds in tasks]


def boom():
    raise RuntimeError("out of luck")


def test_a_spent_budget_skips_the_least_important_by_name(tmp_path):
    clock = iter(range(0, 1000, 10))
    tasks = plan(("late", dict, 3, 5), ("first", dict, 0, 5), ("long", dict, 1, 50), ("short", dict, 1, 5))
    record = Record(tmp_path / "r.json", {})
    assert execute(tasks, record, 40, lambda: next(clock), lambda row: None)
    rows = json.loads(record.path.read_text())["rows"]
    assert [(row["name"], row["status"]) for row in rows] == [
        ("first", "ok"), ("long", "skipped"), ("short", "ok"), ("late", "skipped"),
    ]  # fmt: skip
    assert rows[1]["reason"].startswith("budget: 20 of 40 s are spent") and record.exit_status == 0


def test_an_exception_is_a_row_and_a_kill_keeps_what_is_done(tmp_path):
    def no():
        raise NotRunnable("no room")

    def killed():
        raise KeyboardInterrupt

    def wrong():
        raise Failed("off by 1", kernel="prefill", error=float("nan"))

    tasks = plan(("a", boom, 1, 1), ("b", no, 1, 1), ("c", wrong, 1, 1), ("d", killed, 1, 1), ("e", dict, 1, 1))
    record = Record(tmp_path / "r.json", {"smoke": True})
    with pytest.raises(KeyboardInterrupt):
        execute(tasks, record, 100, lambda: 0.0, lambda row: None)
    found = json.loads(record.path.read_text())
    assert [(row["name"], row["status"]) for row in found["rows"]] == [
        ("a", "error"),
        ("b", "skipped"),
        ("c", "failed"),
    ]
    assert found["rows"][0]["reason"] == "RuntimeError: out of luck" and found["rows"][2]["error"] == "nan"
    assert not found["complete"] and found["exit_status"] == 1 and found["running"] == ["checks", "d"]

    again = Record.resume(record.path)
    assert execute(tasks, again, 100, lambda: 0.0, lambda row: None)
    assert [(row["name"], row["status"]) for row in again.rows[3:]] == [("d", "error"), ("e", "ok")]
    assert again.gate("prefill") == "red" and again.gate("decode") == "unchecked" and again.head == {"smoke": True}


def test_a_lost_device_ends_the_plan_behind_the_row_that_lost_it(tmp_path):
    record = Record(tmp_path / "r.json", {})
    tasks = plan(("a", dict, 1, 1), ("b", boom, 1, 1), ("c", dict, 1, 1))
    assert not execute(tasks, record, 100, lambda: 0.0, lambda row: None, broken=lambda: True)
    assert [row["name"] for row in record.rows] == ["a", "b"] and not record.complete
