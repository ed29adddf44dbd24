"""Jobs without a model at work: schema, controls, plan, folder, devices, costs, cache, estimates."""

import errno
import itertools
import json
import math
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import steerlens.evals.plan as planning
from hypothesis import given, settings
from hypothesis import strategies as st
from steerlens.evals import controls, cost
from steerlens.evals.cache import Cache
from steerlens.evals.doc import Doc, Outcome, Output, Steering, slug
from steerlens.evals.evaluate import place, replica_memory
from steerlens.evals.folder import Folder, FolderError, Worker
from steerlens.evals.job import Controls, Job, JobError, ModelEntry, shipped
from steerlens.evals.plan import Batch, Documents, Plan, cut, know, make, share
from steerlens.evals.results import _over_seeds, _Samples, _task, estimate
from steerlens.evals.task import load

from steerlens import models
from steerlens.errors import SteerlensError
from steerlens.examples import Example
from steerlens.facts import ModelFacts
from steerlens.methods import ACT, PASTA, SPA, HeadMask, ZeroTuning

ROOT = Path(__file__).resolve().parents[1]
FACTS = ModelFacts("hybrid", "llama", 4, (8, 0, 4, 8), (2, 0, 2, 2))


def job_of(tmp_path: Path, text: str) -> Job:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return Job.from_file(path)


JOB = """schema: 1
models: [tiny]
steerings:
  - pasta-tiny
  - {label: strength, recipe: pasta-tiny, sweep: {pasta.alpha: [1.0, 0.1]}}
  - {label: zero, methods: [{method: zerotuning, gamma: 2}]}
tasks:
  - {task: conflict, limit: 10, length: 64}
  - {task: memory, length: 64}
seeds: [0, 3]
limit: 6
batch_size: 4
controls: true
"""


