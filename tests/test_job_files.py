"""The shipped job files: they name what exists, say where figures are from, and are planned without a network."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from lm_eval import tasks as lm_eval_tasks
from steerlens.evals import harness
from steerlens.evals import task as own
from steerlens.evals.job import Job, LmTask
from steerlens.evals.sources import World
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from typer.testing import CliRunner

from steerlens import methods
from steerlens.cli import app
from steerlens.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
JOBS = ROOT / "evals" / "jobs"
FILES = sorted(JOBS.glob("*.yaml"))
SLURM = JOBS / "slurm.sh"
LM_EVAL = (
    *("agieval", "arc", "commonsense_qa", "hellaswag", "inverse_scaling", "mathqa", "nq_open", "openbookqa", "piqa"),
    *("super_glue", "triviaqa", "truthfulqa"),
)
"""Folders of lm-eval with the tasks that the jobs name: its whole index takes ten seconds."""
MLP = {
    "meta-llama/Llama-3.1-8B-Instruct": (LlamaConfig, LlamaForCausalLM, 14336),
    "meta-llama/Meta-Llama-3-8B-Instruct": (LlamaConfig, LlamaForCausalLM, 14336),
    "meta-llama/Llama-2-7b-chat-hf": (LlamaConfig, LlamaForCausalLM, 11008),
    "huggyllama/llama-7b": (LlamaConfig, LlamaForCausalLM, 11008),
    "mistralai/Mistral-7B-Instruct-v0.2": (MistralConfig, MistralForCausalLM, 14336),
}
"""Architecture and MLP width, which a job's shape does not say."""

every_job = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def lm_eval_index():
    home = Path(lm_eval_tasks.__file__).parent
    folders = [str(home / name) for name in LM_EVAL]
    return lm_eval_tasks.TaskManager(include_path=folders, include_defaults=False).task_index


@pytest.fixture(autouse=True)
def lm_eval_names(monkeypatch, lm_eval_index):
    def check(names, include_path=None):
        assert set(names) <= set(lm_eval_index)
        return list(names)

    monkeypatch.setattr(harness, "check", check)


@every_job
def test_what_a_job_names_exists(path, lm_eval_index):
    job = Job.from_file(path)
    assert job.name == path.stem
    for figure in job.published:
        task = job.loaded[figure.task]
        if isinstance(task, LmTask):
            known = [metric["metric"] for metric in lm_eval_index[task.name].cfg["metric_list"]]
        else:
            known = task.metrics
        assert figure.metric in known
        steering = next(s for s in job.steerings if figure.steering in [s.label, *(x.label for x in s.steerings())])
        assert job.names_task(steering, figure.task)


@every_job
def test_recipes_are_used_on_the_model_that_they_were_made_for(path):
    job = Job.from_file(path)
    for steering in job.steerings:
        if steering.made_for is not None:
            on = [model for model in job.models if steering.models is None or model.name in steering.models]
            assert {model.id for model in on} == {steering.made_for.id}


@every_job
def test_every_figure_has_a_source(path):
    for figure in Job.from_file(path).published:
        assert re.search(r"arXiv \d{4}\.\d{5}.*(Table \d|appendix|summary)|\w+/\w+, .*, [0-9a-f]{8}", figure.source)
        assert ("summary" in figure.source) == ("not confirmed" in (figure.note or ""))
        assert figure.unit == "percent"
        assert 1 < min(figure.baseline, figure.steered) <= max(figure.baseline, figure.steered) <= 100


def test_shapes_are_those_of_the_models():
    shapes = {model.id: model.shape for path in FILES for model in Job.from_file(path).models if model.shape}
    assert shapes.keys() == MLP.keys()
    for name, shape in shapes.items():
        config_of, model_of, mlp = MLP[name]
        config = config_of(
            vocab_size=shape.vocab,
            hidden_size=shape.width,
            intermediate_size=mlp,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            tie_word_embeddings=False,
        )
        with torch.device("meta"):
            assert shape.parameters == sum(p.numel() for p in model_of(config).parameters())


