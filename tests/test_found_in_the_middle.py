"""Found in the Middle: the numbers of methods/context.md §1."""

import threading

import pytest
import torch
from method_checks import BACKENDS, apart, attend, close, generate, keeps_its_promises
from typer.testing import CliRunner

import steerlens
from steerlens.cli import app
from steerlens.edits import Redistribute, SpanKeys
from steerlens.errors import MethodError, SpanError, SteeringStateError, UnsupportedError
from steerlens.methods import AttentionSorting, ZeroTuning, get
from steerlens.methods.found_in_the_middle import FLOOR, FoundInTheMiddle, Shares
from steerlens.prompted import Setting

ROW = (0.30, 0.05, 0.03, 0.02, 0.01, 0.01, 0.10, 0.06, 0.02, 0.02, 0.38)
DOCUMENTS = [(1, 4), (4, 6), (6, 10)]
DUMMY = (0.03, 0.008, 0.055)
LENGTHS = (3, 2, 4)
RELEVANCE = [sum(ROW[a:b]) / (b - a) - dummy for (a, b), dummy in zip(DOCUMENTS, DUMMY, strict=True)]
SPANS = {"documents": [[(2, 6), (6, 9), (11, 15)], [(8, 11), (12, 14)], [(4, 9), (9, 11), (12, 16)]]}
"""Of the fixture `prompts("left")`: rows of 20, 13 and 17 tokens."""
WARM = FoundInTheMiddle(0.01)
GREEDY = {"do_sample": False, "min_new_tokens": 4}


def setting(law):
    return Setting(
        "found_in_the_middle",
        {0: (Redistribute((0,), tuple(SpanKeys("documents", k) for k in range(3)), law, "decode"),)},
        {},
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("normalise", "masses"),
    [("mean", (0.181565, 0.092711, 0.045724)), ("sum", (0.163699, 0.125382, 0.030919))],
)
def test_oracle(backend, normalise, masses):
    law = FoundInTheMiddle(0.005, normalise).law([RELEVANCE], [LENGTHS])
    got = attend([[ROW]], setting(law), backend, spans={"documents": [DOCUMENTS]})[0, 0]
    close(torch.stack([got[a:b].sum() for a, b in DOCUMENTS]), masses)
    close(got[[0, 10]], (0.30, 0.38))
    close(got.sum(), 1.0)
    close(got[1:4] / got[1:4].sum(), (0.5, 0.3, 0.2))


@pytest.mark.parametrize(("logs", "masses"), [((0.0, 0.0, -2000.0), (0.16, 0.16, 0.0)), ((0.0, 1.0, 2.0), None)])
def test_all_or_nothing(logs, masses):
    got = attend([[ROW]], setting(Shares((logs,))), "sdpa", spans={"documents": [DOCUMENTS]})[0, 0]
    expected = masses or [0.32 * share for share in torch.tensor(logs).softmax(0).tolist()]
    close(torch.stack([got[a:b].sum() for a, b in DOCUMENTS]), expected)


class TestLaw:
    def test_keeps_the_budget_of_what_is_seen(self):
        mass = torch.tensor([[0.2, 0.0, 0.1], [0.3, 0.0, 0.0], [0.0, 0.0, 0.0], [FLOOR / 100, 0.5, 0.1]])[None, None]
        mass.requires_grad_()
        weights = Shares(((1.0, 5.0, 2.0),)).log_weights(mass, torch.zeros(1, dtype=torch.long), None)
        found = (mass * weights.exp()).detach()[0, 0]
        close(found[0, [0, 2]] / found[0].sum(), torch.tensor([1.0, 2.0]).softmax(0).tolist())
        assert torch.equal(weights[0, 0, 1:3], torch.zeros(2, 3))
        close(found.sum(-1), mass.detach()[0, 0].sum(-1).tolist())
        assert found[3, 0] / found[3, 1] == pytest.approx(torch.tensor(-4.0).exp().item() / 100, rel=1e-4)
        weights.sum().backward()
        assert mass.grad.isfinite().all()

    def test_rows_have_their_own_shares(self):
        mass = torch.full((4, 2, 1, 2), 0.2)
        weights = Shares(((0.0, 1.0), (1.0, 0.0))).log_weights(mass, torch.tensor([0, 0, 1, 1]), None)
        assert torch.equal(weights[:2], weights[2:].flip(-1)) and not torch.equal(weights[0], weights[2])


