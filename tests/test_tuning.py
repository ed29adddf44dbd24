"""Scores of many candidates, halving, the journal, and the search on `tiny`."""

import copy
import json
import math
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import NO_SDPA, build
from steerlens.evals.examples import generate
from steerlens.evals.world.tasks import follows
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import steerlens
from steerlens import decoder, models
from steerlens.cli import app
from steerlens.encoding import Tokens
from steerlens.errors import SpanError
from steerlens.examples import Example, ExampleError, splits
from steerlens.heads import Heads
from steerlens.methods import ACT, PASTA, HeadMask, ZeroTuning
from steerlens.paired import Difference
from steerlens.recipe import load_recipe
from steerlens.spans import Spans
from steerlens.tuning import halving
from steerlens.tuning.journal import Journal, JournalError, name
from steerlens.tuning.outcome import interval
from steerlens.tuning.scoring import Score, ScoreError, Scorer
from steerlens.tuning.search import Search, Settings, TuneError
from steerlens.tuning.sharing import Sharing

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tiny():
    return models.load("tiny")


@pytest.fixture(scope="module")
def words():
    """A tokenizer of 97 words, the vocabulary of the small models."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(94))])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>")


def examples(count: int, seed: int = 0) -> list[Example]:
    """Word prompts of several lengths with an emphasised range and an answer of one to three words."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        length = draw.randint(24, 32)
        prompt = " ".join(f"w{draw.randrange(94)}" for _ in range(length))
        answer = " ".join(f"w{draw.randrange(94)}" for _ in range(draw.randint(1, 3)))
        start = draw.randint(10, 18)
        found.append(Example(prompt, answer, groups={"emphasis": (Tokens(start, start + 4),)}))
    return found


CANDIDATES = {
    "pasta": [PASTA(0.05, heads={layer: [h]}) for layer in range(3) for h in (0, 3, 6)],
    "zerotuning": [ZeroTuning(5.0, heads={layer: [h]}) for layer in range(3) for h in (0, 3, 6)],
    "act": [ACT(0.0, 0.05, heads={layer: [h]}) for layer in range(3) for h in (0, 3, 6)],
    "headmask": [HeadMask({layer: [h]}, phase="decode") for layer in range(3) for h in (0, 3, 6)],
}


def batches(scorer: Scorer, pairs) -> list[Score]:
    """Scores of any number of pairs, in their order."""
    found = {}
    for batch in scorer.plan(pairs):
        found |= zip(batch, scorer.score([pairs[i] for i in batch]), strict=True)
    return [found[i] for i in range(len(pairs))]


def apart(one: list[Score], other: list[Score]) -> float:
    return max(abs(a.logprob - b.logprob) + abs(a.entropy - b.entropy) for a, b in zip(one, other, strict=True))


