"""`steerlens eval` as it is run: alone, in shards and ranks, killed and resumed, stopped, in the wrong folder."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from steerlens.evals.runner import Runner
from steerlens.evals.task import Task, load
from typer.testing import CliRunner

from steerlens import models
from steerlens.cli import app

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}
JOB = """schema: 1
models: [tiny]
steerings:
  - pasta-tiny
  - {label: zero, methods: [{method: zerotuning, gamma: 2}]}
tasks:
  - {task: conflict, length: 48}
  - {task: memory, length: 48}
limit: 10
batch_size: 3
controls: {random_heads: 1, neutral: false}
"""
BATCHES = 8


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("job") / "job.yaml"
    path.write_text(JOB)
    return path


@pytest.fixture(scope="module")
def tiny():
    return models.load("tiny")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "steerlens.cli", "eval", *map(str, arguments)]


def start(*arguments: object) -> subprocess.Popen:
    # its own group, as a shell would give it
    return subprocess.Popen(
        command(*arguments),
        env=ENVIRONMENT,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def call(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    assert result.exit_code == code, result.stderr
    return result


def samples(folder: Path) -> dict[tuple, dict]:
    """Every final sample, timing aside; none is there twice."""
    found: dict[tuple, dict] = {}
    for path in sorted(folder.glob("*/*/samples_*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            row.pop("seconds", None)
            key = (row["model"], row["steering"], row["task"], row["seed"], row["doc_id"])
            assert key not in found
            found[key] = row
    return found


def done(folder: Path) -> int:
    """Finished batches on the disk."""
    return sum(path.read_bytes().count(b'{"end": ') for path in folder.glob("work/*.jsonl"))


def wait_for(process: subprocess.Popen, folder: Path, batches: int) -> None:
    while done(folder) < batches and process.poll() is None:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory) -> Path:
    """The job run by one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    call("--config", job, "--output", out)
    return out


class TestResults:
    def test_what_is_there(self, whole):
        """Each document under each steering that fits the task, in the layout that `compare` reads."""
        rows = samples(whole)
        labels = {task: {k[1] for k in rows if k[2] == task} for task in ("conflict", "memory")}
        assert labels["conflict"] == {"baseline", "pasta-tiny", "pasta-tiny random 1", "zero"}
        assert labels["memory"] == {"baseline", "zero"} and len(rows) == 4 * 10 + 2 * 10
        assert not any("error" in row for row in rows.values())
        (path,) = whole.glob("tiny/zero/results_*.json")
        results = json.loads(path.read_text())
        assert path.stem == f"results_{results['date']}" and results["config"]["steering"]["methods"][0]["gamma"] == 2
        for task in ("conflict", "memory"):
            mine = [row for key, row in rows.items() if key[1:3] == ("zero", task)]
            metric = mine[0]["metrics"][0]
            assert results["results"][task][f"{metric},none"] == pytest.approx(sum(r[metric] for r in mine) / 10)
            assert results["n-samples"][task]["effective"] == results["results"][task]["sample_len"] == 10
        keys = "groups group_subtasks versions n-shot higher_is_better configs git_hash task_hashes model_name"
        assert set(keys.split()) <= set(results)
        both = CliRunner().invoke(
            app, ["compare", str(whole / "tiny/baseline"), str(whole / "tiny/pasta-tiny"), "--json"]
        )
        assert both.exit_code == 0, both.stderr

    def test_shown(self, whole, job):
        """A finished job shows its table, its skipped pairs, its controls; --json and --merge the same figures."""
        result = call("--config", job, "--output", whole, "--resume")
        assert "conflict  follows  pasta-tiny  10" in result.stdout.replace("   ", "  ")
        assert "1 random head sets" in result.stdout and "left out: pasta-tiny on memory" in result.stderr
        before = samples(whole)
        summary = json.loads(call("--merge", "--output", whole, "--json").stdout)
        assert summary == json.loads((whole / "summary.json").read_text()) and samples(whole) == before
        assert (whole / "report.html").stat().st_size > 1000 and (whole / "report.md").exists()
        made = json.loads((whole / "job.json").read_text())
        assert summary["fingerprint"] == made["fingerprint"] and summary["job"]["batch_size"] == 3
        assert summary["versions"]["torch"] == torch.__version__ and "git_hash" in summary
        assert torch.__version__ in (whole / "report.md").read_text()

    def test_from_options(self, whole, tmp_path):
        """Options describe the same as a job file."""
        out = tmp_path / "out"
        options = "--recipe pasta-tiny --tasks conflict --task-set conflict.length=48 --limit 10 --batch-size 3"
        call(*options.split(), "--output", out)
        one, other = samples(out), samples(whole)
        assert len(one) == 20 and all(
            other[key] | {"arguments": 0} == row | {"arguments": 0} for key, row in one.items()
        )

    def test_vectors(self, tmp_path):
        options = "--method iti --set alpha=2.0 --vectors iti-tiny.safetensors --tasks conflict_choice --limit 2"
        call(*options.split(), "--output", tmp_path / "out")
        [described] = json.loads((tmp_path / "out" / "job.json").read_text())["steerings"]
        assert described["methods"][0]["vectors"] == "iti-tiny.safetensors"