def test_relevance_is_the_last_row_less_that_of_a_dummy(model_of, row):
    """By the dense maps of the eager model."""
    model, documents, method = (
        model_of("llama-gqa", "eager"),
        [(2, 6), (6, 9), (11, 15)],
        FoundInTheMiddle(dummy=[7, 8]),
    )

    @torch.no_grad()
    def means(ids):
        maps = torch.stack(model(ids, output_attentions=True).attentions[1:])[:, 0, :, -1]
        return [float(maps[..., a:b].mean()) for a, b in documents]

    expected = means(row)
    for k, (a, b) in enumerate(documents):
        dummy = row.clone()
        dummy[0, a:b] = torch.tensor([7, 8, 7, 8])[: b - a]
        expected[k] -= means(dummy)[k]
    found = []
    law = FoundInTheMiddle.law
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FoundInTheMiddle, "law", lambda self, rel, n: (found.append((rel, n)), law(self, rel, n))[1])
        with steerlens.steer(model, method, {"documents": [documents]}):
            model.generate(row, max_new_tokens=1, do_sample=False)
    assert found[0][0][0] == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert found[0][1] == [[4, 3, 4]]


@pytest.mark.parametrize("method", [WARM, FoundInTheMiddle(5e-5), FoundInTheMiddle(0.01, "sum", 3, (5,), {1: [0, 3]})])
def test_promises(method, model, prompts):
    keeps_its_promises(model, method, FoundInTheMiddle(heads={}), prompts, SPANS)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt2", "gpt_oss"])
def test_families(model_of, prompts, family):
    keeps_its_promises(model_of(family, "eager"), WARM, FoundInTheMiddle(heads={}), prompts, SPANS)


def test_documents_come_to_their_shares_in_every_row_that_predicts(model, prompts):
    ids, mask = prompts("left")
    groups = {str(k): [row[k : k + 1] for row in SPANS["documents"]] for k in range(3)}
    method = FoundInTheMiddle(0.02, "sum")
    with steerlens.capture(model, groups, "mass") as native:
        model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False)
    with steerlens.steer(model, method, SPANS), steerlens.capture(model, groups, "mass") as record:
        model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    for layer in (1, 2):
        share = record[layer].mass / record[layer].mass.sum(-1, keepdim=True)
        assert (share[:, :, 19:] - share[:, :1, 19:20]).abs().max() < 1e-5
    assert (
        share[:, 0, 19] - record[1].mass[:, 0, 19] / record[1].mass[:, 0, 19].sum(-1, keepdim=True)
    ).abs().max() < 1e-5
    assert share[0, 0, 19].std() > 0.02
    total = [r[1].mass[:, :, 19].sum(-1) for r in (native, record)]
    assert (total[0] - total[1]).abs().max() < 1e-5  # layer 1 is the first that is steered
    assert apart(record[1].mass[:1, :, :19], native[1].mass[:1, :, :19]) < 1e-5


def test_score_is_what_generate_does(model, prompts):
    ids, mask = prompts("left")
    with steerlens.steer(model, [ZeroTuning(2.0), WARM], SPANS):
        steps = model.generate(
            ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    expected = torch.stack(steps.logits, 1).log_softmax(-1).gather(2, steps.sequences[:, 20:, None])[..., 0]
    whole = torch.cat([mask, torch.ones(3, 3, dtype=mask.dtype)], 1)
    with steerlens.steer(model, [ZeroTuning(2.0), WARM], SPANS, prompt_lengths=[20, 13, 17]):
        scored = WARM.score(model, {"input_ids": steps.sequences, "attention_mask": whole}, SPANS)
    assert (scored[:, -3:] - expected).abs().max() < 1e-4
    # padded on the right, with another number of tokens behind each prompt
    ids, mask = torch.zeros(3, 24, dtype=torch.long), torch.zeros(3, 24, dtype=torch.long)
    own = {"documents": [[(a - p, b - p) for a, b in r] for r, p in zip(SPANS["documents"], (0, 7, 3), strict=True)]}
    for i, pad in enumerate((0, 7, 3)):
        ids[i, : 23 - pad], mask[i, : 23 - pad] = steps.sequences[i, pad:], 1
    with steerlens.steer(model, [ZeroTuning(2.0)], own, prompt_lengths=[20, 13, 17]):
        scored = WARM.score(model, {"input_ids": ids, "attention_mask": mask}, own)
    for i, length in enumerate((20, 13, 17)):
        assert (scored[i, length - 1 : length + 2] - expected[i]).abs().max() < 1e-4


def test_one_document_changes_nothing_and_beams_follow(model, prompts):
    ids, mask = prompts("left")
    one = {"documents": [row[:1] for row in SPANS["documents"]]}
    assert torch.equal(generate(model, WARM, one, ids, mask), generate(model, [], None, ids, mask))
    with steerlens.steer(model, WARM, SPANS):
        found = model.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=4, do_sample=False)
    own = {"documents": [[(a - 7, b - 7) for a, b in SPANS["documents"][1]]]}
    with steerlens.steer(model, WARM, own):
        alone = model.generate(ids[1:2, 7:], num_beams=3, max_new_tokens=4, do_sample=False)
    assert torch.equal(found[1, 7 : 7 + alone.shape[1]], alone[0])


