"""Parallel context encoding with selective attention: the numbers of methods/context.md §5."""

import itertools

import pytest
import torch
from method_checks import apart, close, generate, keeps_its_promises
from small_models import NO_SDPA
from typer.testing import CliRunner

import steerlens
from steerlens import around, blocks
from steerlens.backends.call import Call
from steerlens.cli import app
from steerlens.edits import KeepTop, SpanKeys
from steerlens.errors import MethodError, SpanError
from steerlens.methods import PASTA, ZeroTuning, get
from steerlens.methods.selective_context import SelectiveContext
from steerlens.passes import Pass, Prompt
from steerlens.spans import Spans

ROW = (0.20, 0.10, 0.05, 0.15, 0.02, 0.08, 0.12, 0.06, 0.22)
BLOCKS = [(0, 3), (3, 6), (6, 8)]
KEPT = (0.350877, 0.175439, 0.087719, 0, 0, 0, 0, 0, 0.385965)
SPANS = {"documents": [[(2, 6), (6, 9), (11, 15)], [(9, 11), (12, 14), (14, 16)], [(4, 9)]]}
"""Of the fixture `prompts("left")`: rows of 20, 13 and 17 tokens; the last has no second block."""
NOTHING = ZeroTuning(1.0)
"""What to compare with: no parameter makes this method neutral, only a prompt of one document does."""


def attend(rows, keep, pool, backend="sdpa", top=2):
    """Weights [H, 1, 9] of heads whose rows are `rows` [H, 9] before the choice."""
    x = torch.tensor(rows).log()[:, None]
    now = Pass(Prompt.start(9, None, 1, x.device), 8, 1, None, True, {0: (9, 0)})
    eye = torch.eye(9)[None, None]
    call = Call(x[None], eye, eye, None, 1.0, None, 8, None, True)
    spans = Spans.of({"blocks": [BLOCKS], "behind": [[(8, 9)]]})
    groups = tuple(SpanKeys("blocks", k) for k in range(3))
    edit = KeepTop(tuple(range(len(rows))), groups, keep, SpanKeys("behind"), top, pool)
    return around.attention(backend, call, [around.Placed(edit, spans, None)], now, 0, lambda part: [])[0]


@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
@pytest.mark.parametrize("pool", ["none", "heads"])
def test_oracle(backend, pool):
    got = attend([ROW], 1, pool, backend)[0, 0]
    close(got, KEPT)
    entropy = [float(torch.special.entr(a).sum()) for a in (torch.tensor(ROW), got)]
    assert entropy == pytest.approx([2.023144, 1.253742], abs=2e-6)
    close(attend([ROW], 3, pool, backend)[0, 0], ROW)
    # by all its weights block 0 leads with .35, block 1 has .25; by the largest alone they are .20 and .15, block 2 .12
    assert attend([ROW], 2, pool, backend, top=1)[0, 0, 6:8].abs().max() == 0


def test_heads_choose_together_or_apart():
    other = (0.02, 0.02, 0.01, 0.15, 0.02, 0.08, 0.4, 0.2, 0.1)  # scores .04, .23, .6: together .34, .46, .78
    apart_, together = attend([ROW, other], 1, "none"), attend([ROW, other], 1, "heads")
    assert apart_[0, 0, 0] > 0.3 and apart_[1, 0, 6] > 0.3
    assert together[:, 0, :6].abs().max() == 0 and together[0, 0, 6] == pytest.approx(0.12 / 0.4, abs=1e-6)


def test_of_equal_scores_the_earlier_stays_and_groups_without_keys_are_none():
    keys = torch.tensor([[[True], [True], [False]]])
    assert around._best(torch.tensor([[0.5, 0.5, 0.0]]), keys, 1).tolist() == [[True, False, False]]
    assert around._best(torch.tensor([[0.0, 0.0, 0.0]]), keys, 2).tolist() == [[True, True, False]]
    assert around._best(torch.tensor([[0.0, 0.0, 0.0]]), keys.flip(1), 1).tolist() == [[False, True, False]]


def test_positions():
    found = blocks.aligned([1], [[(3, 6), (6, 8)]], 10, "start")
    assert found.tolist() == [[0, 0, 1, 2, 3, 4, 2, 3, 5, 6]]
    assert blocks.adjacent([(2, 4), (5, 7), (7, 8)]) == [(2, 5), (5, 7), (7, 8)]


