"""Attention Sorting (methods/context.md §2)."""

import json
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import steerlens
from steerlens import prompted
from steerlens.cli import app
from steerlens.errors import MethodError, SpanError, SteeringStateError, UnsupportedError
from steerlens.methods import PASTA, ZeroTuning, get
from steerlens.methods import attention_sorting as sorting
from steerlens.methods.attention_sorting import AttentionSorting
from steerlens.prompted import attention_on

DOCUMENTS = [(2, 6), (6, 9), (11, 15), (15, 16)]
GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture
def scored(monkeypatch):
    """`scored(*rows)`: the scores that successive forwards give, for one prompt row."""

    def give(*rows):
        left = list(rows)
        monkeypatch.setattr(prompted, "attention_on", lambda *_: [left.pop(0)])
        return left

    return give


def dense(model, ids, documents):
    """Scores from the dense maps of the eager model."""
    with torch.no_grad():
        maps = torch.stack(model(ids, output_attentions=True).attentions)[:, 0, :, -1]
    return [float(maps[..., a:b].sum(-1).mean()) for a, b in documents]


def test_order():
    scores = (0.10, 0.30, 0.05, 0.25)
    assert AttentionSorting().order(scores) == [2, 0, 3, 1]
    assert AttentionSorting(best="first").order(scores) == [1, 3, 0, 2]
    assert AttentionSorting().order((0.2, 0.2, 0.1, 0.2)) == [2, 3, 1, 0]  # equal ones in reversed order


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "gemma2", "gpt2", "gpt_oss"])
def test_scores_are_sums_over_the_last_row(model_of, row, family):
    eager = model_of(family, "eager")
    assert attention_on(eager, row, None, [DOCUMENTS])[0] == pytest.approx(dense(eager, row, DOCUMENTS), rel=2e-5)


def test_a_row_in_a_padded_batch_is_the_row_alone(model, prompts):
    ids, mask = prompts("left")
    documents = [[(a + pad, b + pad) for a, b in [(1, 4), (4, 9), (10, 12)]] for pad in (0, 7, 3)]
    moved, spans = AttentionSorting(2).prepare_on(
        model, {"input_ids": ids, "attention_mask": mask}, steerlens.Spans.of({"documents": documents})
    )
    for i, pad in enumerate((0, 7, 3)):
        alone, own = AttentionSorting(2).prepare_on(
            model, {"input_ids": ids[i : i + 1, pad:]}, steerlens.Spans.of({"documents": [[(1, 4), (4, 9), (10, 12)]]})
        )
        assert torch.equal(alone["input_ids"][0], moved["input_ids"][i, pad:])
        assert [(a + pad, b + pad) for a, b in own.groups["documents"][0]] == list(spans.groups["documents"][i])


def test_scores_are_read_where_the_documents_are_now(model, row, scored):
    left = scored((0.4, 0.1, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4), (9, 9, 9, 9))
    inputs, spans = AttentionSorting(3).prepare_on(
        model, {"input_ids": row}, steerlens.Spans.of({"documents": [DOCUMENTS], "gold": [[(12, 14)]]})
    )
    ids = row[0].tolist()
    assert len(left) == 1  # the second order came out as it went in, which ends it
    assert inputs["input_ids"][0].tolist() == [
        *ids[:2], *ids[6:9], *ids[11:15], *ids[9:11], *ids[15:16], *ids[2:6], *ids[16:],
    ]  # fmt: skip
    assert spans.groups == {"documents": (((12, 16), (2, 5), (5, 9), (11, 12)),), "gold": (((6, 8),),)}


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_every_span_keeps_its_tokens(data):
    edges = sorted(data.draw(st.sets(st.integers(0, 24), min_size=4, max_size=10)))
    documents = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=False)]
    ranges = data.draw(
        st.lists(st.tuples(st.integers(0, 23), st.integers(1, 6)).map(lambda r: (r[0], min(24, sum(r)))))
    )
    order = data.draw(st.permutations(range(len(documents))))
    columns, places = sorting._rearranged(range(24), documents, order)
    assert sorted(columns) == list(range(24))
    assert [columns[slice(*place)] for place in places] == [list(range(*documents[k])) for k in order]
    for one in ranges:
        pieces = sorting._moved([one], columns)
        assert sorted(c for a, b in pieces for c in columns[a:b]) == list(range(*one))
    assert sorting._moved(documents, columns) == tuple(places[order.index(k)] for k in range(len(documents)))


@pytest.mark.parametrize("threaded", [False, True])
def test_own_forwards_are_unsteered_and_not_counted(model, row, threaded):
    spans = steerlens.Spans.of({"documents": [DOCUMENTS], "emphasis": [[(3, 5)]]})
    inputs, moved = AttentionSorting(1).prepare_on(model, {"input_ids": row}, spans)
    assert not torch.equal(inputs["input_ids"], row)
    with steerlens.steer(model, [ZeroTuning(8.0), PASTA(0.01)], moved) as steered:
        expected = model.generate(inputs["input_ids"], **GREEDY)
    counts, found = steered.report(), []
    with (
        steerlens.steer(model, [AttentionSorting(1), ZeroTuning(8.0), PASTA(0.01)], spans) as steered,
        steerlens.capture(model, stats="entropy") as record,
    ):
        thread = threading.Thread(target=lambda: found.append(model.generate(row, **GREEDY)))
        if threaded:
            thread.start()
            thread.join()
        else:
            thread.run()
        assert steered.report() == counts
    assert torch.equal(found[0], expected)
    assert record[0].entropy.shape[2] == row.shape[1] + 3
    assert "generate" not in model.__dict__