@pytest.mark.parametrize("threaded", [False, True])
def test_own_forwards_are_unsteered_and_not_counted(model, row, threaded):
    spans, found, looked = {"documents": [[(2, 6), (6, 9), (11, 15)]]}, [], []
    relevance = FoundInTheMiddle.relevance

    def look(self, *given):
        looked.append(relevance(self, *given))
        return looked[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FoundInTheMiddle, "relevance", look)
        for methods in ([WARM], [ZeroTuning(8.0), WARM]):
            with (
                steerlens.steer(model, methods, spans) as steered,
                steerlens.capture(model, stats="entropy") as record,
            ):
                run = threading.Thread(target=lambda: found.append(model.generate(row, max_new_tokens=4, **GREEDY)))
                if threaded:
                    run.start()
                    run.join()
                else:
                    run.run()
                counts = steered.report()
            assert record[0].entropy.shape[2] == row.shape[1] + 3
    assert looked[0] == looked[1]
    assert counts == {n: {"calls": 4, "rows": 23} for n in range(3)}
    assert not torch.equal(found[0], found[1])
    assert "generate" not in model.__dict__ and not model.__dict__.get("_steerlens_engine")


def test_refusals(model, row):
    assert get("found_in_the_middle") is FoundInTheMiddle
    spans = {"documents": [[(2, 6), (6, 9)]]}
    for parameters, message in (
        ({"temperature": 0}, "temperature=0"),
        ({"normalise": "max"}, "allowed: mean, sum"),
        ({"dummy": []}, "no list of token ids"),
        ({"last_layers": 0}, "last_layers=0"),
    ):
        with pytest.raises(MethodError, match=message):
            FoundInTheMiddle(**parameters)
    for method, given, error, message in (
        (FoundInTheMiddle(last_layers=4), spans, MethodError, "last_layers=4 is out of range; .* 3 layers"),
        (WARM, {"documents": [[]]}, SpanError, "row 0 has no documents"),
        (WARM, {"emphasis": [[(2, 3)]]}, SpanError, "needs the span group 'documents'"),
        ([AttentionSorting(1), WARM], spans, UnsupportedError, "attention_sorting rewrites afterwards"),
    ):
        with pytest.raises(error, match=message), steerlens.steer(model, method, given):
            model.generate(row, max_new_tokens=1)
    with pytest.raises(SteeringStateError, match="prompt_lengths"):
        WARM.score(model, {"input_ids": row}, spans)
    with pytest.raises(SteeringStateError, match="call generate"), steerlens.steer(model, WARM, spans):
        model(row)
    assert not model.__dict__.get("generate")


def test_command_line(tmp_path):
    facts = ["The code of the harbor office is 4417.", "The letter was cold.", "The code of the harbor bakery is 5020."]
    question = "Question: What is the code of the harbor office? Answer:"
    arguments = ["--prompt", f"{' '.join(facts)} {question}", "--max-new-tokens", "4"]
    arguments += [x for fact in facts for x in ("--span", f"documents={fact}")]
    found = CliRunner().invoke(app, ["run", "--recipe", "found_in_the_middle-tiny", *arguments])
    assert found.exit_code == 0, found.output
    assert found.stdout.strip() == "4417"