@torch.no_grad()
@pytest.mark.parametrize("pool", ["none", "heads", "rows"])
def test_by_hand(model_of, row, pool):
    """Layer by layer: attend once to score, choose, attend again under the mask of what was chosen."""
    model, documents = model_of("llama-gqa", "eager"), [(2, 6), (6, 9), (9, 16)]
    base = model.model
    mask = torch.full((20, 20), -torch.inf).triu(1)
    for (a, b), (c, d) in itertools.permutations(documents, 2):
        mask[a:b, c:d] = -torch.inf
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]])
    hidden = base.embed_tokens(row)
    turned = base.rotary_emb(hidden, position_ids=positions)
    for layer in base.layers:
        x = layer.input_layernorm(hidden)
        weights = layer.self_attn(x, position_embeddings=turned, attention_mask=mask[None, None])[1][0, :, 16:]
        scores = torch.stack([weights[..., a:b].sort(-1).values[..., -2:].sum(-1) for a, b in documents], -1)
        scores = {"none": scores, "heads": scores.sum(0, keepdim=True), "rows": scores.sum((0, 1), keepdim=True)}[pool]
        worst = scores.argmin(-1).expand(8, 4)
        own = mask.expand(8, -1, -1).clone()
        for (head, place), block in zip(itertools.product(range(8), range(4)), worst.flatten().tolist(), strict=True):
            own[head, 16 + place, slice(*documents[block])] = -torch.inf
        hidden = hidden + layer.self_attn(x, position_embeddings=turned, attention_mask=own[None])[0]
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    expected = model.lm_head(base.norm(hidden))[:, -1:]
    spans = {"documents": [documents]}
    got = generate(
        model, SelectiveContext(2, 2, pool), spans, row, torch.ones_like(row), max_new_tokens=1, min_new_tokens=1
    )
    assert apart(got, expected) < 1e-5
    whole = generate(
        model, SelectiveContext(None), spans, row, torch.ones_like(row), max_new_tokens=1, min_new_tokens=1
    )
    assert apart(got, whole) > 1e-3


@pytest.mark.parametrize("pool", ["none", "heads", "rows"])
@pytest.mark.parametrize("positions", ["shared", "sequential"])
def test_promises(pool, positions, model, prompts):
    method = SelectiveContext(1, 3, pool, positions)
    keeps_its_promises(model, method, NOTHING, prompts, SPANS)
    ids, mask = prompts("left")
    one = {"documents": [row[:1] for row in SPANS["documents"]]}
    assert torch.equal(generate(model, method, one, ids, mask), generate(model, [], None, ids, mask))


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt2", "gpt_oss"])
def test_families(model_of, prompts, family):
    model = model_of(family, "eager" if family in NO_SDPA else "sdpa")
    keeps_its_promises(model, SelectiveContext(1), NOTHING, prompts, SPANS)


def test_beams_follow_the_choice_and_other_methods_come_after(model, prompts):
    ids, mask = prompts("left")
    own = {"documents": [[(a - 7, b - 7) for a, b in SPANS["documents"][1]]]}
    with steerlens.steer(model, SelectiveContext(1), SPANS):
        found = model.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=5, do_sample=False)
    with steerlens.steer(model, SelectiveContext(1), own):
        alone = model.generate(ids[1:2, 7:], num_beams=3, max_new_tokens=5, do_sample=False)
    assert torch.equal(found[1, 7 : 7 + alone.shape[1]], alone[0])
    spans = SPANS | {"emphasis": [[(3, 5)], [(8, 9)], [(5, 7)]]}
    methods = [SelectiveContext(1), PASTA(0.1)]
    both = generate(model, methods, spans, ids, mask)
    assert apart(both, generate(model, methods, spans, ids, mask, backend="reference")) < 1e-4


def test_score_is_what_generate_does(model, prompts):
    ids, mask = prompts("left")
    method = SelectiveContext(1)
    with steerlens.steer(model, method, SPANS):
        steps = model.generate(
            ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    expected = torch.stack(steps.logits, 1).log_softmax(-1).gather(2, steps.sequences[:, 20:, None])[..., 0]
    whole = torch.cat([mask, torch.ones(3, 3, dtype=mask.dtype)], 1)
    with steerlens.steer(model, method, SPANS, prompt_lengths=[20, 13, 17]):
        scored = method.score(model, {"input_ids": steps.sequences, "attention_mask": whole}, SPANS)
    assert (scored[:, -3:] - expected).abs().max() < 1e-4


def test_refusals(model, row):
    assert get("selective_context") is SelectiveContext
    for parameters, message in (({"keep": 0}, "keep=0"), ({"pool": "x"}, "none, heads, rows"), ({"top": 0}, "top=0")):
        with pytest.raises(MethodError, match=message):
            SelectiveContext(**parameters)
    with (
        pytest.raises(SpanError, match="row 0 ends with its documents"),
        steerlens.steer(model, SelectiveContext(), {"documents": [[(2, 20)]]}),
    ):
        model.generate(row)


def test_command_line():
    facts = ["The code of the harbor office is 4417.", "The letter was cold.", "The code of the harbor bakery is 5020."]
    question = "Question: What is the code of the harbor office? Answer:"
    arguments = ["--prompt", f"{' '.join(facts)} {question}", "--max-new-tokens", "4"]
    arguments += [x for fact in facts for x in ("--span", f"documents={fact}")]
    found = CliRunner().invoke(app, ["run", "--recipe", "selective_context-tiny", *arguments])
    assert found.exit_code == 0, found.output
    assert found.stdout.strip() == "4417"