class TestFailing:
    @pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval")
    def test_nothing_is_kept_where_nothing_ran(self, tmp_path):
        """A task of lm-eval without its data: looked for once, and no word of batches to go on from."""
        (tmp_path / "lost.yaml").write_text(
            "{task: lost, dataset_path: json, dataset_kwargs: {data_files: {test: nowhere.json}}, test_split: test, "
            "output_type: generate_until, doc_to_text: '{{q}}', doc_to_target: '{{a}}', "
            "metric_list: [{metric: exact_match}]}"
        )
        options = ["--method", "zerotuning", "--set", "gamma=2", "--tasks", "lost", "--include-path", tmp_path]
        said = call(*options, "--output", tmp_path / "out", code=1).stderr
        assert "nowhere.json" in said and "--resume" not in said and said.count("looking for") == 1
        found = call(*options, "--dry-run").stdout
        assert "operations: unknown, as is the size of lost" in found and "at most" not in found
        missing = call(*options[:-1], tmp_path / "nowhere", "--dry-run", code=2).stderr
        assert f"--include-path {tmp_path / 'nowhere'} is no folder" in missing


class TestWorkers:
    def test_shards(self, whole, job, tmp_path):
        """Shards in any order, and one process for what is missing: the same rows as from one process alone."""
        out = tmp_path / "out"
        for shard in ("2/3", "0/3"):
            assert "batches are not done" in call("--config", job, "--output", out, "--shard", shard).stderr
            assert not list(out.glob("*/*/samples*"))
        assert "of 8 batches" in call("--merge", "--output", out, code=2).stderr
        assert "going on" in call("--config", job, "--output", out, "--resume").stderr
        assert samples(out) == samples(whole)
        counts = {path.stem: path.read_bytes().count(b'{"end": ') for path in (out / "work").glob("*.jsonl")}
        assert counts == {"worker-2-of-3": 2, "worker-0-of-3": 3, "worker-0-of-1": 3}

    def test_ranks(self, whole, job, tmp_path):
        """Two processes of `accelerate launch` at once."""
        out = tmp_path / "out"
        # on a machine without GPUs, what --multi_gpu starts are two processes on the CPU
        launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
        launch += " --dynamo_backend no --main_process_port 0 -m steerlens.cli eval"
        arguments = [sys.executable, *launch.split(), "--config", str(job), "--output", str(out), "--device", "cpu"]
        result = subprocess.run(arguments, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert samples(out) == samples(whole)
        sizes = [path.read_bytes().count(b'{"end": ') for path in (out / "work").glob("worker-*-of-2.jsonl")]
        assert sizes == [BATCHES // 2] * 2 and result.stdout.count("verdict") == 1


class TestStopping:
    def kill_until_done(self, job: Path, out: Path, kills: int, rng: random.Random) -> int:
        """Kill so many times at random moments, then let it finish; the batches that were there when it was killed."""
        seen = 0
        for number in range(kills):
            process = start("--config", job, "--output", out, "--resume")
            wait_for(process, out, min(BATCHES - 1, done(out) + (number > 0 or rng.random() < 0.5)))
            time.sleep(rng.random() * 0.3)
            process.kill()
            process.communicate()
            seen = max(seen, done(out))
        call("--config", job, "--output", out, "--resume")
        return seen

    def test_killed(self, whole, job, tmp_path):
        """SIGKILL loses nothing that was finished, and nothing is there twice."""
        out = tmp_path / "out"
        assert self.kill_until_done(job, out, 3, random.Random(0)) > 0
        assert samples(out) == samples(whole)

    @pytest.mark.full
    def test_killed_often(self, whole, job, tmp_path):
        for seed in range(4):
            out = tmp_path / f"out{seed}"
            self.kill_until_done(job, out, 5, random.Random(seed))
            assert samples(out) == samples(whole)

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_signals(self, whole, job, tmp_path, number, code):
        """A signal ends it with its code and says how to go on; what is finished stays."""
        out = tmp_path / "out"
        process = start("--config", job, "--output", out, "--limit", 60)
        wait_for(process, out, 1)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code, said
        assert "run again with --resume to go on" in said and "Traceback" not in said
        assert done(out) >= 1 and not list(out.glob("*/*/*.json"))


class TestFolders:
    def test_left_alone(self, whole, job, tmp_path):
        """Another job, the same one unasked, and mistakes write nothing; they say what differs and what to do."""
        before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in whole.rglob("*") if path.is_file()}
        assert "--resume" in call("--config", job, "--output", whole, code=2).stderr
        other = call("--config", job, "--output", whole, "--resume", "--batch-size", 4, code=2).stderr
        assert "belongs to another job: batch_size was 3, is 4" in other
        assert {
            path: (path.read_bytes(), path.stat().st_mtime_ns) for path in whole.rglob("*") if path.is_file()
        } == before

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ("--tasks needel --recipe pasta-tiny", "no task 'needel'; did you mean 'needle'?"),
            ("--tasks conflict --recipe pasta-tin", "did you mean 'pasta-tiny'"),
            ("--tasks conflict --method pastaa", "did you mean 'pasta'"),
            ("--tasks conflict --recipe pasta-tiny --model tinny", "did you mean 'tiny'"),
            (
                "--tasks conflict --recipe pasta-tiny --task-set needle.length=4",
                "with a task of this run, one of conflict",
            ),
            ("--tasks conflict --recipe pasta-tiny --task-set conflict.lenght=4", "lenght"),
            ("--tasks conflict, --recipe pasta-tiny", "has an empty name"),
            ("--tasks conflict --recipe pasta-tiny --num-fewshot 2", "only tasks of lm-eval have that"),
            ("--tasks conflict --method spa --vectors iti-tiny.safetensors", "vectors"),
            ("--tasks conflict --method pasta --heads 7:1", "layer 7 is out of range; tiny has layers 0..5"),
            ("--tasks conflict --recipe pasta-tiny --shard 4/4", "4 shards are 0/4 to 3/4"),
            ("--tasks memory --recipe pasta-tiny", "is run on no task: pasta needs the span group emphasis"),
            (
                "--tasks conflict_choice --method lookback_lens --vectors lookback_lens-tiny.safetensors",
                "is run on no task: lookback_lens gives no text a probability, and conflict_choice compares those",
            ),
            ("--tasks conflict", "neither --method nor --recipe"),
            ("--recipe pasta-tiny", "give --tasks"),
            ("--merge --shard 1/2", "--merge runs nothing; leave --shard out"),
            ("--merge --dry-run", "exclude each other"),
            ("--merge", "holds no job"),
        ],
    )
    def test_mistakes(self, tmp_path, monkeypatch, arguments, said):
        """Before anything is loaded or written."""
        monkeypatch.setattr(models, "load", None)
        monkeypatch.setattr("steerlens.evals.harness.available", lambda: False)
        result = call(*arguments.split(), "--output", tmp_path / "out", code=2)
        assert said in result.stderr
        assert not (tmp_path / "out").exists()

    def test_usage_errors_are_fast(self, job):
        """They need no torch."""
        code = (
            "import sys; from steerlens.cli import app\n"
            "try: app(sys.argv[1:], prog_name='steerlens')\n"
            "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
        )
        for arguments in (
            ["--tasks", "conflict"],
            ["--config", job, "--model", "tiny"],
            ["--config", job, "--method", "x"],
        ):
            line = [sys.executable, "-c", code, "eval", *map(str, arguments), "--dry-run"]
            result = subprocess.run(line, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
            assert result.stdout.strip().endswith("2 False"), result.stdout + result.stderr


class TestErrors:
    def test_bad_samples(self, job, tmp_path, tiny, monkeypatch):
        """A document for which memory does not suffice is an error of its own: exit 3, the rest counts."""
        model, tokenizer = tiny
        generate, marked = model.generate, str(load("conflict", length=48).docs(16, 0)[7].example.prompt)[-60:]

        def run(**inputs):
            if any(marked in text for text in tokenizer.batch_decode(inputs["input_ids"])):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return generate(**inputs)

        monkeypatch.setattr(models, "load", lambda *_: tiny)
        monkeypatch.setattr(model, "generate", run)
        result = call("--config", job, "--output", tmp_path / "out", "--limit", 16, code=3)
        rows = samples(tmp_path / "out")
        bad = {key for key, row in rows.items() if "error" in row}
        labels = ("baseline", "pasta-tiny", "pasta-tiny random 1", "zero")
        assert bad == {("tiny", label, "conflict", 0, 7) for label in labels}
        assert all("out of memory" in rows[key]["error"] for key in bad)
        assert f"{len(bad)} samples have errors" in result.stderr
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert len(summary["errors"]) == len(bad)
        assert not any("could be run" in note for note in summary["notes"])
        again = call("--config", job, "--output", tmp_path / "out", "--limit", 16, "--resume", code=3)
        assert "samples have errors" in again.stderr
        # a launcher would end the other processes
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            monkeypatch.setenv("WORLD_SIZE", "2")
            ranked = call("--config", job, "--output", tmp_path / "ranks", "--limit", 16, code=0)
        assert "exit 0 here, --merge gives 3" in ranked.stderr
        call("--merge", "--output", tmp_path / "ranks", code=3)

    def test_a_metric_that_fails(self, job, tmp_path, tiny, monkeypatch):
        score = Task.score

        def fail(task, doc, output):
            if doc.doc_id == 4:
                raise ZeroDivisionError("division by zero")
            return score(task, doc, output)

        monkeypatch.setattr(models, "load", lambda *_: tiny)
        monkeypatch.setattr(Task, "score", fail)
        call("--config", job, "--output", tmp_path / "out", code=3)
        errors = {key[-1]: row["error"] for key, row in samples(tmp_path / "out").items() if "error" in row}
        assert errors == {4: "the metrics failed: ZeroDivisionError: division by zero"}

    def test_a_method_that_always_fails(self, job, tmp_path, tiny, monkeypatch):
        """Not only samples with errors: said of the steering, with the error."""
        from steerlens.methods import ZeroTuning

        def fail(*_):
            raise TypeError("unsupported operand")

        monkeypatch.setattr(models, "load", lambda *_: tiny)
        monkeypatch.setattr(ZeroTuning, "plan", fail)
        result = call("--config", job, "--output", tmp_path / "out", code=3)
        said = "tiny, zero: none of the 10 samples of conflict could be run; the first error: "
        assert said in result.stderr and "TypeError: unsupported operand" in result.stderr
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert sum("could be run" in note for note in summary["notes"]) == 2


class TestCache:
    def test_hits(self, whole, job, tmp_path, tiny, monkeypatch):
        """What is known is not run again, by whatever job; the rows are the same."""
        monkeypatch.setattr(models, "load", lambda *_: tiny)
        asked = []
        run = Runner.run
        monkeypatch.setattr(Runner, "run", lambda *a, **k: asked.append(len(a[2]) * len(a[3])) or run(*a, **k))
        call("--config", job, "--output", tmp_path / "one", "--cache", tmp_path / "cache")
        assert sum(asked) == 60 and samples(tmp_path / "one") == samples(whole)
        asked.clear()
        call("--config", job, "--output", tmp_path / "two", "--cache", tmp_path / "cache")
        assert not asked and samples(tmp_path / "two") == samples(whole)
        call("--config", job, "--output", tmp_path / "three", "--cache", tmp_path / "cache", "--limit", 12)
        assert sum(asked) == 12


class TestDryRun:
    def test_offline(self, tmp_path):
        """A job on a model and data that nobody has: costs by what is declared, in seconds, and nothing is written."""
        path = tmp_path / "job.yaml"
        path.write_text(
            "schema: 1\nmodels: [{id: nobody/made-up-8b, dtype: bfloat16, shape: {parameters: 8.03e9, layers: 32, "
            "heads: 32, kv_heads: 8, head_dim: 128, width: 4096, vocab: 128256, positions: 131072}}]\n"
            "steerings: [{label: zero, methods: [{method: zerotuning}]}]\ntasks: [needle]\nlimit: 40\noutput: results\n"
        )
        before = set(tmp_path.iterdir())
        result = subprocess.run(
            command("--config", path, "--dry-run"), env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert "nobody/made-up-8b: 8.03e+09 parameters in bfloat16" in result.stdout
        assert "declared, not measured: sizes: the job's shape" in result.stdout and set(tmp_path.iterdir()) == before
        found = json.loads(call("--config", path, "--dry-run", "--json").stdout)
        assert found["models"][0]["tasks"][0]["documents"] == 40


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval")
class TestLmEval:
    def test_a_task_of_lm_eval(self, tmp_path, tiny, monkeypatch):
        """Tasks of lm-eval beside our own, with the same files, and figures that lm-eval computed."""
        monkeypatch.setattr(models, "load", lambda *_: tiny)
        places = ("hotel", "bakery", "office", "hall")
        rows = [
            {"question": f"The color of the {place} is", "choices": ["red", "green"], "label": n % 2}
            for n, place in enumerate(places)
        ]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "colors.yaml").write_text(
            "task: my_colors\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
            "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: label\n"
            "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
        )
        options = "--method zerotuning --tasks my_colors,conflict --limit 4"
        call(*options.split(), "--include-path", tmp_path, "--output", tmp_path / "out")
        (path,) = (tmp_path / "out").glob("tiny/zerotuning/results_*.json")
        results = json.loads(path.read_text())
        found = [row for key, row in samples(tmp_path / "out").items() if key[1:3] == ("zerotuning", "my_colors")]
        assert len(found) == 4 and results["n-samples"]["my_colors"] == {"original": 4, "effective": 4}
        assert results["results"]["my_colors"]["acc,none"] == sum(row["acc"] for row in found) / 4
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert {c["task"] for c in summary["comparisons"]} == {"my_colors", "conflict"}