class TestScores:
    @pytest.mark.parametrize("method", CANDIDATES)
    @pytest.mark.parametrize(
        "family", ["llama-gqa", "mistral", "gemma2", "gpt2", "gpt_oss", "qwen3_next", "deepseek_v3", "llama4", "opt"]
    )
    def test_sharing_changes_nothing(self, family, method, model_of, words):
        """In one batch from shared states, in batches of their own, alone: the same scores."""
        model, rows = model_of(family, "eager" if family in NO_SDPA else "sdpa"), examples(3)
        known, _ = decoder.read(decoder.find(model))
        candidates = [m for m in CANDIDATES[method] if known.heads[next(iter(dict(m.heads.table)))]]
        pairs = [(c, e) for e in rows for c in candidates] + [(None, e) for e in rows]
        shared, alone = Scorer(model, words), Scorer(model, words, share=False)
        together = batches(shared, pairs)
        assert apart(together, batches(alone, pairs)) < 1e-4
        assert apart(together[-3:], [alone.score([pair])[0] for pair in pairs[-3:]]) < 1e-4
        steered = [alone.score([pair])[0] for pair in pairs[:3]]
        assert apart(together[:3], steered) < 1e-4
        assert apart(steered, batches(alone, [(None, rows[0])] * 3)) > 1e-4
        # layers are left out, and tokens unless they are a state that no later token can start from
        assert shared.sharing.layers and shared.sharing.prefixes == (family != "qwen3_next")

    def test_states_that_cannot_be_shared_are_not(self, words, caplog):
        """A layer that keeps a count of its calls gives something else when it is left out."""
        model, (row,) = build("llama-gqa"), examples(1)
        calls = []
        model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
        model.model.layers[2].register_forward_pre_hook(lambda m, a: (a[0] * (1 + len(calls) % 2), *a[1:]))
        scorer = Scorer(model, words)
        pairs = [(m, row) for m in CANDIDATES["zerotuning"][3:6]]
        found = scorer.score(pairs)
        assert len(found) == 3 and not scorer.sharing.layers
        assert "steered runs cannot share layers" in caplog.text
        assert "forward" not in vars(model.model.layers[0])

    def test_nothing_is_left_of_the_example_before(self, model_of, words):
        """Two prompts whose candidates begin at the same row, and candidates that begin at different ones."""
        model, span = model_of("llama-gqa"), {"emphasis": (Tokens(12, 15),)}
        rows = [Example(" ".join(f"w{i * k % 94}" for i in range(25)), "w3", groups=span) for k in (7, 11)]
        methods = [HeadMask({2: [0]}, phase="decode"), *CANDIDATES["pasta"][3:], ZeroTuning(5.0, heads={1: [2]})]
        shared, alone = Scorer(model, words), Scorer(model, words, share=False)
        for row in rows:
            pairs = [(m, row) for m in methods]
            assert apart(shared.score(pairs), alone.score(pairs)) < 1e-4
            assert apart(shared.score(pairs[:-1]), alone.score(pairs[:-1])) < 1e-4

    def test_layers_that_cannot_do_without_the_ones_below(self, words):
        """As those that attend to keys of an earlier layer: nothing is shared, and nothing fails."""
        model, (row,) = build("llama-gqa"), examples(1)
        kept = {}
        model.model.layers[0].mlp.register_forward_hook(lambda *_: kept.update(made=True))
        model.model.layers[2].register_forward_pre_hook(lambda m, a: (a[0] * kept.pop("made"), *a[1:]))
        shared, alone = Scorer(model, words), Scorer(model, words, share=False)
        pairs = [(m, row) for m in CANDIDATES["zerotuning"][3:6]]
        assert apart(batches(shared, pairs), batches(alone, pairs)) < 1e-4 and not shared.sharing.layers

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_rounding_is_no_reason_not_to_share(self, dtype, words, caplog):
        model, rows = build("llama-gqa", dtype=dtype), examples(4)
        scorer = Scorer(model, words)
        batches(scorer, [(m, row) for row in rows for m in CANDIDATES["pasta"]])
        assert scorer.sharing.layers and scorer.sharing.prefixes and not caplog.text

    def test_what_is_shared_is_known_before_the_first_score(self, words):
        """A search that goes on takes the first batches from its journal, and must batch the rest the same way."""
        model, rows = build("qwen3_next"), examples(3)
        pairs = [(m, row) for row in rows for m in CANDIDATES["pasta"][3:]]
        scorer = Scorer(model, words)
        before = scorer.plan(pairs)
        scorer.score([pairs[i] for i in before[0]])
        assert scorer.plan(pairs) == before and not scorer.sharing.prefixes

    def test_a_failing_forward_leaves_the_layers_as_they_were(self, model_of, words):
        model, (row,) = model_of("llama-gqa"), examples(1)
        scorer = Scorer(model, words)
        scorer.score([(m, row) for m in CANDIDATES["zerotuning"][6:]])
        hook = model.model.layers[2].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        try:
            with pytest.raises(KeyboardInterrupt):
                scorer.score([(m, row) for m in CANDIDATES["zerotuning"][6:]])
        finally:
            hook.remove()
        assert not any("forward" in vars(layer) for layer in model.model.layers)

    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def test_rows_before_the_first_one_are_the_unsteered_ones(self, model_of, data):
        family = data.draw(st.sampled_from(["llama-gqa", "gpt_oss"]))
        model = model_of(family, "eager" if family in NO_SDPA else "sdpa")
        start = data.draw(st.integers(0, 18))
        spans = Spans.of([[(start, data.draw(st.integers(start + 1, 20)))]])
        heads = {data.draw(st.integers(0, 2)): [data.draw(st.integers(0, 7))]}
        method = data.draw(
            st.sampled_from(
                [
                    PASTA(0.01, heads=heads),
                    PASTA(0.01, scale="include", heads=heads),
                    ZeroTuning(9.0, heads=heads),
                    HeadMask(heads),
                    HeadMask(heads, phase="decode"),
                    HeadMask(heads, phase="prefill"),
                    ACT(0.0, 0.05, heads=heads),
                ]
            )
        )
        ids = torch.randint(3, 97, (1, 20), generator=torch.Generator().manual_seed(start))
        layer, row = Sharing(model).begins(method, spans, 20)
        assert layer == min(heads)
        with torch.no_grad():
            plain = model(ids).logits[0]
            with steerlens.steer(model, method, spans):
                steered = model(ids).logits[0]
        change = (plain - steered).abs().amax(-1)
        assert not (change[:row] > 1e-5).any()

    def test_the_first_row(self, model_of):
        """Not one row too early, where something changes there."""
        model, spans = model_of("llama-gqa"), Spans.of([[(6, 9)]])
        begins = lambda method: Sharing(model).begins(method, spans, 20)  # noqa: E731
        assert begins(PASTA(0.1, heads={2: [1]})) == (2, 6)
        assert begins(PASTA(0.1, heads={2: [1], 1: [0]})) == (1, 6)
        published = PASTA(0.1, sections="published", heads={2: [1]})
        assert Sharing(model).begins(published, Spans.of([[(11, 13), (6, 9)]]), 20) == (2, 6)
        assert begins(ZeroTuning(2.0, heads={1: [1]})) == (1, 1)
        assert begins(HeadMask({1: [1]}, phase="decode")) == (1, 19)
        assert begins(HeadMask({1: [1]})) == (1, 0)
        assert begins(ACT(heads={1: [1]})) == (1, 0)
        assert Sharing(model).begins(PASTA(0.1, heads={2: [1]}), Spans.of([[(0, 3)]]), 20) == (2, 3)

    @pytest.mark.parametrize("task", ["conflict", "json", "classify"])
    def test_a_hit_is_what_greedy_decoding_gives(self, task, tiny):
        model, tokenizer = tiny
        rows, scorer = generate(task, 12, first_seed=77), Scorer(*tiny, end=True)
        for method in (None, PASTA(0.1, heads={1: [1, 2, 3]}), HeadMask({1: [1, 2, 3, 4]}), ACT(heads={1: "*"})):
            scores = batches(scorer, [(method, row) for row in rows])
            inputs, spans = steerlens.encode(
                tokenizer, [r.prompt for r in rows], [list(r.groups["emphasis"]) for r in rows]
            )
            with steerlens.steer(model, method or (), spans):
                out = model.generate(**inputs, max_new_tokens=14, do_sample=False)
            texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            hits = [follows(text, row.answer) for text, row in zip(texts, rows, strict=True)]
            assert hits == [bool(score.hit) for score in scores]

    def test_scores_by_hand(self, tiny):
        model, tokenizer = tiny
        (row,) = generate("lookup", 1)
        score = Scorer(*tiny, end=True).score([(None, row)])[0]
        ids = tokenizer(f"{row.prompt} {row.answer}")["input_ids"] + [tokenizer.eos_token_id]
        start = len(tokenizer(row.prompt)["input_ids"])
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        wanted = sum(logs[i - 1, ids[i]].item() for i in range(start, len(ids))) / (len(ids) - start)
        assert score.logprob == pytest.approx(wanted, abs=1e-5)
        assert score.entropy == pytest.approx(torch.special.entr(logs[start - 1].exp()).sum().item(), abs=1e-5)

    def test_a_prompt_that_ends_in_white_space(self, tiny):
        """The answer goes on behind it; another space would be no answer that a model gives."""
        scorer = Scorer(*tiny)
        for end, answer in (("", " 42"), ("\n", "42"), (" ", "42")):
            row = scorer.row(Example(f"Answer:{end}", "42"))
            assert tiny[1].decode(row.ids[row.prompt :]) in (answer, answer.strip())
            assert tiny[1].decode(row.ids, skip_special_tokens=True).count(" ") <= 1

    def test_logits_that_are_no_numbers(self, words):
        """They would have no entropy at all, and win."""
        model, (row,) = build("llama-gqa"), examples(1)
        model.lm_head.weight.data.fill_(float("nan"))
        with pytest.raises(ScoreError, match=r"the unsteered model gives logits that are no numbers.*--dtype"):
            Scorer(model, words, share=False).score([(None, row)])

    def test_no_end(self, words):
        tokenizer = copy.deepcopy(words)
        tokenizer.eos_token = None
        with pytest.raises(ScoreError, match=r"no EOS token.*--begins"):
            Scorer(build("llama-gqa"), tokenizer, end=True)

    def test_no_answer(self, tiny):
        score = Scorer(*tiny).score([(ZeroTuning(2.0), Example("The code of the harbor is"))])[0]
        assert math.isnan(score.hit) and math.isnan(score.logprob) and score.entropy > 0

    def test_errors(self, tiny):
        with pytest.raises(SpanError, match="pasta needs spans for emphasis; an example has none"):
            Scorer(*tiny).score([(PASTA(0.1), Example("one two", "three"))])
        with pytest.raises(ExampleError, match=r"tokens with its answer, the model has room for 1024"):
            Scorer(*tiny).score([(None, Example("word " * 1100, "three"))])