@every_job
def test_dry_run_without_a_network(path, monkeypatch):
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    result = CliRunner().invoke(app, ["eval", "--config", str(path), "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    plan, job = json.loads(result.stdout), Job.from_file(path)
    assert plan["total"]["without"] == []
    assert [model["model"] for model in plan["models"]] == [model.name for model in job.models]
    for model in plan["models"]:
        entry, memory = job.model(model["model"]), model["memory"]
        if entry.shape is not None:
            assert memory["weights"] == 2 * entry.shape.parameters
            assert memory["weights"] < memory["total"] < 80 * 2**30
        for task in model["tasks"]:
            rows, _ = job.loaded[task["task"]].expected
            assert task["documents"] == min(rows, job.limit_of(task["task"]))
            full = -(-task["documents"] // job.batch_size)
            assert task["batches"] == full if job.batch_tokens is None else task["batches"] >= full
            assert task["steerings"] >= 2
            # two operations per parameter and token, and attention on top
            # what lm-eval generates is not known, and not counted
            tokens = task["prompt_tokens"] + (task["new_tokens"] or 0)
            assert 2 * model["parameters"] * tokens <= task["flops"] < 20 * 2 * model["parameters"] * tokens
    assert plan["total"]["flops"] == pytest.approx(sum(t["flops"] for m in plan["models"] for t in m["tasks"]))


def test_tiny_has_every_task_of_the_world_and_both_jobs_every_method():
    job, more = Job.from_file(JOBS / "tiny.yaml"), Job.from_file(JOBS / "tiny-methods.yaml")
    used = {method.name for entry in (*job.steerings, *more.steerings) for method in entry.methods}
    assert used == set(methods.names())
    world = {name for name in own.names() if isinstance(own.load(name).data, World)}
    assert set(job.loaded) == world
    assert job.controls.random_heads > 0 and job.controls.neutral
    swept = {steering.dose[0] for entry in job.steerings for steering in entry.steerings() if steering.dose}
    assert swept == {"pasta.alpha", "act.beta", "zerotuning.gamma"}


@pytest.mark.parametrize("method", ["decore", "headmask"])
@pytest.mark.parametrize("count", [10, 50])
def test_whole_prompt_masks_have_the_recipes_heads(count, method):
    job = Job.from_file(JOBS / "decore-llama-3-8b.yaml")
    (whole,) = next(s.methods for s in job.steerings if s.label == f"{method} {count} heads, whole prompt")
    (decode,) = load_recipe(f"{method}-llama-3-8b-instruct-{count}heads").methods
    assert whole.to_dict() == decode.to_dict() | {"phase": "all"}


def test_decore_stands_beside_its_masked_branch():
    """The same heads, tasks and published baselines for both, and figures of both for each of them."""
    job = Job.from_file(JOBS / "decore-llama-3-8b.yaml")
    contrast, masked = (
        {
            (figure.steering.removeprefix(method), figure.task, figure.metric, figure.baseline)
            for figure in job.published
            if figure.steering.startswith(method)
        }
        for method in ("decore", "headmask")
    )
    assert contrast == masked and len(contrast) == 2 * len(job.loaded)


@pytest.mark.parametrize("path", sorted((JOBS / "tasks").glob("*.yaml")), ids=lambda path: path.stem)
def test_answers_of_zero_shot_tasks_are_labels(path):
    task = own.load(str(path))
    ((metric, arguments),) = task.spec.metrics
    (mapped,) = task.spec.map.values()
    assert (metric, task.name) == ("label", path.stem)
    assert sorted(mapped.values()) == sorted(arguments["labels"])


# --- slurm.sh ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Stand-ins for SLURM's commands and ours that write down how they are called; `srun` does what ACT says."""
    folder = tmp_path / "bin"
    folder.mkdir()
    note = f'echo "$(basename "$0") $*" >> {tmp_path}/calls\n'
    run = f'exec {sys.executable} -m steerlens.cli "$@"\n'
    commands = {
        "sbatch": note + "echo '77;cluster'\n",
        "scontrol": note,
        "srun": note + 'eval "$ACT"\nexec "$@"\n',
        "steerlens": note + f'[ -z "$REAL" ] || {run}',
        # one process does what follows `-m steerlens.cli`
        "accelerate": 'while [ "$1" != steerlens.cli ]; do shift; done\nshift\n' + run,
    }
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "calls").touch()
    return tmp_path


def _start(*arguments, act="exit 0", task=0, gpus=4, **environment):
    slurm = {
        "ACT": act,
        "REAL": "",
        "SLURM_GPUS_ON_NODE": gpus,
        "SLURM_CPUS_PER_TASK": 16,
        "SLURM_ARRAY_JOB_ID": 77,
        "SLURM_ARRAY_TASK_ID": task,
    }
    variables = {name: str(value) for name, value in (slurm | environment).items()}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(["bash", str(SLURM), *map(str, arguments)], env=os.environ | variables, **pipes)


def _slurm(*arguments, **settings):
    process = _start(*arguments, **settings)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def _calls(cluster):
    return (cluster / "calls").read_text().splitlines()


def test_slurm_fetches_then_submits_an_array_and_a_merge(cluster, monkeypatch):
    monkeypatch.chdir(cluster)
    Path("job.yaml").touch()
    job, output = cluster / "job.yaml", cluster / "out"
    assert _slurm("job.yaml", "out", 3, "--account=a b")[0] == 0
    fetch, array, merge = _calls(cluster)
    assert fetch == f"steerlens eval --config {job} --prefetch"
    assert array == f"sbatch --parsable --account=a b --array=0-2 {SLURM} --shard {job} {output} 3"
    assert "--dependency=afterok:77 " in merge and merge.endswith(f" {SLURM} --merge {job} {output}")
    assert _slurm("job.yaml", "out", "--account=a")[0] == 0
    assert "--array=0-3 " in _calls(cluster)[-2]
    code, output = _slurm("job.yaml")
    assert code != 0 and "JOB.yaml OUTPUT" in output


@pytest.mark.parametrize(("gpus", "each", "processes"), [(4, 1, 4), (8, 2, 4), (1, 1, 1), (2, 2, 1)])
def test_slurm_starts_a_process_per_replica(cluster, gpus, each, processes):
    assert _slurm("--shard", "job.yaml", "out", 3, task=1, gpus=gpus, GPUS_PER_REPLICA=each)[0] == 0
    (call,) = _calls(cluster)
    assert f"srun accelerate launch --num_processes {processes} " in call
    assert ("--multi_gpu" in call) == (processes > 1)
    assert call.endswith(" -m steerlens.cli eval --config job.yaml --output out --shard 1/3 --resume")


@pytest.mark.parametrize(("status", "code", "again"), [(0, 0, False), (1, 1, False), (3, 0, False), (143, 143, True)])
def test_slurm_queues_again_what_was_stopped_only(cluster, status, code, again):
    assert _slurm("--shard", "job.yaml", "out", 3, task=1, act=f"exit {status}")[0] == code
    assert ("scontrol requeue 77_1" in _calls(cluster)) == again


def test_slurm_passes_sigterm_on_and_queues_again(cluster):
    process = _start("--shard", "job.yaml", "out", 3, task=2, act="trap 'exit 143' TERM; sleep 60 & wait")
    deadline = time.monotonic() + 60
    while not _calls(cluster) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert _calls(cluster)[1:] == ["scontrol requeue 77_2"]


SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_slurm_passes_shellcheck():
    assert subprocess.run([SHELLCHECK, str(SLURM)], capture_output=True, text=True).stdout == ""


@pytest.mark.full
def test_slurm_runs_a_job(cluster):
    """The commands that the script gives are the CLI's: fetched, run in two shards, one of them twice, merged."""
    job, output = cluster / "job.yaml", cluster / "out"
    job.write_text("schema: 1\nmodels: [tiny]\nsteerings: [pasta-tiny]\ntasks: [conflict]\nlimit: 8\nbatch_size: 2\n")
    assert _slurm(job, output, 2, REAL=1)[0] == 0
    for task in (0, 0, 1):
        code, text = _slurm("--shard", job, output, 2, task=task, act=":", gpus=1)
        assert code == 0, text
    code, text = _slurm("--merge", job, output, REAL=1)
    assert code == 0, text
    summary = json.loads((output / "summary.json").read_text())
    assert [c["n"] for c in summary["comparisons"] if c["primary"]] == [8]
