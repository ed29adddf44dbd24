"""Tasks on real datasets: on rows like theirs, prompts, spans and answers come out as meant."""

import json
from importlib import resources
from pathlib import Path

import pytest
import yaml
from steerlens.evals import metrics, task
from steerlens.evals.doc import Output

TASKS = resources.files("steerlens.evals.tasks")
FILES = {path.name.removesuffix(".yaml"): path for path in TASKS.iterdir() if path.name.endswith(".yaml")}
HUB = {name for name, path in FILES.items() if "world" not in yaml.safe_load(path.read_text())["data"]}

KEYS = [f"{i:08x}-0000-4000-8000-000000000000" for i in range(6)]
PASSAGES = [
    {"id": str(i), "title": f"Title {i}", "text": f"Passage {i} of the lot.", "score": "1.0", "hasanswer": i == 2}
    for i in range(4)
]
REWRITE = {
    "prompt": "The mother tongue of {} is",
    "relation_id": "P103",
    "subject": "Danielle Darrieux",
    "target_new": {"id": "Q1860", "str": "English"},
    "target_true": {"id": "Q150", "str": "French"},
}
COUNTERFACT = {
    "case_id": 0,
    "requested_rewrite": REWRITE,
    "paraphrase_prompts": [
        "Shayna does it. Danielle Darrieux, a native",
        "Off it went.\nDanielle Darrieux spoke the language",
    ],
}
BIO = "She studied law in Lyon and Geneva . Her work on courts has won two prizes and is read by many of her peers ."


def labelled(text, label, values, **more):
    return [{text: f"A text, number {i}.", label: values[i % len(values)], **more} for i in range(8)]