class TestHalving:
    @given(st.integers(1, 2000), st.integers(1, 500), st.integers(0, 100_000), st.integers(1, 60))
    def test_a_schedule_keeps_to_its_budget(self, candidates, count, budget, keep):
        rungs = halving.schedule(candidates, count, budget, keep)
        least = halving.least(candidates, count, keep)
        assert bool(rungs) == (budget >= least)
        if rungs:
            assert halving.cost(rungs) <= budget and rungs[0].alive == candidates
            assert rungs[-1].alive == min(keep, candidates)
            assert all(a.examples <= b.examples <= count for a, b in pairwise(rungs))

    def test_rungs_by_hand(self):
        # shares of 108 forwards; what is left over goes on
        rungs = halving.schedule(27, 100, 432, 1)
        assert [(r.alive, r.examples) for r in rungs] == [(27, 4), (9, 16), (3, 52), (1, 100)]
        assert halving.cost(rungs) == 27 * 4 + 9 * 12 + 3 * 36 + 48


class TestJournal:
    KEY, SCORE = (name({"method": "act", "heads": {10: [1], 2: [3]}}), "test", 4), Score(1.0, -0.25, math.nan)

    def test_what_was_written_is_read(self, tmp_path):
        path = tmp_path / "j.jsonl"
        journal = Journal(path, {"seed": 1}, resume=False)
        journal.add([(self.KEY, self.SCORE), ((name(None), "test", 0), Score(0.0, -1.0, 2.0))])
        journal.close()
        again = Journal(path, {"seed": 1}, resume=True)
        assert len(again) == 2 and again.get((name(None), "test", 0)) == Score(0.0, -1.0, 2.0)
        found = again.get(self.KEY)
        assert (found.hit, found.logprob) == (1.0, -0.25) and math.isnan(found.entropy)
        again.add([((self.KEY[0], "test", 5), self.SCORE)])
        again.close()
        assert len(Journal(path, {"seed": 1}, resume=True)) == 3
        more = Journal(path, {"seed": 1}, resume=True)
        key = name({"method": "act", "heads": "all"}), "test", 0
        more.add([(key, Score(0.0, -9.0, 1.0))])
        more.close()
        last = Journal(path, {"seed": 1}, resume=True)
        assert last.get(key) == Score(0.0, -9.0, 1.0) and last.get((name(None), "test", 0)) == Score(0.0, -1.0, 2.0)
        assert math.isnan(last.get(self.KEY).entropy)

    def test_a_line_that_was_cut_off_is_dropped(self, tmp_path):
        path = tmp_path / "j.jsonl"
        journal = Journal(path, {}, resume=False)
        journal.add([(self.KEY, self.SCORE)])
        journal.close()
        whole = path.read_bytes()
        path.write_bytes(whole + b'{"scores": [[0, "te')
        journal = Journal(path, {}, resume=True)
        assert len(journal) == 1 and path.read_bytes() == whole
        path.write_bytes(whole[:9])
        assert len(Journal(path, {"other": 2}, resume=True)) == 0 and not path.exists()

    def test_another_search_is_refused(self, tmp_path):
        path = tmp_path / "j.jsonl"
        journal = Journal(path, {"seed": 1, "budget": 5}, resume=False)
        journal.add([(self.KEY, self.SCORE)])
        journal.close()
        with pytest.raises(JournalError, match="exists: go on with that search by --resume"):
            Journal(path, {"seed": 1, "budget": 5}, resume=False)
        with pytest.raises(JournalError, match="budget was 5, is None"):
            Journal(path, {"seed": 1}, resume=True)
        with pytest.raises(JournalError, match="budget was 5, is 6"):
            Journal(path, {"seed": 1, "budget": 6}, resume=True)
        path.write_bytes(path.read_bytes() + b"[]\n")
        with pytest.raises(JournalError, match=r"j.jsonl:3 is no line of a search"):
            Journal(path, {"seed": 1, "budget": 5}, resume=True)