class TestSchema:
    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            ("schema: 1\n", "", "job.yaml: 'schema' is missing"),
            ("batch_size", "batchsize", "job.yaml:12: batchsize: unknown key; allowed:"),
            ("batch_size", "batchsize", "did you mean 'batch_size'"),
            ("models: [tiny]", "models: [tinny]", "job.yaml:2: models[0].id: 'tinny' is neither an alias"),
            ("models: [tiny]", "models: [tinny]", "did you mean 'tiny'"),
            ("models: [tiny]", "models: [{id: tiny, dtyp: auto}]", "job.yaml:2: models[0].dtyp: unknown key"),
            ("models: [tiny]", "models: [tiny, tiny]", "job.yaml:2: the name 'tiny' is there twice"),
            ("models: [tiny]", "models: [{id: tiny, shape: {layer: 2}}]", "models[0].shape.layer: unknown key"),
            ("models: [tiny]", "models: [{id: tiny, dtype: fp17}]", "'fp17' is unknown; allowed: auto"),
            ("  - pasta-tiny\n", "  - pasta-tin\n", "job.yaml:4: recipe 'pasta-tin' is neither a file"),
            ("  - pasta-tiny\n", "  - {label: zero, recipe: pasta-tiny}\n", "the label 'zero' is taken"),
            ("  - pasta-tiny\n", "  - {label: Baseline, recipe: pasta-tiny}\n", "is taken by 'baseline'"),
            ("label: zero", "label: pasta-tiny neutral", "job.yaml:6: the label 'pasta-tiny neutral' is taken by"),
            ("label: zero", "label: pasta-tiny random 3", "job.yaml:6: the label 'pasta-tiny random 3' is taken by"),
            ("label: zero", f"label: {'强' * 67}", "is longer than 200 bytes; give a shorter 'label'"),
            ("models: [tiny]", f"models: [{{id: tiny, label: {'x' * 201}}}]", "job.yaml:2: the name 'xxx"),
            (
                "pasta.alpha: [",
                "pasta.alph: [",
                "job.yaml:5: sweep: 'pasta.alph' is no number of these methods; they have pasta.alpha; did you mean",
            ),
            ("[1.0, 0.1]", "[1.0, -1]", "job.yaml:5: pasta: alpha=-1.0 is out of range"),
            ("[1.0, 0.1]", "[0.1, 0.1]", "a value is there twice"),
            ("gamma: 2", "gama: 2", "job.yaml:6: steerings[2].methods[0]: zerotuning has no parameter 'gama'"),
            ("method: zerotuning", "method: zerotune", "unknown method 'zerotune'"),
            ("seeds: [0, 3]", "seeds: [0, 0]", "job.yaml:10: seeds: [0, 0]: a value is there twice"),
            ("limit: 6", "limit: 0", "job.yaml:11: limit: 0: input should be greater than or equal to 1"),
            ("batch_size: 4", "batch_size: four", "job.yaml:12: batch_size: 'four'"),
            ("limit: 6", "published: [{steering: pasta, task: conflict, source: x}]", "'pasta' is not in this job"),
            ("{label: zero,", "{label: zero, models: [llama],", "'llama' is not in this job; it has tiny"),
            (
                "- {task: memory, length: 64}",
                "- {lm_eval: boolq, length: 3}",
                "unknown key 'length'; a task of lm-eval",
            ),
            ("- {task: memory, length: 64}", "- {task: memory, num_fewshot: 3}", "only a task of lm-eval has them"),
            ("- {task: memory, length: 64}", "- {length: 64}", "needs either 'task' or 'lm_eval'"),
        ],
    )
    def test_mistakes(self, tmp_path, old, new, said):
        """Every mistake names file, line, place and what is allowed."""
        assert old in JOB
        with pytest.raises(JobError) as caught:
            job_of(tmp_path, JOB.replace(old, new))
        assert said in str(caught.value) and caught.value.exit_code == 2

    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            ("task: memory", "task: memmory", "did you mean 'memory'"),
            ("task: memory", "task: memmory", "job.yaml:9: task 'memmory' is neither"),
            ("- {task: memory, length: 64}", "- conflict", "job.yaml:9: the task 'conflict' is in the job twice"),
            ("length: 64}\nseeds", "lenght: 64}\nseeds", "lenght"),
            ("- {task: memory, length: 64}", "- conflict", "the task 'conflict' is in the job twice"),
            ("{label: zero,", "{label: zero, tasks: [conflikt],", "'conflikt' is not in this job"),
        ],
    )
    def test_tasks(self, tmp_path, old, new, said):
        assert old in JOB
        job = job_of(tmp_path, JOB.replace(old, new))
        for one in (job, job.changed(limit=3)):
            with pytest.raises(SteerlensError) as caught:
                assert one.loaded
        assert said in str(caught.value) and caught.value.exit_code == 2

    @pytest.mark.parametrize("other", ["codes v1", "codes_v1🙂", "Codes_v1"])
    def test_tasks_of_one_file(self, tmp_path, other):
        """Names that a file name does not tell apart are refused, before one's samples replace the other's."""
        text = (ROOT / "evals/tasks/conflict.yaml").read_text()
        for number, name in enumerate(("codes_v1", other)):
            (tmp_path / f"{number}.yaml").write_text(text.replace("task: conflict", f"task: {name}"))
        own = JOB.replace("task: conflict", "task: 0.yaml").replace("task: memory", "task: 1.yaml")
        with pytest.raises(JobError, match=rf"job.yaml:9: the tasks 'codes_v1' and '{other}' would share") as caught:
            assert job_of(tmp_path, own).loaded
        assert caught.value.exit_code == 2

    def test_options_have_no_line(self):
        """What comes from options is not blamed on a file called "options"."""
        with pytest.raises(JobError, match=r"^models\[0\].id: 'tinny' is neither"):
            Job.of(model={"id": "tinny"}, methods=[], label=None, made_for=None, tasks=[{"task": "conflict"}])

    def test_round_trip(self, tmp_path):
        """A job read back from its own description is the same, and one other value makes it another."""
        job = job_of(tmp_path, JOB)
        again = Job.from_dict(json.loads(json.dumps(job.to_dict())))
        assert again.compared() == job.compared() and again.fingerprint == job.fingerprint
        assert job_of(tmp_path, JOB.replace("length: 64}\nseeds", "length: 65}\nseeds")).fingerprint != job.fingerprint
        assert job_of(tmp_path, JOB + "output: elsewhere\n").fingerprint == job.fingerprint

    def test_sweep(self, tmp_path):
        """One steering per value, each with its dose, all else as in the recipe."""
        entry = job_of(tmp_path, JOB).steerings[1]
        one, other = entry.steerings()
        assert [s.label for s in (one, other)] == ["strength alpha=1", "strength alpha=0.1"]
        assert [s.dose for s in (one, other)] == [("pasta.alpha", 1.0), ("pasta.alpha", 0.1)]
        assert other.methods[0].alpha == 0.1 and other.methods[0].heads == entry.methods[0].heads
        assert {s.role for s in (one, other)} == {"sweep"} and one.of == "strength"

    def test_files_beside_the_job(self, tmp_path, monkeypatch):
        """Task files and recipes lie beside the job, wherever it is run from."""
        from steerlens.recipe import load_recipe

        load_recipe("pasta-tiny").save(tmp_path / "mine.yaml")
        (tmp_path / "own.yaml").write_text((ROOT / "evals/tasks/conflict.yaml").read_text())
        monkeypatch.chdir("/")
        job = job_of(tmp_path, JOB.replace("- pasta-tiny", "- mine.yaml").replace("task: conflict", "task: own.yaml"))
        assert list(job.loaded) == ["conflict", "memory"] and job.loaded["conflict"].config["data"]["length"] == 64
        named = JOB.replace("task: conflict", "task: own.yaml").replace(
            "{label: zero,", "{label: zero, tasks: [conflict],"
        )
        assert job_of(tmp_path, named).loaded

    def test_shipped(self, tmp_path, monkeypatch):
        """A name stands for a shipped job, unless there is a file of that name."""
        assert Job.from_file(Path("tiny")).name == "tiny" and "tiny" in shipped()
        with pytest.raises(JobError, match=r"tinny is neither a file nor a shipped job \(.*did you mean 'tiny'"):
            Job.from_file(Path("tinny"))
        monkeypatch.chdir(tmp_path)
        Path("tiny").write_text(JOB + "name: mine\n")
        assert Job.from_file(Path("tiny")).name == "mine"

    def test_described_without_paths(self, tmp_path):
        """What a report shows of a job names no folder of the machine."""
        (tmp_path / "own.yaml").write_text((ROOT / "evals/tasks/conflict.yaml").read_text())
        (tmp_path / "model").mkdir()
        text = JOB.replace("task: conflict", "task: own.yaml").replace("[tiny]", "[{id: ./model, label: m}]")
        job = job_of(tmp_path, text + f"output: {tmp_path}/out\n")
        found = job.described()
        assert str(tmp_path) in json.dumps(job.to_dict()) and str(tmp_path) not in json.dumps(found)
        assert found["tasks"][0]["task"] == "conflict" and found["models"][0]["id"] == "model"

    def test_folder_names(self):
        """A name of dots alone is no way out of the folder."""
        assert [slug(name) for name in (".", "..", ".x", "a..b", "a/../b")] == ["_", "_", ".x", "a..b", "a_.._b"]