# Rows with the columns of the dataset; what is emphasised in the first; what the model should say, for text tasks.
ROWS = {
    "lost_in_the_middle_kv": (
        [
            {"context": [[key, key[::-1]] for key in KEYS], "query": KEYS[i], "answers": KEYS[i][::-1], "gold_index": i}
            for i in (4, 0)
        ],
        [f'"{KEYS[4]}": "{KEYS[4][::-1]}"'],
        f'"{KEYS[4][::-1]}"',
    ),
    "lost_in_the_middle_qa": (
        [
            {
                "question": f"who wrote it, {i}",
                "answers": ["Ann Lee", "A. Lee"],
                "ctxs": [{**p, "original_retrieval_index": 0, "isgold": p["id"] == "2"} for p in PASSAGES],
                "nq_annotated_gold": {"title": "Title 2", "short_answers": ["Ann Lee"]},
            }
            for i in range(2)
        ],
        ["Passage 2 of the lot."],
        "Ann Lee",
    ),
    "nq_swap": (
        [
            {
                "question": f"who sang it, {i}",
                "org_context": f"<P> Ann Lee sang it {i} times . </P>",
                "org_answer": ["Ann Lee"],
                "sub_context": f"<P> Bob Roy sang it {i} times . </P>",
                "sub_answer": ["Bob Roy"],
            }
            for i in range(6)
        ],
        ["<P> Bob Roy sang it 0 times . </P>"],
        "Bob Roy.",
    ),
    "counterfact": ([COUNTERFACT], ["The mother tongue of Danielle Darrieux is English"], None),
    "counterfact_paraphrase": ([COUNTERFACT], ["The mother tongue of Danielle Darrieux is English"], None),
    "memotrap_quotes": (
        [
            {
                "prompt": 'Write a quote that ends in the word "heavy": Absence makes the heart grow',
                "classes": [" heavy.", " fonder."],
                "answer_index": 0,
                "round": 2,
            }
        ],
        ['Write a quote that ends in the word "heavy"'],
        None,
    ),
    "bias_in_bios": (
        [{"hard_text": BIO, "profession": 2, "gender": 1}],
        ["She studied law in Lyon and Geneva"],
        None,
    ),
    "json_format": (
        [{"hard_text": BIO, "profession": 24, "gender": 1}],
        ["Answer the occupation of this person and generate the answer as json format."],
        '{"name": "Mary", "occupation": "Software engineer"}\nNext',
    ),
    "pronoun_change": (
        [{"hard_text": BIO, "profession": 2, "gender": 1}],
        ["replace 'she' and 'he' with 'they' in the aforementioned text"],
        BIO.replace("She", "They").replace("Her", "Their").replace("her", "their"),
    ),
    "ifeval": (
        [
            {
                "key": 1000,
                "prompt": "Describe the sea without any commas. ",
                "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
                "kwargs": [{"num_words": None, "relation": None}, {"num_words": 20, "relation": "less than"}],
            }
        ],
        ["Describe the sea without any commas."],
        "The sea is wide and grey.",
    ),
    "sst2": (labelled("sentence", "label", [0, 1], idx=0), ["A text, number 0."], None),
    "ag_news": (labelled("text", "label", [0, 1, 2, 3]), ["A text, number 0."], None),
    "trec": (
        labelled("text", "label_coarse_original", ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"]),
        ["A text, number 0."],
        None,
    ),
    "subj": (labelled("text", "label", [0, 1], label_text="x"), ["A text, number 0."], None),
    "arc_challenge_letters": (
        [
            {
                "id": "a",
                "question": "What boils at 100 degrees?",
                "choices": {"text": ["iron", "water", "salt"], "label": ["A", "B", "C"]},
                "answerKey": "B",
            },
            {
                "id": "b",
                "question": "What melts?",
                "choices": {"text": ["ice", "air", "light", "sound"], "label": ["1", "2", "3", "4"]},
                "answerKey": "1",
            },
        ],
        ["Question: What boils at 100 degrees?"],
        None,
    ),
    "xsum": (
        [{"document": "A storm hit the coast.\nNo one was hurt.\n", "summary": "A storm hit.", "id": "1"}],
        ["A storm hit the coast.\nNo one was hurt."],
        "A storm hit.",
    ),
    "cnn_dailymail": (
        [{"article": "A storm hit the coast. No one was hurt.", "highlights": "A storm hit.\nNo one hurt.", "id": "1"}],
        ["A storm hit the coast. No one was hurt."],
        "A storm hit. No one hurt.",
    ),
}
PROMPTS = {
    "lost_in_the_middle_kv": (
        "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{"
        + ",\n ".join(f'"{key}": "{key[::-1]}"' for key in KEYS)
        + f'}}\n\nKey: "{KEYS[4]}"\nCorresponding value:'
    ),
    "lost_in_the_middle_qa": (
        "Write a high-quality answer for the given question using only the provided search results (some of which might"
        " be irrelevant).\n\n"
        + "\n".join(f"Document [{i + 1}](Title: Title {i}) Passage {i} of the lot." for i in range(4))
        + "\n\nQuestion: who wrote it, 0\nAnswer:"
    ),
    "counterfact": (
        "Previously The mother tongue of Danielle Darrieux is French. Currently The mother tongue of Danielle Darrieux "
        "is English. Danielle Darrieux, a native"
    ),
    "counterfact_paraphrase": (
        "Previously The mother tongue of Danielle Darrieux is French. Currently The mother tongue of Danielle Darrieux "
        "is English. Off it went.\nDanielle Darrieux spoke the language"
    ),
    "memotrap_quotes": 'Write a quote that ends in the word "heavy": Absence makes the heart grow',
    "bias_in_bios": f"{BIO}\n\nThis person has the occupation of",
    "arc_challenge_letters": "Question: What boils at 100 degrees?\nA. iron\nB. water\nC. salt\nAnswer:",
    "xsum": (
        "Summarize the following article in one sentence.\n\nArticle: A storm hit the coast.\nNo one was hurt.\n\n"
        "Summary:"
    ),
}


def on_rows(tmp_path, name, rows):
    """The task as shipped, on rows of ours in place of the hub's."""
    spec = yaml.safe_load(FILES[name].read_text())
    spec["data"] = {"file": "rows.jsonl"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(spec))
    return task.load(tmp_path / f"{name}.yaml")


def right(document, said):
    """What a model gives that is right."""
    if document.choices:
        return Output(logprobs=tuple(-0.1 if i == document.target else -9.0 for i in range(len(document.choices))))
    return Output(texts=(said,))


def wrong(document):
    """And one that says something else."""
    if document.choices:
        return Output(logprobs=tuple(-9.0 if i == document.target else -0.1 for i in range(len(document.choices))))
    return Output(texts=("Quite, another, matter: he said so, and nothing, of what, was, asked, here, " * 2,))


def test_every_hub_task_is_tried():
    assert set(ROWS) == HUB - {"system_messages"}


@pytest.mark.parametrize("name", sorted(HUB))
def test_what_is_declared(name):
    loaded = task.load(name)
    rows, tokens = loaded.expected
    assert loaded.name == name and loaded.summary and loaded.source
    assert rows and tokens and "emphasis" in loaded.groups
    assert loaded.offline == (name == "system_messages")


@pytest.mark.parametrize("name", ROWS)
def test_rows(tmp_path, name):
    rows, emphasised, said = ROWS[name]
    loaded = on_rows(tmp_path, name, rows)
    docs = loaded.docs(None, seed=0)
    assert len(docs) == len(rows)
    named = next((key for key, value in rows[0].items() if isinstance(value, str)), None)
    (first,) = [d for d in docs if named is None or d.data[named] == rows[0][named]]
    assert list(first.example.groups["emphasis"]) == emphasised
    assert set(first.example.groups) == loaded.groups
    for document in docs:
        contents = document.example.prompt
        text = contents if isinstance(contents, str) else "\n".join(m["content"] for m in contents)
        assert all(selector in text for group in document.example.groups.values() for selector in group)
    if name in PROMPTS:
        assert first.example.prompt == PROMPTS[name]
    primary = loaded.metrics[0]
    arguments = dict(loaded.spec.metrics)[primary]
    judged = metrics.get(primary)
    assert judged(first, right(first, said), **arguments) == 1
    assert judged(first, wrong(first), **arguments) < 0.5
    if loaded.output == "generate":
        assert judged(first, Output(texts=("",)), **arguments) == 0


@pytest.mark.parametrize("name", ["sst2", "ag_news", "trec", "subj", "nq_swap"])
def test_demonstrations(tmp_path, name):
    loaded = on_rows(tmp_path, name, ROWS[name][0])
    for document in loaded.docs(None, seed=1):
        prompt, groups = document.example.prompt, document.example.groups
        assert len(groups["demos"]) == loaded.shots
        (query,) = groups["query"]
        assert prompt.endswith(query) and query not in groups["demos"]
        assert prompt.count(groups["emphasis"][0]) == 1  # never among its own demonstrations


def test_places_of_what_is_sought(tmp_path):
    for name, places in [("lost_in_the_middle_kv", {4, 0}), ("lost_in_the_middle_qa", {2})]:
        (folder := tmp_path / name).mkdir()
        docs = on_rows(folder, name, ROWS[name][0]).docs(None, seed=0)
        assert {d.cell["gold"] for d in docs} == places
        for d in docs:
            (gold,) = d.example.groups["gold"]
            assert gold in d.example.groups["documents"][d.cell["gold"]]


def test_several_answers_count(tmp_path):
    loaded = on_rows(tmp_path, "lost_in_the_middle_qa", ROWS["lost_in_the_middle_qa"][0])
    document = loaded.docs(1, seed=0)[0]
    assert loaded.score(document, Output(texts=("It was A. Lee",)))["contains"] == 1


def test_memory_is_an_alternative(tmp_path):
    loaded = on_rows(tmp_path, "nq_swap", ROWS["nq_swap"][0])
    document = loaded.docs(1, seed=0)[0]
    assert loaded.score(document, Output(texts=("Ann Lee",))) == {"em": 0, "f1": 0, "alternative": 1}
    assert loaded.score(document, Output(texts=("Bob Roy",))) == {"em": 1, "f1": 1, "alternative": 0}


class TestSystemMessages:
    def docs(self):
        loaded = task.load(Path(str(FILES["system_messages"])))
        return loaded, loaded.docs(None, seed=0)

    def test_chats(self):
        loaded, docs = self.docs()
        assert len(docs) == loaded.expected[0] == 24
        for document in docs:
            system, user = document.example.prompt
            assert system["content"] == document.example.groups["emphasis"][0]
            assert [user["content"], *document.turns] == document.data["turns"] and len(document.turns) == 3

    def test_every_constraint_can_be_judged(self):
        loaded, docs = self.docs()
        asked = set()
        text = (
            "Well, no. The GOOD rain fell on the hill, and we went home by the long road past the mill, where an old "
            "man sold us pears, plums and a jar of honey. My sister carried them in her hat. It was late when we lit "
            "the lamp, and nobody spoke."
        )
        for document in docs:
            asked |= {one["id"] for one in document.data["constraints"]}
            nothing = loaded.score(document, Output(texts=(text,) * 4))
            assert nothing["constraints"] == nothing["constraints_first"] == 0, document.data["system"]
        assert len(asked) >= 15 and "length_constraints:number_sentences" not in asked

    def test_drift(self):
        loaded, docs = self.docs()
        (document,) = [d for d in docs if "use a comma" in d.data["system"]]
        texts = ("Boil it for six minutes.", "Stir, then wait.", "Toast goes well.", "A small, flat one.")
        assert loaded.score(document, Output(texts=texts)) == {
            "constraints": 0.5,
            "constraints_first": 1,
            "constraints_last": 0,
            "drift": -1,
        }