class TestSplits:
    @given(st.lists(st.integers(0, 30), min_size=1, max_size=80), st.integers(0, 5))
    def test_splits_are_disjoint(self, keys, seed):
        rows = [Example(f"p{i}", key=str(key)) for i, key in enumerate(keys)]
        sizes = {"profile": 2, "validation": 3, "test": 4}
        try:
            found = splits(rows, sizes, seed)
        except ExampleError:
            return
        assert {k: len(v) for k, v in found.items()} == sizes
        sides = [{row.key for row in rows} for rows in found.values()]
        assert all(not a & b for i, a in enumerate(sides) for b in sides[:i])
        assert found == splits(rows[::-1], sizes, seed) or len(set(keys)) < len(keys)

    def test_too_few(self):
        with pytest.raises(
            ExampleError, match=r"5 examples are needed \(profile 2, test 3\), there are 2 of 1 distinct"
        ):
            splits([Example("a", key="k"), Example("b", key="k")], {"profile": 2, "test": 3}, 0)


def search(tiny, journal, task="conflict", seen=None, **given) -> Search:
    given = {"method": PASTA, "budget": 2000, "controls": 2, **given}
    rows = generate(task, 100, first_seed=5000, length=64)
    found = splits(rows, {"profile": 20, "validation": 30, "test": 50}, 0)
    scorer = Scorer(*tiny, end=True)
    return Search(
        scorer,
        scorer.facts,
        Settings(**given),
        {task: found["profile"]},
        found["validation"],
        found["test"],
        journal,
        ([] if seen is None else seen).append,
    )