class TestNetwork:
    @pytest.fixture(autouse=True)
    def asked(self, monkeypatch):
        from huggingface_hub import constants

        asked = []
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(planning, "hub_is_reachable", lambda: asked.append(1) and False)
        return asked

    def test_out_of_reach(self, tmp_path, asked):
        """Asked once, then all is offline until the end, and said."""
        from huggingface_hub import constants

        job, said = job_of(tmp_path, JOB.replace("- {task: memory, length: 64}", "- sst2")), []
        with planning.offline_unless_reachable(job, said.append):
            assert constants.is_offline_mode()
            with planning.offline_unless_reachable(job, said.append):
                pass
        assert not constants.is_offline_mode() and len(asked) == 1 and "cannot be reached" in said[0]

    def test_not_asked(self, tmp_path, asked):
        with planning.offline_unless_reachable(job_of(tmp_path, JOB), asked.append):
            assert not asked


class TestControls:
    @settings(max_examples=30, deadline=None)
    @given(st.sets(st.tuples(st.sampled_from([0, 2, 3]), st.integers(0, 3)), min_size=1, max_size=8), st.integers(0, 5))
    def test_random_heads(self, heads, seed):
        """As many heads as chosen, none of them chosen, none that the model lacks; the same again for one seed."""
        table = {layer: [h for at, h in heads if at == layer] for layer, _ in heads}
        steering = Steering("p", (PASTA(0.1, heads=table),))
        found, skipped = controls.of(steering, Controls(random_heads=4, neutral=False), FACTS, seed)
        assert len(found) == 4 and not skipped
        for control in found:
            drawn = {(n, h) for n, all_ in control.methods[0].heads.resolve(FACTS).items() for h in all_}
            assert len(drawn) == len(heads) and not drawn & heads and control.methods[0].alpha == 0.1
            assert (control.role, control.of) == ("random_heads", "p")
        again, _ = controls.of(steering, Controls(random_heads=4, neutral=False), FACTS, seed)
        assert [c.fingerprint for c in again] == [c.fingerprint for c in found]

    def test_sets_differ(self):
        steering = Steering("p", (PASTA(0.1, heads={0: [0, 1, 2, 3]}),))
        drawn = [controls.of(steering, Controls(random_heads=3), FACTS, seed)[0][:3] for seed in (0, 1)]
        assert len({control.fingerprint for found in drawn for control in found}) == 6

    def test_neutral(self):
        """The neutral control plans nothing, all else as it was."""
        steering = Steering("a", (ACT(0.2, 0.05, heads={0: [1]}), ZeroTuning(3.0, heads={2: [0]})))
        found, _ = controls.of(steering, Controls(random_heads=0), FACTS, 0)
        assert [method.plan(FACTS, None) for method in found[0].methods] == [{}, {}]
        assert found[0].methods[0].threshold == 0.05 and found[0].role == "neutral"

    @pytest.mark.parametrize(
        ("method", "why"),
        [
            (ZeroTuning(2.0), {"z random": "all heads are steered: none is left to draw from"}),
            (SPA(2.0), {"z random": "spa takes no heads to draw others for"}),
            (ZeroTuning(2.0, heads="0:*;2:*"), {"z random": "12 heads are chosen, 8 are left to draw from"}),
            (HeadMask({0: [1]}), {"z neutral": "headmask has no strength that changes nothing"}),
        ],
    )
    def test_impossible_ones_are_told(self, method, why):
        _, skipped = controls.of(Steering("z", (method,)), Controls(), FACTS, 0)
        assert dict(skipped) == why


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    job = job_of(tmp_path_factory.mktemp("plan"), JOB)
    return job, make(job, Documents(job))


