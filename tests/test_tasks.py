"""Tasks: the generated world's documents, documents from tables, and what their files' errors say."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steerlens.evals import sources, task
from steerlens.evals.doc import Output
from steerlens.evals.task import TaskError, load
from steerlens.evals.world.facts import Fact, split_of
from steerlens.evals.world.tasks import INSTRUCTIONS, follows
from steerlens.evals.world.vocabulary import ATTRIBUTES
from transformers import AutoTokenizer

import steerlens

STATEMENT = re.compile(rf"The ({'|'.join([*ATTRIBUTES, 'capital', 'river'])}) of ([A-Za-z ]+?) is (\w+)\.")
WORLD = [name for name in task.names() if "world" in load(name).config["data"]]
GRIDS = ["needle", "kv_retrieval", "multidoc", "drift"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(steerlens.__file__).parent / "tiny")


def contents(doc):
    prompt = doc.example.prompt
    return [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]


def text_of(doc):
    return "\n".join([*contents(doc), *doc.turns])


@pytest.mark.parametrize("name", WORLD)
class TestWorld:
    def test_documents_are_distinct_and_a_function_of_the_seed(self, name):
        docs = load(name).docs(60, 0)
        assert docs == load(name).docs(60, 0)
        assert load(name).docs(25, 0) == docs[:25]
        assert [doc.doc_id for doc in docs] == list(range(60))
        assert len({text_of(doc) for doc in docs}) == len({doc.doc_hash for doc in docs}) == 60
        assert not {text_of(doc) for doc in docs} & {text_of(doc) for doc in load(name).docs(60, 1)}

    @pytest.mark.parametrize("chat", [False, True])
    def test_spans_are_what_they_name(self, name, chat, tokenizer):
        loaded = load(name)
        for doc in loaded.docs(20, 0):
            example = doc.example
            assert set(example.groups) == loaded.groups
            inputs, spans = steerlens.encode(tokenizer, [example.prompt], groups=example.groups, chat=chat)
            assert chat or inputs["input_ids"].shape[1] <= 512
            (found,) = spans.preview(tokenizer, inputs["input_ids"])
            shown = {group: [text.strip() for text in texts] for group, texts in found.items()}
            for group, selectors in example.groups.items():
                if loaded.chat and group == "emphasis":
                    assert shown[group] == [example.prompt[0]["content"]]
                else:
                    assert shown[group] == [getattr(one, "text", one) for one in selectors]
            if "query" in shown:
                assert len(shown["query"]) == 1 and shown["query"][0] in contents(doc)[-1]
                assert not any("Question:" in text or "Answer:" in text for text in shown["context"])
            if "gold" in shown and name != "classify":
                said = {example.answer, *example.alternatives}
                assert any(f" {value}." in gold for value in said for gold in shown["gold"])

    def test_no_statement_is_one_that_training_has(self, name):
        facts = [Fact(*found) for doc in load(name).docs(60, 0) for found in STATEMENT.findall(text_of(doc))]
        assert name == "classify" or len(facts) > 50
        assert {split_of(fact.key) for fact in facts} <= {"eval"}

    def test_the_answer_is_worth_1_and_silence_0(self, name):
        loaded = load(name)
        for doc in loaded.docs(20, 0):
            if loaded.output == "choices":
                assert doc.choices[doc.target] == doc.example.answer and len(set(doc.choices)) == len(doc.choices)
                scores = [float(i == doc.target) - 5 for i in range(len(doc.choices))]
                assert loaded.score(doc, Output(logprobs=tuple(scores)))["acc"] == 1
                assert loaded.score(doc, Output(logprobs=tuple(-s for s in scores)))["acc"] == 0
                continue
            answers = doc.data.get("answers", [doc.example.answer])
            found = loaded.score(doc, Output(tuple(answers)))
            assert set(found) == set(loaded.metrics)
            assert all(value == loaded.higher_is_better[metric] for metric, value in found.items())
            assert set(loaded.score(doc, Output(("",) * len(answers))).values()) == {0.0}
            if doc.example.alternatives:
                wrong = loaded.score(doc, Output((doc.example.alternatives[0],)))
                assert wrong["follows"] == 0 and wrong.get("alternative", 1) == 1


@pytest.mark.parametrize("name", sorted({*WORLD} - {"memory", "classify", "drift", "system_constraint"}))
def test_what_is_emphasised_is_the_one_statement_that_answers(name):
    for doc in load(name).docs(40, 0):
        asked = re.findall(r"What is the (\w+) of ([A-Za-z ]+?)\?", doc.example.prompt)[-1]
        (emphasis,) = doc.example.groups["emphasis"]
        if name in INSTRUCTIONS:
            assert emphasis.text == INSTRUCTIONS[name]
        else:
            assert emphasis.text == Fact(*asked, doc.example.answer).statement
        told = [fact for fact in STATEMENT.findall(doc.example.prompt) if fact[:2] == asked]
        assert len(told) == (2 if "conflict" in name else 1)


def test_the_example_in_the_readme(tmp_path):
    readme = (Path(task.__file__).parent / "tasks" / "README.md").read_text()
    (tmp_path / "own.yaml").write_text(re.search(r"```yaml\n(.*?)```", readme, re.DOTALL)[1])
    rows = [{"text": f"{i}", "label": i % 2, "language": "en", "length": 9, "right": [1, 0]} for i in range(9)]
    (tmp_path / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(load(tmp_path / "own.yaml").docs(None, 0)) == 9


class TestGrids:
    @pytest.mark.parametrize("name", GRIDS)
    def test_places_are_filled_evenly_and_in_turn(self, name):
        loaded = load(name)
        places = [tuple(cell.items()) for cell in loaded.data.generator.cells]
        docs = loaded.docs(3 * len(places) + 2, 0)
        counts = Counter(tuple(doc.cell.items()) for doc in docs)
        assert set(counts) == set(places) and len(places) == len(set(places))
        assert sorted(counts.values()) == [3] * (len(places) - 2) + [4] * 2

    def test_a_needle_is_at_its_depth(self):
        for doc in load("needle", length=256).docs(25, 0):
            context, needle = (doc.example.groups[group][0].text for group in ("context", "gold"))
            sentences = re.findall(r"[^.]+\.", context)
            at = [sentence.strip() for sentence in sentences].index(needle)
            assert at == round(doc.cell["depth"] * (len(sentences) - 1))
            assert doc.cell["length"] == 256

    def test_lengths_are_reached(self, tokenizer):
        for doc in load("needle").docs(20, 0):
            length = len(tokenizer(doc.example.prompt)["input_ids"])
            assert doc.cell["length"] - 16 < length <= doc.cell["length"]

    def test_a_pair_is_at_its_position(self):
        for doc in load("kv_retrieval").docs(20, 0):
            told = [Fact(*found) for found in STATEMENT.findall(doc.example.prompt)]
            assert len(told) == doc.cell["pairs"] == len({fact.subject for fact in told})
            asked = told[round(doc.cell["position"] * (len(told) - 1))]
            assert asked.value == doc.example.answer and asked.question in doc.example.prompt

    def test_the_gold_document_is_at_its_position(self):
        for doc in load("multidoc").docs(15, 0):
            groups = {name: [one.text for one in found] for name, found in doc.example.groups.items()}
            at = round(doc.cell["position"] * (doc.cell["documents"] - 1))
            assert len(groups["documents"]) == doc.cell["documents"]
            assert groups["gold"] == [groups["documents"][at]] and groups["emphasis"][0] in groups["gold"][0]
            assert " ".join(groups["documents"]) == groups["context"][0]
            assert all(text.count(".") >= 2 for text in groups["documents"])

    def test_the_assistant_of_drift_has_stopped_obeying(self):
        for doc in load("drift").docs(8, 0):
            given = [message for message in doc.example.prompt if message["role"] == "assistant"]
            assert len(given) == doc.cell["turn"] - 1
            assert not any(message["content"].isupper() for message in given) and doc.example.answer.isupper()


def test_a_document_stays_as_it_was():
    (doc,) = load("kv_retrieval", pairs=2, position=1).docs(1, 0)
    assert doc.example.prompt == (
        "The code of the harbor bakery is 0810. The code of the market depot is 7718. "
        "Question: What is the code of the market depot? Answer:"
    )
    assert (doc.example.answer, doc.cell) == ("7718", {"pairs": 2, "position": 1.0})


def test_choices_are_of_one_kind_and_stand_in_the_prompt_where_they_can():
    pools = [set(pool) for pool in ATTRIBUTES.values() if pool]
    for doc in load("multiple_choice", length=512).docs(40, 0):
        kinds = [pool for pool in pools if set(doc.choices) <= pool]
        assert len(doc.choices) == 4 and (kinds or all(re.fullmatch(r"\d{4}", c) for c in doc.choices))
    assert {doc.target for doc in load("multiple_choice").docs(40, 0)} == {0, 1, 2, 3}
    for doc in load("conflict_choice").docs(20, 0):
        assert set(doc.example.alternatives) < set(doc.choices)


def test_turns_have_contexts_of_their_own():
    for doc in load("system_constraint").docs(10, 0):
        users = [doc.example.prompt[1]["content"], *doc.turns]
        assert len(users) == len(doc.data["answers"]) == 4
        for user, answer in zip(users, doc.data["answers"], strict=True):
            assert any(f"is {value}." in user for value in json.loads(answer).values())
        assert doc.turns[0].startswith("You may answer in capital letters. ")
    (bare,) = load("system_constraint", distraction=None, instruction="capitals", turns=1).docs(1, 0)
    assert bare.turns == () and bare.example.answer.isupper()


def written(folder, text, **files):
    for name, rows in files.items():
        lines = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    path = folder / "own.yaml"
    path.write_text(textwrap.dedent(text))
    return path


REVIEWS = [
    {"text": f"film {i} was {'good' if i % 2 else 'bad'}", "label": i % 2, "kind": "film" if i % 3 else "book", "n": i}
    for i in range(30)
]
OWN = """\
    schema: 1
    task: own
    summary: Whether a review is good.
    data: {file: rows.jsonl, rows: 30}
    columns: [text, label]
    map: {label: {0: negative, 1: positive}}
    where: {kind: film}
    shots: {count: 4, prompt: "{{ text }} -> {{ label }}", separator: "; ", balanced: true}
    prompt: "{{ shots }}; {{ text }} ->"
    answer: "{{ label }}"
    choices: [negative, positive]
    alternatives: '{{ ["negative", "positive"] | tojson }}'
    spans: {demos: "{{ demos | tojson }}", emphasis: ["{{ text }}"], query: {text: "{{ text }} ->", occurrence: last}}
    cell: {n: "{{ n }}"}
    output: choices
    metrics: [acc, logprob]
    """


class TestTables:
    def test_a_file_of_ones_own(self, tmp_path, tokenizer):
        loaded = load(written(tmp_path, OWN, rows=REVIEWS))
        assert (loaded.offline, loaded.expected, loaded.shots) == (True, (30, None), 4)
        docs = loaded.docs(None, 0)
        assert len(docs) == 20 and docs[:5] == loaded.docs(5, 0)
        assert [doc.data["n"] for doc in docs] != [doc.data["n"] for doc in loaded.docs(None, 1)]
        for doc in docs:
            label = "positive" if doc.data["n"] % 2 else "negative"
            *shown, asked = doc.example.prompt.split("; ")
            assert asked == f"{doc.data['text']} ->" and doc.cell == {"n": doc.data["n"]}
            assert doc.data["text"] not in " ".join(shown)
            assert Counter(one.split(" -> ")[1] for one in shown) == {"negative": 2, "positive": 2}
            assert (doc.example.answer, doc.choices[doc.target]) == (label, label)
            assert doc.example.alternatives == tuple({"negative", "positive"} - {label})
            assert doc.example.groups["demos"] == tuple(shown)
            _, spans = steerlens.encode(tokenizer, [doc.example.prompt], groups=doc.example.groups)
            assert {group: len(rows[0]) for group, rows in spans.groups.items()} == {
                "demos": 4, "emphasis": 1, "query": 1
            }  # fmt: skip

    def test_a_dataset_in_a_folder_with_splits(self, tmp_path):
        data = tmp_path / "data"
        data.mkdir()
        written(data, "", train=[{"q": f"t{i}", "a": "x"} for i in range(5)], test=[{"q": "t0", "a": "y"}])
        text = f"""\
            schema: 1
            task: own
            data: {{hub: {data}, split: test, shots_split: train}}
            shots: {{count: 5, prompt: "{{{{ q }}}}{{{{ a }}}}", separator: " "}}
            messages: [{{role: user, content: "{{{{ shots }}}} {{{{ q }}}}"}}]
            answer: "{{{{ a }}}}"
            metrics: [exact]
            """
        loaded = load(written(tmp_path, text))
        (doc,) = loaded.docs(None, 0)
        assert loaded.chat and not loaded.offline
        assert sorted(doc.example.prompt[0]["content"].split()) == ["t0", "t0x", "t1x", "t2x", "t3x", "t4x"]
        with pytest.raises(TaskError, match=r"dev.*train.*test|dev.*test.*train") as error:
            load(written(tmp_path, text), split="dev").docs(1, 0)
        assert error.value.exit_code == 2

    def test_a_dataset_that_is_not_there_is_a_failed_run(self, tmp_path, monkeypatch):
        import datasets
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        text = OWN.replace("file: rows.jsonl", "hub: nobody/nothing")
        with pytest.raises(task.TaskFetchError, match="dataset 'nobody/nothing' cannot be loaded: ") as error:
            load(written(tmp_path, text)).docs(1, 0)
        assert error.value.exit_code == 1

    def test_without_the_extra(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        assert len(load("needle").docs(3, 0)) == 3
        loaded = load(written(tmp_path, OWN, rows=REVIEWS))
        with pytest.raises(TaskError, match=r"datasets is not installed.*pip install 'steerlens\[eval\]'"):
            loaded.docs(1, 0)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (("columns: [text,", "columns: [txt,"), r"rows.jsonl has no column 'txt'; it has text, label, kind, n; "),
            (("where: {kind", "where: {knd"), r"rows.jsonl has no column 'knd'; .* did you mean 'kind'"),
            (("where: {kind: film", "where: {kind: play"), r"no row of .*rows.jsonl fits where: {'kind': 'play'}"),
            (("; {{ text }} ->\"", "; {{ txet }} ->\""), r"rows.jsonl:\d+: template '.*': 'txet' is undefined; there"),
            (("1: positive", "2: positive"), r"map has no entry for 'label' 1; it has 0, 2"),
            (("choices: [neg", "choices: [nag"), r"rows.jsonl:\d+: the answer 'negative' must be one of at least two"),
            (("emphasis: [\"", "emphasis: [\"a "), r"rows.jsonl:\d+: span 'emphasis': the text 'a film .* is not in"),
            (("count: 4", "count: 20"), r"20 shots are asked for, there are 19 rows for them"),
            (("{{ shots }}; {{ text }} ->", "{{ text ** 9 }}"), r"\*\* is allowed in templates only to multiply"),
            (("{{ shots }}; {{ text }} ->", "{{ n / 0 }}"), r"ZeroDivisionError"),
            (("{{ shots }}; {{ text }} ->", "{{ ' ' }}"), r"the prompt is empty"),
        ],
    )  # fmt: skip
    def test_data_that_do_not_fit(self, change, said, tmp_path):
        assert change[0] in OWN
        with pytest.raises(TaskError, match=said) as error:
            load(written(tmp_path, OWN.replace(*change), rows=REVIEWS)).docs(None, 0)
        assert "task 'own'" in str(error.value) and error.value.exit_code == 2 and "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ({"label": 1, "kind": "film"}, r"rows.jsonl:31: column 'text' holds nothing; give the row a value"),
            ({"text": "a", "label": 9, "kind": "film"}, r"rows.jsonl:31: map has no entry for 'label' 9"),
            (
                {"text": "a", "label": 1, "kind": "film"},
                r"rows.jsonl:31: template '.*n }}': it puts in nothing \(null\)",
            ),
        ],
    )
    def test_a_row_that_does_not_fit(self, row, said, tmp_path):
        rows = [*REVIEWS, row]
        with pytest.raises(TaskError, match=said) as error:
            load(written(tmp_path, OWN, rows=rows)).docs(None, 0)
        assert "task 'own'" in str(error.value)
        assert len(load(written(tmp_path, OWN, rows=[*REVIEWS, {**row, "kind": "book"}])).docs(None, 0)) == 20

    def test_a_list_is_no_text(self, tmp_path):
        rows = [{"text": ["a", "b"], "label": 1, "kind": "film", "n": 1}] * 9
        text = OWN.replace('prompt: "{{ shots }}; {{ text }} ->"', 'prompt: "{{ text }}"').replace(
            'prompt: "{{ text }} -> {{ label }}"', 'prompt: "{{ text[0] }}"'
        )
        with pytest.raises(TaskError, match=r"it puts in \['a', 'b'\], which is no text; pick a part, or write"):
            load(written(tmp_path, text.replace("count: 4", "count: 1"), rows=rows)).docs(None, 0)

    def test_an_answer_is_one_choice(self, tmp_path):
        with pytest.raises(TaskError, match=r"'negative' is there twice among the choices"):
            text = OWN.replace("[negative, positive]", "[negative, positive, negative]")
            load(written(tmp_path, text, rows=REVIEWS)).docs(None, 0)

    def test_demonstrations_that_do_not_fit_are_named(self, tmp_path):
        text = OWN.replace("{file: rows.jsonl", "{file: rows.jsonl, shots_file: other.jsonl")
        with pytest.raises(TaskError, match=r"other.jsonl has no column 'text'"):
            load(written(tmp_path, text, rows=REVIEWS, other=[{"label": 1}])).docs(None, 0)
        with pytest.raises(TaskError, match=r"other.jsonl:1: map has no entry for 'label' 7"):
            load(written(tmp_path, text, rows=REVIEWS, other=[{**REVIEWS[1], "label": 7}])).docs(None, 0)

    def test_a_file_in_another_encoding(self, tmp_path):
        path = written(tmp_path, OWN, rows=REVIEWS)
        (tmp_path / "rows.jsonl").write_bytes('{"text": "caf\xe9", "label": 1, "kind": "film"}\n'.encode("latin-1"))
        with pytest.raises(TaskError, match=r"rows.jsonl is not UTF-8 .*save it as UTF-8"):
            load(path).docs(None, 0)

    @pytest.mark.parametrize(
        ("rows", "said"),
        [
            ([], "rows.jsonl holds no document"),
            ([" \n\n"], "rows.jsonl holds no document"),
            (['{"text": "a"}\n{"text": \n'], r"rows.jsonl:2: not JSON: "),
            (["no json\n"], r"rows.jsonl:1: not JSON: "),
        ],
    )
    def test_files_that_hold_no_documents(self, rows, said, tmp_path):
        with pytest.raises(TaskError, match=said) as error:
            load(written(tmp_path, OWN, rows=rows)).docs(None, 0)
        assert len(str(error.value)) < 1000

    def test_no_such_file(self, tmp_path):
        with pytest.raises(TaskError, match=r"rows.jsonl cannot be read: No such file"):
            load(written(tmp_path, OWN)).docs(None, 0)


class TestFiles:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (("schema: 1", "schema: 2"), "own.yaml:1: schema: 2: input should be 1"),
            (("summary:", "sumary:"), "own.yaml:3: sumary: unknown key; allowed: schema, task, .*mean 'summary'"),
            (("count: 4", "cuont: 4"), "own.yaml:8: shots.cuont: unknown key; allowed: count, prompt, .*mean 'count'"),
            (("[acc, ", "[ac, "), "own.yaml:16: metrics.0.: unknown metric 'ac'; known: .*did you mean 'acc'"),
            (("[acc, ", "[{metric: acc, k: 1}, "), "metric 'acc' has no argument 'k'; it takes none"),
            (("[acc, ", "[acc, acc, "), "own.yaml:16: metrics: acc, acc, logprob: a metric is there twice"),
            (("[acc, ", "[follows, "), "own.yaml:16: metrics: 'follows' is for output: generate, this"),
            (("{file: rows.jsonl, rows: 30}", "{}"), "own.yaml:4: data: needs exactly one of .*, not none"),
            (("rows: 30", "hub: a"), "own.yaml:4: data: needs exactly one of .*, not hub and file"),
            (("rows: 30", "rwos: 30"), "own.yaml:4: rwos: unknown key; allowed: file, rows, .*did you mean 'rows'"),
            (("{file: rows.jsonl", "{world: nedle"), "own.yaml:4: data.world: 'nedle' is no generator; .*'needle'"),
            (("{file: rows.jsonl", "{world: needle"), "own.yaml:.*: the world's generator makes whole documents"),
            (("\"{{ shots }}; ", "\"{{ shots "), "own.yaml:9: prompt: .* is no template: expected token .* line 1"),
            (("\"{{ shots }}; ", "\"{{ shots | tojsn }}; "), "own.yaml:9: prompt: .*No filter named 'tojsn'"),
            (("    prompt: \"{{ sh", "    answr: \"{{ sh"), "own.yaml:9: answr: unknown key"),
            (("choices: [negative, positive]", "turns: [a]"), "choices: go with output: choices"),
            (("occurrence: last", "occurrence: lst"), "spans.query: occurrence 'lst'; allowed: all, first, last"),
        ],
    )  # fmt: skip
    def test_an_error_names_the_line_and_the_nearest(self, change, said, tmp_path):
        assert change[0] in OWN
        path = written(tmp_path, OWN.replace(*change), rows=REVIEWS)
        with pytest.raises(TaskError, match=said) as error:
            load(path)
        assert error.value.exit_code == 2

    def test_names(self):
        with pytest.raises(TaskError, match=r"'neddle' is neither a file nor a shipped task; .*did you mean 'needle'"):
            load("neddle")

    def test_no_constant_is_computed_when_a_file_is_read(self, tmp_path):
        for costly in ("9 ** 9 ** 9 ** 9", "'a' * 10 ** 12", "'%999999999999d' % 1", "'a' | center(999999999999)"):
            start = time.perf_counter()
            load(written(tmp_path, OWN.replace("{{ shots }}", f"{{{{ {costly} }}}}{{% set x = {costly} %}}")))
            assert time.perf_counter() - start < 5

    def test_overrides(self, tmp_path, monkeypatch):
        needle = load("needle")
        short = load("needle", length=[64], rows=7)
        assert {doc.cell["length"] for doc in short.docs(None, 0)} == {64} and len(short.docs(None, 0)) == 7
        assert short.config["data"] == {**needle.config["data"], "length": [64], "rows": 7}
        assert len({needle.fingerprint, short.fingerprint, load("needle", depth=0).fingerprint}) == 3
        assert needle.fingerprint == load("needle").fingerprint
        with pytest.raises(TaskError, match=r"unknown parameter 'lenght'; .*did you mean 'length'"):
            load("needle", lenght=3)
        with pytest.raises(TaskError, match=r"length\[1\]: 3000: input should be less than or equal to 512"):
            load("needle", length=[64, 3000])
        with pytest.raises(TaskError, match=r"needle.yaml: depth: \[0.5, 0.5\]: a value is there twice"):
            load("needle", depth=[0.5, 0.5])
        with pytest.raises(TaskError, match=r"40 documents of 32 tokens .* at most 512 are allowed"):
            load("multidoc", documents=40)
        path = written(tmp_path, OWN, other=REVIEWS[:9])
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert len(load(path, file="../other.jsonl").docs(None, 0)) == 6

    @pytest.mark.parametrize(("limit", "seed"), [(0, 0), (-1, 0), (10**9, 0), (1, -1), (1, 1000)])
    def test_limits_and_seeds(self, limit, seed):
        with pytest.raises(TaskError, match=r"task 'needle': (limit|seed) -?\d+; allowed"):
            load("needle").docs(limit, seed)

    def test_too_few_prompts_are_an_error(self, monkeypatch):
        monkeypatch.setattr(sources, "SEED_STEP", 40)
        with pytest.raises(TaskError, match="'needle' has fewer than 41 distinct prompts"):
            load("needle", length=32).docs(41, 0)

    def test_the_fingerprint_is_of_what_shapes_the_documents(self, tmp_path):
        prints = [load(written(tmp_path, OWN, rows=REVIEWS)).fingerprint]
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        same = OWN.replace("Whether a", "If a").replace("rows.jsonl", "same.jsonl")
        assert load(written(elsewhere, same, same=REVIEWS)).fingerprint == prints[0]
        for text, rows in [
            (OWN.replace("->", "=>"), REVIEWS),
            (OWN.replace("[acc, ", "[acc_norm, "), REVIEWS),
            (OWN.replace("where: {kind: film}", "where: {kind: book}"), REVIEWS),
            (OWN, REVIEWS[:-1]),
        ]:
            prints.append(load(written(tmp_path, text, rows=rows)).fingerprint)
        assert len(set(prints)) == 5


PLAIN = yaml.safe_load(textwrap.dedent(OWN))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["{{ text }}", "{{", "{% for %}", "{{ x | y }}", "needle", "acc", "world"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5) | st.integers(0, 2), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def places(value, path=()):
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


@st.composite
def mutated(draw):
    whole = copy.deepcopy(PLAIN)
    if draw(st.booleans()):
        whole = {key: whole[key] for key in ("schema", "task")} | {"data": {"world": "needle"}, "metrics": ["follows"]}
    data = {"x": whole}
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from([path for path in places(data) if path]))
        holder = data
        for key in parents:
            holder = holder[key]
        if draw(st.booleans()) or len(parents) == 0:
            holder[last] = draw(VALUES)
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=6))] = holder.pop(last)
        else:
            del holder[last]
    return yaml.safe_dump(data["x"], allow_unicode=True).encode("utf-8", "surrogatepass")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutated() | st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
def test_malformed_files_give_only_clean_errors(tmp_path, content):
    path = tmp_path / "own.yaml"
    path.write_bytes(content)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in REVIEWS))
    try:
        assert load(path).fingerprint
    except TaskError as error:
        assert "own.yaml" in str(error) and len(str(error)) < 25_000
        assert str(error).replace("\n", "").isprintable()


def test_listing_is_light():
    code = (
        "import sys, json; from steerlens.cli import listing; found = listing.tasks();"
        "print(json.dumps([found, [m for m in ('torch', 'datasets', 'lm_eval') if m in sys.modules]]))"
    )
    found, heavy = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert heavy == [] and [one["name"] for one in found] == task.names()
    (multidoc,) = [one for one in found if one["name"] == "multidoc"]
    assert multidoc["metrics"] == ["follows"] and multidoc["offline"] is True
    assert multidoc["groups"] == ["context", "documents", "emphasis", "gold", "query"]
    assert multidoc["data"].startswith("world multidoc (documents: [5, 10, 15], ")


def test_tiny_answers_from_the_prompts(tokenizer):
    from steerlens import models

    model, _ = models.load("tiny")
    for name in ("multidoc", "extraction"):
        docs = load(name).docs(10, 0)
        inputs, _ = steerlens.encode(tokenizer, [doc.example.prompt for doc in docs])
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert sum(follows(text, doc.example.answer) for text, doc in zip(texts, docs, strict=True)) >= 6