class TestSearch:
    def test_pasta_finds_the_heads_that_look_up(self, tiny, tmp_path):
        seen: list[int] = []
        outcome = search(tiny, Journal(tmp_path / "j", {}, False), seen=seen).run()
        best = [p.unit[0] for p in outcome.profile[:5]]
        assert {layer for layer, _ in best} == {1} and (1, 0) not in best
        chosen = outcome.method.heads.resolve(Scorer(*tiny).facts)
        gain = outcome.contrasts["baseline"]["accuracy"]
        assert gain.low > 0.2 and not gain.noise and gain.n == 50
        assert outcome.contrasts["random"]["accuracy"].low > 0.2
        assert set(outcome.sides) == {"baseline", "default", "random", "tuned"}
        for control in outcome.controls:
            drawn = control.resolve(Scorer(*tiny).facts)
            assert sum(map(len, drawn.values())) == sum(map(len, chosen.values()))
            assert not any(set(drawn.get(layer, ())) & set(found) for layer, found in chosen.items())
        assert outcome.forwards == sum(seen) <= 2000

    def test_a_stopped_search_goes_on_to_the_same_outcome(self, tiny, tmp_path):
        whole = search(tiny, Journal(tmp_path / "whole", {}, False)).run()

        class Stop(Exception):
            pass

        def stopping(after):
            calls = iter(range(after))

            def advance(_):
                if next(calls, None) is None:
                    raise Stop

            return advance

        journal, runs = tmp_path / "parts", 0
        while True:
            again = search(tiny, Journal(journal, {}, True))
            again.advance, before = stopping(25 + 25 * runs), len(Journal(journal, {}, True))
            runs += 1
            try:
                outcome = again.run()
                break
            except Stop:
                assert len(Journal(journal, {}, True)) > before
        assert runs > 2 and outcome == whole

    def test_up_and_down_effective_heads(self, tiny, tmp_path):
        outcome = search(tiny, Journal(tmp_path / "j", {}, False), "classify", method=ZeroTuning, budget=3300).run()
        assert {p.setting for p in outcome.profile} == {"up", "down"}
        assert outcome.contrasts["default"]["accuracy"].n == 50
        for method, _, _ in outcome.tried:
            assert method.gamma != 1
        down = [m for m, _, _ in outcome.tried if m.gamma < 1]
        assert down and len(down) < len(outcome.tried)

    def test_unsupervised_by_entropy(self, tiny, tmp_path):
        """Without any answer, the entropy of the next token alone."""
        made = search(tiny, Journal(tmp_path / "j", {}, False), objective="entropy")
        for split in made.splits:
            made.splits[split] = [Example(e.prompt, None, (), e.groups) for e in made.splits[split]]
        outcome = made.run()
        assert outcome.contrasts["baseline"]["entropy"].high < 0 and math.isnan(outcome.sides["tuned"].accuracy)
        with pytest.raises(ExampleError, match="needs an 'answer'; entropy needs none"):
            rows = [Example("a")]
            Search(made.scorer, made.facts, Settings(ZeroTuning), {"t": rows}, rows, rows, made.journal)

    def test_answers_that_some_examples_lack(self, tiny, tmp_path):
        made = search(tiny, Journal(tmp_path / "j", {}, False), objective="entropy")
        rows = made.splits["test"]
        made.splits["test"] = [*rows[:-1], Example(rows[-1].prompt, None, (), rows[-1].groups)]
        outcome = made.run()
        assert set(outcome.contrasts["baseline"]) == {"entropy"} and math.isnan(outcome.sides["tuned"].accuracy)

    def test_a_small_test_split_needs_no_less_of_a_profile(self, tiny, tmp_path):
        """The least budget that is named is enough."""
        rows = generate("conflict", 60, first_seed=5000, length=64)
        scorer = Scorer(*tiny, end=True)

        def made(budget, path):
            chosen = Settings(PASTA, budget=budget, controls=1, per="layer")
            return Search(
                scorer, scorer.facts, chosen, {"t": rows[:30]}, rows[30:50], rows[50:52], Journal(path, {}, False)
            )

        with pytest.raises(TuneError) as error:
            made(1, tmp_path / "j")
        enough = int(str(error.value).partition("at least ")[2].split(",")[0])
        assert made(enough, tmp_path / "k").run().forwards <= enough

    @pytest.mark.parametrize(("per", "units"), [("index", 8), ("layer", 6)])
    def test_units(self, per, units, tiny, tmp_path):
        made = search(tiny, Journal(tmp_path / "j", {}, False), per=per)
        assert len(made.units) == units
        outcome = made.run()
        assert len(outcome.profile) == units
        if per == "layer":
            assert outcome.profile[0].unit == tuple((1, h) for h in range(8))

    def test_top_k_over_tasks_are_what_they_share(self, tiny, tmp_path):
        made = search(tiny, Journal(tmp_path / "j", {}, False), budget=4000)
        other = generate("capitals", 20, first_seed=9000, length=64)
        made.splits["profile capitals"], made.tasks = other, ["conflict", "capitals"]
        made.shares = made._shares()
        profile = made._profile()
        ranks = {task: [p.unit[0] for p in profile if p.task == task] for task in made.tasks}
        common = set(ranks["conflict"][:12]) & set(ranks["capitals"][:12])
        assert ("default", tuple(sorted(common))) in made._sets(profile)

    def test_fixed_parameters_are_not_searched(self, tiny, tmp_path):
        made = search(tiny, Journal(tmp_path / "j", {}, False), fixed={"alpha": 0.2}, within=Heads.parse("1:*;0:0"))
        outcome = made.run()
        assert {m.alpha for m, _, _ in outcome.tried} == {0.2}
        assert {layer for p in outcome.profile for layer, _ in p.unit} == {0, 1} and len(outcome.profile) == 9
        # nor are heads chosen that were not to be chosen from
        allowed = {(1, h) for h in range(8)} | {(0, 0)}
        for method, _, _ in outcome.tried:
            heads = method.heads.resolve(made.facts)
            assert {(layer, h) for layer, found in heads.items() for h in found} <= allowed

    def test_the_simplest_of_those_within_one_standard_error(self, tiny, tmp_path):
        made = search(tiny, Journal(tmp_path / "j", {}, False))
        gains: dict[PASTA, list[float]] = {}

        def simplest(*candidates):
            gains.clear()
            gains.update(candidates)
            made._gains = lambda methods, split, n: [gains[method] for method in methods]
            return made._simplest([(m, sum(g) / len(g), len(g)) for m, g in candidates])[0]

        many, two, one = (PASTA(0.1, heads=h) for h in ({1: [0, 1, 2]}, {1: [0, 1]}, {1: [0]}))
        mild = PASTA(0.5, heads={1: [0, 1]})
        # `two` loses 0.05 ± 0.05, `one` loses 0.5 ± 0.29
        best = [1.0, 1.0, 1.0, 1.0]
        assert simplest((many, best), (two, [1.0, 1.0, 1.0, 0.8]), (one, [0.5, 0.5, 0.5, 0.5])) == two
        assert simplest((many, best), (two, [0.9, 0.9, 0.9, 0.9])) == many
        assert simplest((many, best), (two, best), (mild, best)) == mild
        # one head that changes nothing is no simpler way to gain, if some gain at all
        noisy = [3.0, -1.0, 3.0, -1.0]
        assert simplest((many, noisy), (one, [0.0] * 4)) == many
        assert simplest((many, [-0.1] * 4), (one, [-0.1] * 4)) == one

    def test_no_threshold_of_act_is_neutral(self, tiny, tmp_path):
        made = search(tiny, Journal(tmp_path / "j", {}, False), "contradiction", method=ACT, budget=20_000)
        sizes = [made._size(ACT(0.4, threshold, heads={1: [0]})) for threshold in (0.05, 0.2)]
        assert sizes[0] == sizes[1] == (1, pytest.approx(0.6))

    def test_optuna(self, tiny, tmp_path):
        pytest.importorskip("optuna", reason="Optuna is the extra 'tune'")
        outcome = search(tiny, Journal(tmp_path / "j", {}, False), sampler="optuna").run()
        alphas = {m.alpha for m, _, _ in outcome.tried}
        assert len(alphas) > 3 and all(0.003 <= alpha <= 0.5 for alpha in alphas)
        assert not alphas <= {0.5, 0.2, 0.1, 0.03, 0.01, 0.003}
        assert outcome.contrasts["baseline"]["accuracy"].low > 0.2
        again = search(tiny, Journal(tmp_path / "j", {}, True), sampler="optuna").run()
        assert again == outcome

    def test_a_budget_that_is_too_small_says_what_is_needed(self, tiny, tmp_path):
        with pytest.raises(TuneError, match=r"--budget 300 is too small") as error:
            search(tiny, Journal(tmp_path / "j", {}, False), budget=300)
        enough = int(str(error.value).partition("at least ")[2].split(",")[0])
        search(tiny, Journal(tmp_path / "k", {}, False), budget=enough).run()