class TestPlan:
    def test_every_document_once(self, made):
        job, plan = made
        for task, seed in itertools.product(job.loaded, job.seeds):
            batches = [b for b in plan.batches if (b.task, b.seed) == (task, seed)]
            assert sorted(i for b in batches for i in b.docs) == list(range(10 if task == "conflict" else 6))
            assert all(len(b.docs) <= 4 and b.steerings[0] == "baseline" for b in batches)
        assert [b.id for b in plan.batches] == list(range(len(plan.batches)))

    def test_spans_decide(self, made):
        """What needs a span is planned where the task has it, with its controls; the rest is told."""
        _, plan = made
        on = {task: next(b.steerings for b in plan.batches if b.task == task) for task in ("conflict", "memory")}
        assert on["memory"] == ("baseline", "zero", "zero neutral")
        assert {"pasta-tiny", "pasta-tiny random 3", "pasta-tiny neutral", "strength alpha=0.1"} < set(on["conflict"])
        told = {(s["steering"], s["task"]) for s in plan.skipped}
        assert told == {("zero random", "*"), ("pasta-tiny", "memory"), ("strength", "memory")}

    def test_round_trip(self, made):
        _, plan = made
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan

    def test_a_task_that_is_named_must_fit(self, tmp_path):
        for new, said in {
            "{label: zero, tasks: [memory],": "pasta needs the span group emphasis, and memory has",
            "{label: zero,": "steering 'zero' is run on no task",
        }.items():
            text = JOB.replace("{label: zero,", new).replace("{method: zerotuning, gamma: 2}", "{method: pasta}")
            text = text.replace("  - {task: conflict, limit: 10, length: 64}\n", "") if "no task" in said else text
            text = text.replace(
                "  - pasta-tiny\n  - {label: strength, recipe: pasta-tiny, sweep: {pasta.alpha: [1.0, 0.1]}}\n", ""
            )
            job = job_of(tmp_path, text)
            with pytest.raises(JobError, match=said):
                make(job, Documents(job))

    def test_a_recipe_must_fit_the_model(self, tmp_path):
        job = job_of(tmp_path, JOB.replace("[tiny]", "[tiny, {id: tiny, label: again}]"))
        other = controls.facts_of_shape("other", ModelEntry.model_validate(SHAPED).shape)
        with pytest.raises(JobError, match=r"'pasta-tiny' is made for tiny.*but other has 32.*models: "):
            planning.steerings_of(job, job.models[0], other)

    def test_heads_must_fit_the_model(self):
        """The steering is named, not a place in a recipe that does not hold them."""
        methods = [PASTA(0.1, heads="9:1")]
        job = Job.of(model={"id": "tiny"}, methods=methods, label="p", made_for=None, tasks=[{"task": "conflict"}])
        with pytest.raises(JobError, match=r"^steering 'p': .*heads: layer 9 is out of range; .* 0\.\.5$"):
            make(job, Documents(job))

    def test_documents_that_have_changed(self, made):
        job, plan = made
        documents = Documents(job)
        assert documents.checked("memory", 3, plan.digests["memory|3"])
        with pytest.raises(JobError, match="not those that this job was planned with"):
            documents.checked("memory", 3, plan.digests["memory|0"])

    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(1, 200), st.integers(1, 5)), min_size=1, max_size=60),
        st.integers(1, 9),
        st.none() | st.integers(1, 900),
        st.integers(1, 4),
    )
    def test_batches_and_shares(self, prompts, size, budget, workers):
        """Batches part the documents, hold like lengths and keep to the budget; shares part the batches."""
        lengths, rows = ([prompt[side] for prompt in prompts] for side in (0, 1))
        batches = cut(lengths, size, budget, rows)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        for batch in batches:
            tokens = max(lengths[i] for i in batch) * sum(rows[i] for i in batch)
            assert len(batch) <= size and (budget is None or len(batch) == 1 or tokens <= budget)
        assert all(min(lengths[i] for i in a) >= max(lengths[i] for i in b) for a, b in itertools.pairwise(batches))
        planned = [Batch(n, "m", "t", 0, docs, ("baseline",)) for n, docs in enumerate(batches)]
        parts = [share(planned, index, workers) for index in range(workers)]
        assert sorted((b for part in parts for b in part), key=lambda b: b.id) == planned
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def row(doc_id: int, steering: str = "baseline") -> dict:
    return {"model": "tiny", "steering": steering, "doc_id": doc_id, "text": "a\u2028b\n" * (doc_id % 3)}