def test_neutral(model, row):
    spans = steerlens.Spans.of({"documents": [DOCUMENTS]})
    expected = model.generate(row, **GREEDY)
    for method in (AttentionSorting(0), AttentionSorting()):
        one = spans if method.iterations == 0 else steerlens.Spans.of({"documents": [DOCUMENTS[:1]]})
        with steerlens.steer(model, method, one):
            assert torch.equal(model.generate(row, **GREEDY), expected)


@pytest.mark.parametrize(
    ("inputs", "documents", "error", "message"),
    [
        ({}, [[]], SpanError, "row 0 has no documents"),
        ({}, [[(2, 6), (5, 8)]], SpanError, "overlap"),
        ({}, [[(2, 6), (5, 28)]], SpanError, "20 columns"),
        ({"attention_mask": torch.tensor([[1] * 18 + [0] * 2])}, [DOCUMENTS], SpanError, "on the left"),
        ({"inputs_embeds": torch.zeros(1, 20, 64)}, [DOCUMENTS], UnsupportedError, "embeddings"),
    ],
)
def test_refusals(model, row, inputs, documents, error, message):
    with pytest.raises(error, match=message):
        AttentionSorting().prepare_on(model, {"input_ids": row, **inputs}, steerlens.Spans.of({"documents": documents}))


def test_refusals_without_spans_and_without_a_model(model, row):
    assert get("attention_sorting") is AttentionSorting
    with pytest.raises(SpanError, match="documents"):
        steerlens.steer(model, AttentionSorting())
    with pytest.raises(SteeringStateError, match="rewrites the prompt"):  # noqa: SIM117
        with steerlens.steer(model, AttentionSorting(), {"documents": [DOCUMENTS]}):
            model(row)
    with pytest.raises(MethodError, match="prepare_on"):
        AttentionSorting().prepare({"input_ids": row}, None)
    with pytest.raises(MethodError, match="iterations=-1"):
        AttentionSorting(-1)


FACTS = [
    "The code of the harbor office is 4417.",
    "The engine slowly followed the morning, and the letter was cold.",
    "The code of the harbor bakery is 5020.",
]
QUESTION = "What is the code of the harbor office?"


class TestCommandLine:
    def run(self, *arguments):
        return CliRunner().invoke(app, ["run", "--method", "attention_sorting", "--max-new-tokens", "8", *arguments])

    def test_documents_are_looked_up_or_put_in(self, tmp_path):
        texts = tmp_path / "d.jsonl"
        texts.write_text("\n".join([json.dumps(FACTS[0]), json.dumps({"text": FACTS[1]}), "", json.dumps(FACTS[2])]))
        prompt = f"{' '.join(FACTS)} Question: {QUESTION} Answer:"
        found = self.run("--documents", str(texts), "--prompt", prompt)
        assert found.exit_code == 0, found.output
        assert found.stdout.strip() == "4417"
        built = self.run(
            "--documents",
            str(texts),
            "--query",
            QUESTION,
            "--prompt",
            "{documents} Question: {query} Answer:",
            "--json",
        )
        assert built.exit_code == 0, built.output
        assert json.loads(built.stdout)["results"][0]["prompt"] == "\n\n".join(FACTS) + f" Question: {QUESTION} Answer:"

    def test_rows_of_a_file(self, tmp_path):
        rows = [
            {"prompt": f"{FACTS[0]} {FACTS[0]} Question: {QUESTION} Answer:", "documents": [FACTS[0], FACTS[0]]},
            {"prompt": "{documents} Question: {query} Answer:", "groups": {"documents": FACTS}, "query": QUESTION},
            {"prompt": "What?", "documents": FACTS[:1]},
            {"prompt": "What?", "documents": [3]},
            {"prompt": "What?"},
        ]
        file = tmp_path / "p.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        found = self.run("--prompt-file", str(file))
        assert found.exit_code == 3, found.output
        one, two, *wrong = map(json.loads, found.stdout.splitlines())
        assert (one["steered"].strip(), two["steered"].strip()[:4]) == ("4417", "4417")
        errors = [row["error"] for row in wrong]
        assert "harbor office" in errors[0]
        assert "'documents' is [3]" in errors[1]
        assert "needs the span group 'documents': give --documents F.jsonl" in errors[2]

    @pytest.mark.parametrize(
        ("content", "message"), [("", "is empty"), ('"a"\n{"txt": 1}', ":2: "), ("nonsense", "not JSON")]
    )
    def test_bad_documents(self, tmp_path, content, message):
        file = tmp_path / "d.jsonl"
        file.write_text(content)
        found = self.run("--documents", str(file), "--prompt", "a")
        assert found.exit_code == 2
        assert message in " ".join(found.output.split())