@pytest.mark.parametrize(
    ("key", "values", "text"),
    [
        ("accuracy", (-0.0001, -0.096, 0.0918), "+0.0 [-9.6, +9.2] within noise"),
        ("entropy", (-0.0002, -0.0006, -0.00003), "-0.0002 [-0.0006, -3e-05]"),
    ],
)
def test_a_difference_in_words(key, values, text):
    found = Difference(*values, p=0.5 if "noise" in text else 0.01, n=50)
    assert interval(found, key) == text and interval(found, key, mark=False) == text.removesuffix(" within noise")


class TestCommand:
    """`steerlens tune` as a process."""

    OPTIONS = (
        *("--method", "pasta", "--task", "conflict", "--length", "64", "--budget", "2000", "--controls", "2"),
        *("--profile", "20", "--validation", "30", "--test", "50"),
    )

    def command(self, output, *more):
        return [sys.executable, "-m", "steerlens.cli", "tune", *self.OPTIONS, "--output", str(output), *more]

    def run(self, output, *more):
        return subprocess.run(self.command(output, *more), capture_output=True, text=True, cwd=ROOT, timeout=600)

    def test_killed_and_resumed(self, tmp_path):
        done = self.run(tmp_path / "whole.yaml")
        assert done.returncode == 0, done.stderr
        assert "tuned against random heads" in done.stdout and "within noise" in done.stdout
        recipe = load_recipe(tmp_path / "whole.yaml")
        assert recipe.evidence.n == 50 and recipe.evidence.interval[0] > 0.2 and recipe.model.layers == 6
        report = json.loads((tmp_path / "whole.report.json").read_text())
        assert report["tuned_versus"]["baseline"]["accuracy"]["interval"] == pytest.approx(
            recipe.evidence.interval, abs=1e-4
        )
        top = Heads.parse(f"{tmp_path / 'whole.heads.json'}:top5")
        assert {layer for layer, _ in top.table} == {1} and (tmp_path / "whole.heads.png").stat().st_size > 1000

        output, journal = tmp_path / "parts.yaml", tmp_path / "parts.tune.jsonl"
        for number, lines in ((signal.SIGKILL, 6), (signal.SIGTERM, 20)):
            running = subprocess.Popen(
                self.command(output, "--resume"), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT
            )
            while running.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < lines):
                time.sleep(0.01)
            running.send_signal(number)
            _, said = running.communicate(timeout=60)
            assert running.returncode == (-9 if number == signal.SIGKILL else 128 + 15), said
        assert "run again with --resume" in said and not output.exists()
        done = self.run(output, "--resume")
        assert done.returncode == 0 and "going on: " in done.stderr
        parts = json.loads((tmp_path / "parts.report.json").read_text())
        assert parts == report
        assert output.read_text() == (tmp_path / "whole.yaml").read_text().replace("name: whole", "name: parts")

        refused = self.run(output)
        assert refused.returncode == 2 and "exists: go on with that search by --resume" in refused.stderr
        other = self.run(output, "--resume", "--seed", "4")
        assert other.returncode == 2 and "seed was 0, is 4" in other.stderr

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            (["--method", "pastaa"], "unknown method 'pastaa'"),
            (["--task", "conflikt"], "unknown task 'conflikt'"),
            (["--set", "alfa=3"], "pasta has no parameter 'alfa'"),
            (["--model", "no/model", "--set", "alpha=-1"], "pasta: alpha=-1 is out of range; allowed: a number > 0"),
            (["--method", "headmask", "--set", "mode=bad"], "headmask: mode='bad' is unknown; allowed: uniform, zero"),
            (["--budget", "100"], "--budget 100 is too small"),
            (["--heads", "9:1"], "layer 9 is out of range"),
            (["--task", "memory"], "pasta needs spans for emphasis"),
            (["--data", "x.jsonl"], "either --task T or --data"),
        ],
    )
    def test_wrong_calls(self, given, said, tmp_path):
        done = CliRunner().invoke(app, ["tune", *self.OPTIONS, "--output", str(tmp_path / "r.yaml"), *given])
        assert done.exit_code == 2 and said in done.stderr and not list(tmp_path.iterdir()), done.output

    @pytest.mark.parametrize("more", [[], ["--resume"]])
    @pytest.mark.parametrize("name", ["r.yaml", "r.report.json", "r.heads.json", "r.heads-up.json", "r.heads-up.png"])
    def test_a_file_that_no_search_wrote_stays(self, name, more, tmp_path):
        (tmp_path / name).write_text("mine")
        given = ["--method", "zerotuning", "--output", str(tmp_path / "r.yaml"), *more]
        done = CliRunner().invoke(app, ["tune", *self.OPTIONS, *given])
        assert done.exit_code == 2 and f"{name} exists" in done.stderr, done.output
        assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"

    def test_data_of_ones_own(self, tmp_path):
        rows = [
            {
                "prompt": f"The code of the {place} office is {i}417. The code of the {place} office is {i}032. "
                f"Question: What is the code of the {place} office? Answer:",
                "answer": f"{i}032",
                "emphasize": [f"is {i}032."],
            }
            for i in range(1, 10)
            for place in ("harbor", "garden", "river", "castle")
        ]
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        command = [sys.executable, "-m", "steerlens.cli", "tune", "--method", "pasta", "--data", str(data)]
        sizes = ["--profile", "8", "--validation", "8", "--test", "16", "--budget", "1200", "--heads", "1:*", "--json"]
        done = subprocess.run(
            [*command, *sizes, "--output", str(tmp_path / "r.yaml")],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["test"]["tuned"]["accuracy"] >= report["test"]["baseline"]["accuracy"]
        data.write_text('{"prompt": "a", "answr": "b"}\n')
        done = subprocess.run(
            [*command, "--output", str(tmp_path / "s.yaml")], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 2 and "rows.jsonl:1: unknown key 'answr'" in done.stderr
        assert "did you mean 'answer'" in done.stderr