class TestFolder:
    @pytest.fixture
    def job(self, tmp_path):
        return job_of(tmp_path, JOB.replace("controls: true", "controls: false"))

    @pytest.fixture
    def plan(self):
        baseline = Steering("baseline", (), "baseline")
        batches = tuple(Batch(n, "tiny", "conflict", 0, (n,), ("baseline",)) for n in range(4))
        return Plan("2026-11-26T10-00-00.000001", batches, {"tiny": (baseline,)}, (), {})

    def enter(self, path, job, plan, worker=None, resume=False):
        return Folder(path).enter(job, lambda: plan, worker or Worker(), resume=resume)

    def test_a_crash_at_any_byte(self, job, plan, tmp_path):
        """Whatever of the last write reached the disk: whole batches stay, and what is run again is appended once."""
        out = tmp_path / "out"
        with self.enter(out, job, plan) as folder:
            for batch in range(3):
                folder.append(batch, [row(batch), row(batch + 10)], 1.0)
        path = out / "work" / "worker-0-of-1.jsonl"
        content = path.read_bytes()
        ends = [0, *(end.stop for end in folder.done().values())]
        for size in sorted(
            {*range(0, len(content), 17), *ends, *(end + near for end in ends[:-1] for near in (-1, 1) if end)}
        ):
            path.write_bytes(content[:size])
            with self.enter(out, job, plan, resume=True) as folder:
                whole = [batch for batch in range(3) if ends[batch + 1] <= size]
                assert list(folder.done()) == whole and path.read_bytes() == content[: ends[len(whole)]]
                for batch in range(len(whole), 3):
                    folder.append(batch, [row(batch), row(batch + 10)], 1.0)
            assert path.read_bytes() == content
        assert [found for _, found in folder.rows(folder.done()[2])] == [row(2), row(12)]

    def test_a_full_disk(self, job, plan, tmp_path, monkeypatch):
        """A write that fails half-way leaves nothing of the batch."""
        out, write = tmp_path / "out", os.write
        with self.enter(out, job, plan) as folder:
            folder.append(0, [row(0)], 1.0)
            before = (out / "work" / "worker-0-of-1.jsonl").read_bytes()

            def full(handle, data):
                if len(data) < 60:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return write(handle, bytes(data)[:40])

            monkeypatch.setattr(os, "write", full)
            with pytest.raises(OSError, match="No space"):
                folder.append(1, [row(1)], 1.0)
            monkeypatch.undo()
            assert (out / "work" / "worker-0-of-1.jsonl").read_bytes() == before

    def test_damage_is_told(self, job, plan, tmp_path):
        out = tmp_path / "out"
        with self.enter(out, job, plan) as folder:
            folder.append(0, [row(0), row(1)], 1.0)
        path = out / "work" / "worker-0-of-1.jsonl"
        first, *rest = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(rest))
        with pytest.raises(FolderError, match="batch 0 is damaged: 2 samples were written, 1 are there"):
            folder.done()
        path.write_bytes(first[:10] + b"\n" + b"".join(rest))
        with pytest.raises(FolderError, match="line 1 is no sample"):
            folder.done()

    def test_who_may_join(self, job, plan, tmp_path):
        """Shards of one job join; the same one again only to resume it, another count only once the others are gone."""
        out = tmp_path / "out"
        with self.enter(out, job, plan, Worker(0, 2)):
            with self.enter(out, job, plan, Worker(1, 2)):
                pass
            with pytest.raises(FolderError, match="exists and is of this job; go on with it by --resume"):
                self.enter(out, job, plan, Worker(1, 2)).__enter__()
            with pytest.raises(
                FolderError, match=rf"worker 0 of 2 runs in .*process {os.getpid()} on .*can be only one"
            ):
                self.enter(out, job, plan, Worker(0, 2), resume=True).__enter__()
            with pytest.raises(FolderError, match=r"worker 0 of 2 runs in .*; 3 workers cannot join it"):
                self.enter(out, job, plan, Worker(1, 3), resume=True).__enter__()
        with self.enter(out, job, plan, Worker(1, 3), resume=True) as folder:
            folder.append(1, [row(1)], 1.0)
        assert list(folder.done()) == [1]

    def test_a_live_process_holds_it(self, job, plan, tmp_path):
        """A lock outlives nothing: it is there while its process is, and gone when that is killed."""
        out = tmp_path / "out"
        with self.enter(out, job, plan):
            pass
        code = (
            "import sys, time; from filelock import FileLock; "
            "lock = FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); time.sleep(60)"
        )
        lock = out / "work" / "worker-0-of-1.lock"
        holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE)
        try:
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(FolderError, match="worker 0 of 1 runs"):
                self.enter(out, job, plan, resume=True).__enter__()
        finally:
            holder.kill()
            holder.wait()
        with self.enter(out, job, plan, resume=True) as folder:
            assert not folder.done()

    def test_another_job(self, job, plan, tmp_path):
        """Another job's folder, or no job's, is left as it is, and the key that differs is named."""
        out = tmp_path / "out"
        with self.enter(out, job, plan) as folder:
            folder.append(0, [row(0)], 1.0)
        before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
        other = job_of(tmp_path, JOB.replace("controls: true", "controls: false").replace("gamma: 2", "gamma: 3"))
        with pytest.raises(FolderError, match=r"steerings\[2\].methods\[0\].gamma was 2.0, is 3.0"):
            self.enter(out, other, plan, resume=True).__enter__()
        assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "cat.png").write_bytes(b"x")
        with pytest.raises(FolderError, match=r"holds cat.png and no job.json"):
            self.enter(tmp_path / "photos", job, plan).__enter__()
        assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.png"]

    def test_a_folder_that_cannot_be_written(self, job, plan, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(FolderError, match=r"--output .*file/out cannot be written: Not a directory"):
            self.enter(tmp_path / "file" / "out", job, plan).__enter__()

    def test_a_plan_that_fails_writes_nothing(self, job, tmp_path):
        def fail():
            raise JobError("no such heads")

        with pytest.raises(JobError, match="no such heads"):
            Folder(tmp_path / "a" / "b").enter(job, fail, Worker(), resume=False).__enter__()
        assert not (tmp_path / "a").exists()


class TestWorkers:
    @pytest.mark.parametrize(
        ("shard", "environment", "expected"),
        [
            (None, {}, Worker(0, 1)),
            ("2/3", {}, Worker(2, 3)),
            (None, {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Worker(1, 4, 1)),
            ("1/2", {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, Worker(7, 8, 0)),
        ],
    )
    def test_of(self, shard, environment, expected):
        assert Worker.of(shard, environment) == expected

    @pytest.mark.parametrize("shard", ["3/3", "1", "a/b", "-1/3", "1/0"])
    def test_wrong_shards(self, shard):
        with pytest.raises(JobError, match="is not i/n with i from 0 to n-1"):
            Worker.of(shard, {})

    def test_placing(self):
        """A process takes its own GPU, or its own group of them, or what the user says; never another's."""
        plain, grouped = ModelEntry(id="tiny"), ModelEntry(id="tiny", gpus_per_replica=2, args={"use_cache": True})
        free = [80, 70, 60, 50]
        assert place(plain, Worker(), None, free) == (None, None, {})
        assert place(plain, Worker(5, 8, 1), None, free) == ("cuda:1", None, {})
        assert place(plain, Worker(5, 8, 1), None, []) == (None, None, {})
        assert place(plain, Worker(5, 8, 1), "cpu", free) == ("cpu", None, {})
        placed = place(grouped, Worker(1, 2, 1), None, free)
        assert placed == (None, "auto", {"use_cache": True, "max_memory": {2: 54, 3: 45}})
        assert replica_memory(0, 4, free) == {0: 72, 1: 63, 2: 54, 3: 45}
        with pytest.raises(JobError, match=r"needs GPUs 4 to 5 .*there are 4: start at most 2"):
            replica_memory(2, 2, free)
        with pytest.raises(JobError, match="process 4 of this machine has no GPU; there are 4"):
            place(plain, Worker(4, 8, 4), None, free)
        with pytest.raises(JobError, match="say how many each copy gets: gpus_per_replica"):
            place(ModelEntry(id="tiny", device_map="auto"), Worker(0, 2, 0), None, free)


SHAPED = {
    "id": "nobody/made-up-8b",
    "dtype": "bfloat16",
    "shape": {
        "parameters": 8.03e9, "layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128, "width": 4096, "vocab": 128256,
        "positions": 131072,
    },
}  # fmt: skip


class TestCost:
    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch):
        monkeypatch.setattr("steerlens.evals.plan.hub_is_reachable", lambda: False)

    def data(self, **changed):
        tasks = [{"task": "conflict", "length": 128}, {"lm_eval": "boolq", "limit": 500, "rows": 3270, "tokens": 150}]
        steerings = [{"label": "zero", "methods": [{"method": "zerotuning", "gamma": 2}]}]
        return {"schema": 1, "name": "big", "models": [SHAPED], "steerings": steerings, "tasks": tasks} | changed

    def test_without_the_model(self, monkeypatch):
        """An 8B model that is not here: sizes from its shape, lengths as declared, by formulas that can be checked."""
        monkeypatch.setattr(Job, "_check_lm_eval", staticmethod(lambda tasks: []))
        job = Job.from_dict(self.data(limit=64, batch_size=16))
        (model,) = cost.estimate(job)["models"]
        own, other = model["tasks"]
        tokens = own["longest"]
        assert model["memory"]["weights"] == 2 * 8.03e9
        new = job.loaded["conflict"].max_new_tokens
        assert model["memory"]["cache"] == 16 * max(tokens + new, 150) * 2 * 32 * 8 * 128 * 2
        assert model["memory"]["logits"] == 16 * 128256 * 4
        assert model["memory"]["total"] == sum(model["memory"][k] for k in ("weights", "cache", "logits", "steering"))
        assert (own["documents"], own["batches"], own["steerings"]) == (64, 4, 2)
        assert own["new_tokens"] == 64 * new * 2 and own["forwards"] == 4 * new * 2
        assert own["flops"] > 2 * 8.03e9 * (own["prompt_tokens"] + own["new_tokens"])
        # what lm-eval lets a model generate is not known: never counted as none
        assert other["new_tokens"] is None and cost.estimate(job)["total"]["without_new_tokens"] == ["boolq"]
        assert (other["documents"], other["prompt_tokens"], other["batches"]) == (500, 500 * 150 * 2, 2 * 0 + 32)
        assert any("the job's shape" in line for line in model["declared"])
        assert any("declared by the job" in line for line in other["declared"]) and own["declared"]

    def test_unknown_figures_are_not_made_up(self, monkeypatch):
        monkeypatch.setattr(Job, "_check_lm_eval", staticmethod(lambda tasks: []))
        found = cost.estimate(Job.from_dict(self.data(tasks=[{"lm_eval": "boolq"}])))
        (task,) = found["models"][0]["tasks"]
        assert task["flops"] is task["batches"] is None and found["total"]["without"] == ["boolq"]
        assert task["declared"] == [
            "documents and prompt tokens: unknown; the task declares none; give rows and tokens in its job entry"
        ]

    def test_a_steering_that_is_run_nowhere(self):
        """A dry run refuses what a run refuses."""
        pasta = {"label": "p", "methods": [{"method": "pasta", "alpha": 0.1, "heads": {"0": [1]}}]}
        with pytest.raises(JobError, match="steering 'p' is run on no task: pasta needs the span group emphasis"):
            cost.estimate(Job.from_dict(self.data(tasks=["memory"], steerings=[pasta])))

    def test_nothing_known(self):
        with pytest.raises(models.ModelLoadError, match="give its 'shape' in the job for a dry run"):
            cost.estimate(Job.from_dict(self.data(models=["nobody/made-up-8b"], tasks=["conflict"])))

    def test_measured(self, tmp_path):
        """Of a model that is here, parameters, heads and lengths are the model's own; a wrong shape is told."""
        known = know(ModelEntry(id="tiny"))
        model, tokenizer = models.load("tiny")
        assert known.shape.parameters == sum(p.numel() for p in model.parameters()) and known.declared is None
        assert (known.facts.layers, known.facts.heads) == (6, (8,) * 6)
        job = job_of(tmp_path, JOB)
        (found,) = cost.estimate(job)["models"]
        prompts = [str(doc.example.prompt) for seed in (0, 3) for doc in job.loaded["conflict"].docs(10, seed)]
        tokens = sum(len(ids) for ids in tokenizer(prompts)["input_ids"])
        task = found["tasks"][0]
        assert task["prompt_tokens"] == tokens * task["steerings"] and not task["declared"]
        assert task["batches"] == sum(b.task == "conflict" for b in make(job, Documents(job)).batches)
        shape = known.shape.model_dump() | {"layers": 5}
        with pytest.raises(JobError, match=r"shape.layers is 5 in the job, 6 in the model's config"):
            know(ModelEntry(id="tiny", shape=shape))


class TestCache:
    def doc(self, n: int) -> Doc:
        return Doc("t", 0, n, Example(f"prompt {n}", "a"))

    def test_same_outcome_again(self, tmp_path, tmp_path_factory):
        """Outputs come back as they were, NaN included; errors are not kept; every part of the key counts."""
        from types import SimpleNamespace

        def task(**changed):
            base = {"fingerprint": "f", "output": "generate", "max_new_tokens": 4, "stop": (), "chat": False}
            return SimpleNamespace(**base | changed)

        cache = Cache(tmp_path, {"model": "m"})
        plain, steered = Steering("baseline"), Steering("z", (ZeroTuning(2.0),))
        key = cache.key(task(), self.doc(0), plain, 0)
        others = [
            cache.key(task(max_new_tokens=5), self.doc(0), plain, 0),
            cache.key(task(fingerprint="g"), self.doc(0), plain, 0),
            cache.key(task(), self.doc(1), plain, 0),
            cache.key(task(), self.doc(0), steered, 0),
            cache.key(task(), self.doc(0), plain, 1),
            Cache(tmp_path, {"model": "n"}).key(task(), self.doc(0), plain, 0),
        ]
        assert len({key, *others}) == 7
        assert key == cache.key(task(), self.doc(0), Steering("another label"), 0)
        output = Output(("a\ud800",), (-0.1, -1e-7), (1, 2), (True, False), float("nan"))
        cache.put({key: Outcome(output), others[0]: Outcome(error="broken")})
        found = cache.get([key, *others])
        assert list(found) == [key] and repr(found[key].output) == repr(output)

    def test_many_at_once(self, tmp_path):
        def work(index: int) -> None:
            cache = Cache(tmp_path, {})
            for n in range(8):
                cache.put({f"{n}": Outcome(Output((f"{n}",))), f"{index}-{n}": Outcome(Output((f"{index}",)))})
            cache.close()

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = Cache(tmp_path, {}).get([*map(str, range(8)), *(f"{i}-{n}" for i in range(4) for n in range(8))])
        assert len(found) == 40


class TestEstimates:
    def test_against_statsmodels(self):
        """Wilson's and Student's intervals."""
        proportion = pytest.importorskip("statsmodels.stats.proportion")
        weight = pytest.importorskip("statsmodels.stats.weightstats")
        hits = [1.0] * 37 + [0.0] * 13
        value, error, interval = estimate(hits, np.mean)
        assert value == 0.74 and math.isclose(error, np.std(hits, ddof=1) / 50**0.5)
        assert interval == pytest.approx(proportion.proportion_confint(37, 50, method="wilson"), abs=1e-9)
        draws = random.Random(0)
        scores = [draws.random() for _ in range(40)]
        assert estimate(scores, np.mean)[2] == pytest.approx(weight.DescrStatsW(scores).tconfint_mean(), abs=1e-9)

    def test_seeds_of_lm_eval(self):
        """Its runs with several seeds are one figure: the mean, and all their samples."""
        parts = [{"t": {"alias": "t", "sample_len": 4, "acc,none": value}} for value in (0.0, 0.5)]
        assert _over_seeds("results", parts) == {"t": {"alias": "t", "sample_len": 8, "acc,none": 0.25}}
        counts = [{"t": {"original": 9, "effective": 4}}] * 2
        assert _over_seeds("n-samples", counts) == {"t": {"original": 18, "effective": 8}}
        assert _over_seeds("versions", [{"t": 1.0}, {"t": 1.0}]) == {"t": 1.0}
        assert parts[1]["t"]["acc,none"] == 0.5

    def test_one_document_leaves_an_error_open(self):
        """As lm-eval has it; NaN would be no JSON."""
        samples = _Samples(values={"follows": [1.0]}, known={("tiny", "baseline", "conflict", 0, 0)})
        (found,) = _task("conflict", load("conflict"), samples)["results"].values()
        assert found["follows,none"] == 1.0 and found["follows_stderr,none"] == "N/A"
        json.dumps(found, allow_nan=False)

    def test_other_aggregates(self):
        """What is no mean is resampled: the interval of a median holds it and is about as wide as theory says."""
        values = np.random.default_rng(1).normal(size=400)
        median, error, (low, high) = estimate(list(values), np.median)
        assert low < median < high and error == pytest.approx(math.sqrt(math.pi / 2 / 400), rel=0.35)
