"""AttentionInfluence: scores of documents, in Python and on the command line (heads.md §4)."""

import json

import pytest
import torch
from typer.testing import CliRunner

import steerlens
from steerlens import models
from steerlens.cli import app
from steerlens.errors import MethodError
from steerlens.examples import ExampleError
from steerlens.influence import Influence, losses, score
from steerlens.methods import HeadMask, get

LOOKUP = (
    "The code of the harbor bakery is 5020. Question: What is the code of the harbor bakery? Answer: 5020",
    "The mascot of the summit bakery is raven. Question: What is the mascot of the summit bakery? Answer: raven",
)
FILLER = ("The engine slowly followed the morning, and the letter was cold.", "Nobody found the sailor above the bird.")
HEADS = "1:1-7"


@pytest.fixture(scope="module")
def tiny():
    return models.load("tiny", "cpu")


@pytest.mark.parametrize(("base", "reference", "expected"), [(2.0, 2.3, 0.15), (1.25, 1.6, 0.28), (3.1, 3.2, 0.032258)])
def test_oracle(base, reference, expected):
    assert Influence(base, reference, 5).score == pytest.approx(expected, abs=1e-6)


def test_losses_are_those_of_the_real_tokens_but_the_first():
    logits = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))
    ids, mask = torch.tensor([[1, 2, 3, 4], [0, 5, 6, 1]]), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    nats = -logits.log_softmax(-1)
    expected = [
        (nats[0, 0, 2] + nats[0, 1, 3] + nats[0, 2, 4]).item() / 3,
        (nats[1, 1, 6] + nats[1, 2, 1]).item() / 2,
    ]
    assert losses(logits, ids, mask) == pytest.approx(expected, rel=1e-6)


def test_retrieval_documents_lose_most(tiny):
    found = score(*tiny, [*LOOKUP, *FILLER], HEADS, batch_size=4)
    assert min(one.score for one in found[:2]) > max(abs(one.score) for one in found[2:])
    assert min(one.score for one in found[:2]) > 0.05


def test_each_document_alone_and_what_the_model_says_itself(tiny):
    model, tokenizer = tiny
    together = score(model, tokenizer, [*LOOKUP, *FILLER], HEADS, batch_size=3)
    for text, one in zip([*LOOKUP, *FILLER], together, strict=True):
        (alone,) = score(model, tokenizer, [text], HEADS)
        inputs, _ = steerlens.encode(tokenizer, [text])
        with torch.no_grad():
            base = model(**inputs, labels=inputs["input_ids"]).loss.item()
            with steerlens.steer(model, HeadMask(HEADS)):
                masked = model(**inputs, labels=inputs["input_ids"]).loss.item()
        expected = pytest.approx((base, masked), rel=1e-4)
        assert (one.loss, one.masked_loss) == expected and (alone.loss, alone.masked_loss) == expected
        assert one.tokens == alone.tokens == inputs["input_ids"].shape[1] - 1


def test_max_tokens_reads_a_prefix(tiny):
    model, tokenizer = tiny
    ids = steerlens.encode(tokenizer, LOOKUP[0])[0]["input_ids"][0]
    with torch.no_grad():
        expected = model(input_ids=ids[None, :9], labels=ids[None, :9]).loss.item()
    found = score(model, tokenizer, [LOOKUP[0], FILLER[1]], HEADS, max_tokens=9)
    assert found[0].loss == pytest.approx(expected, rel=1e-4) and found[0].tokens == 8


def test_refusals(tiny):
    with pytest.raises(MethodError, match="no head is named"):
        score(*tiny, ["a b"], {})
    with pytest.raises(MethodError, match="max_tokens=1"):
        score(*tiny, ["a b"], HEADS, max_tokens=1)
    with pytest.raises(ExampleError, match="tokens: the model has room for 1024; give max_tokens"):
        score(*tiny, ["the " * 1600], HEADS)


def test_neutral_is_an_empty_plan(tiny):
    with steerlens.steer(tiny[0], get("attention_influence")({})) as steered:
        assert steered.plan == {}


class TestCommandLine:
    def call(self, *arguments):
        return CliRunner().invoke(app, ["influence", "--heads", HEADS, *map(str, arguments)])

    def test_scores_go_to_the_file_and_a_stopped_run_goes_on(self, tiny, tmp_path):
        data, out = tmp_path / "corpus.jsonl", tmp_path / "scores.jsonl"
        rows = [*({"text": text} for text in (*LOOKUP, *FILLER)), {"text": ""}, {"prompt": "x"}]
        data.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + "{\n")
        done = self.call("--data", data, "--output", out, "--batch-size", 2)
        assert done.exit_code == 3 and "7 documents, 3 with errors" in done.stderr
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["index"] for row in found] == list(range(7))
        expected = score(*tiny, [*LOOKUP, *FILLER], HEADS, batch_size=2)
        for row, one in zip(found, expected, strict=False):
            assert row["influence"] == pytest.approx(one.score) and row["tokens"] == one.tokens
            assert row["influence"] == pytest.approx((row["masked_loss"] - row["loss"]) / row["loss"])
        assert [("error" in row) for row in found] == [False] * 4 + [True] * 3
        assert "'text' is None" in found[5]["error"] and "not JSON" in found[6]["error"]
        whole = out.read_bytes()
        out.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
        assert self.call("--data", data, "--output", out, "--batch-size", 2, "--resume").exit_code == 3
        assert out.read_bytes() == whole
        again = self.call("--data", data, "--output", out, "--batch-size", 3, "--resume")
        assert again.exit_code == 2 and "batch_size was 2, is 3" in again.stderr

    def test_usage(self, tmp_path):
        missing = self.call("--data", tmp_path / "none.jsonl")
        assert missing.exit_code == 2 and "none.jsonl cannot be read" in missing.stderr
        (tmp_path / "empty.jsonl").write_text("\n")
        assert "is empty" in self.call("--data", tmp_path / "empty.jsonl").stderr
        assert "--resume needs --output" in self.call("--data", tmp_path / "empty.jsonl", "--resume").stderr
