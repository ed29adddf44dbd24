"""Measures on the rows that produce a response: lookback, contextual, sra; methods/heads.md §3, §5, §8."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import steerlens
from steerlens import models
from steerlens.examples import Example, ExampleError
from steerlens.measures import contextual, lookback, sra
from steerlens.measures.base import MeasureError
from steerlens.measures.responses import Forced, answer_ids, forced

GOLDEN = Path(__file__).parent / "golden"
ROWS = torch.tensor([[0.4, 0.1, 0.1, 0.1, 0.1, 0.2, 0.0], [0.3, 0.1, 0.1, 0.1, 0.2, 0.1, 0.1]])


def close(got, expected, tolerance=1e-6):
    assert (torch.as_tensor(got) - torch.tensor(expected)).abs().max() < tolerance


class TestFormulas:
    def test_lookback_ratio(self):
        keys, new = torch.tensor(4.0), torch.tensor([2.0, 3.0])
        found = lookback.ratio(ROWS[:, :4].sum(-1), keys, ROWS[:, 4:].sum(-1), new)
        close(found, [0.538462, 0.529412])
        close(found.mean(), 0.533937, 2e-6)
        own = torch.tensor([0.2, 0.1])
        close(lookback.ratio(ROWS[:, 1:4].sum(-1), keys - 1, ROWS[:, 4:].sum(-1) - own, new - 1), [0.5, 0.4])

    def test_lookback_ratio_from_logits(self):
        s, n, m = torch.tensor([1, 0.2, -0.3, 0.1, 0.5, 1.2]), torch.tensor(4.0), torch.tensor(2.0)
        a = s.softmax(-1)
        close(lookback.ratio(a[:4].sum(), n, a[4:].sum(), m), 0.367967)
        # the form by log-sum-exps, of which the softmax's normaliser cancels
        close(torch.sigmoid(s[:4].logsumexp(-1) - n.log() - s[4:].logsumexp(-1) + m.log()), 0.367967)

    def test_a_row_without_new_keys_has_no_ratio(self):
        assert lookback.ratio(torch.tensor(1.0), torch.tensor(4.0), torch.tensor(0.0), torch.tensor(0.0)).isnan()

    def test_contextual(self):
        rows = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.3, 0.3, 0.3, 0.1]])
        close(contextual.score(rows[:, 1:3].sum(-1)), 0.5)
        close(contextual.context_dependency(torch.tensor([[0.3, 0.5], [0.2, 0.7], [0.6, 0.1]]).T), 0.6)

    def test_sra(self):
        first = torch.tensor([[0.5, 0.5], [0.2, 0.4]])  # [L, R]
        third, fourth = torch.tensor([[0.2, 0.1], [0.3, 0.2]]), torch.tensor([[0.1, 0.1], [0.2, 0.1]])
        close(sra.aggregate(third + fourth, first, 2), 0.265625)
        close(sra.aggregate(third + fourth, first, 2).log(), -1.325670)
        close(sra.aggregate(third, first, 1), 0.327083)
        close((third + fourth).mean() / 2, 0.1625)


@pytest.mark.parametrize("case", ["greedy1", "teacher_forced1"])
@pytest.mark.parametrize("name", ["llama_mha", "llama_gqa"])
def test_published_lookback_ratios(name, case):
    """The released code's ratios, alone and in a padded batch; the last prompt token is its answer prefix."""
    data = load_file(GOLDEN / f"lookback__{name}_{case}.safetensors")
    prompt, response = data["input_ids"][0].tolist(), data["generated_ids"][0].tolist()
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "models" / name).eval()
    spans = [(3, len(prompt) - 1)]
    alone = Forced.of([prompt], [response], {"context": [spans]})
    padded = Forced.of([prompt[5:], prompt], [response[:2], response], {"context": [[(1, 4)], spans]})
    for batch in (alone, padded):
        found = lookback.ratios(model, batch)
        got = torch.stack([found[layer][-1] for layer in range(4)])
        assert (got - data["lookback_ratio"]).abs().max() < 1e-5


def weights_of(model, batch):
    with torch.no_grad():
        return model(
            batch.ids,
            attention_mask=batch.mask,
            position_ids=(batch.mask.cumsum(1) - 1).clamp(min=0),
            output_attentions=True,
        ).attentions


@pytest.fixture
def batch(prompts):
    """Two prompts of 15 and 9 tokens with responses of 4 and 2."""
    ids = prompts(None, lengths=(20,))[0][0].tolist()
    groups = {"context": [[(2, 9)], [(0, 3), (4, 6)]], "gold": [[(3, 5), (4, 6)], [(1, 2)]]}
    return Forced.of([ids[:15], ids[3:12]], [ids[15:19], ids[12:14]], groups)


@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "gpt2"])
def test_masses_are_those_of_the_weights(family, model_of, batch):
    model = model_of(family, "eager")
    a = weights_of(model, batch)
    gold = batch.mass(model, batch.groups)
    for exclude in (False, True):
        found = lookback.ratios(model, batch, exclude)
        for layer in range(3):
            for row, first, stop, count in ((0, 0, 9, 4), (1, 8, 14, 2)):
                for r in range(count):
                    column = 18 - count + r
                    w = a[layer][row, :, column]
                    lo, hi = first + exclude, column + 1 - exclude
                    one, other = w[:, lo:stop].mean(-1), w[:, stop:hi].mean(-1)
                    assert (found[layer][row][:, r] - one / (one + other)).abs().max() < 1e-5
                inside = [3, 4, 5] if row == 0 else [first + 1]
                rows = slice(18 - count, 18)
                mass = gold[layer].mass[row, :, -count:, gold.groups.index("gold")]
                assert (mass - a[layer][row, :, rows, inside].sum(-1)).abs().max() < 1e-5


def test_masses_of_layers_that_leave_out_rows(batch):
    """gemma4's layers that share keys compute the rows alone whose logits are kept."""
    kinds = ["sliding_attention", "full_attention"] * 2
    config = AutoConfig.for_model(
        "gemma4_text",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=8,
        vocab_size=97,
        vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=8,
        num_key_value_heads=2,
        global_head_dim=8,
        layer_types=kinds,
        num_kv_shared_layers=2,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    expected, record = weights_of(model, batch), batch.mass(model, batch.groups)
    gold = record.groups.index("gold")
    for layer in range(4):
        mass = record[layer].mass[0, :, -4:, gold]
        assert (mass - expected[layer][0, :, -4:, 3:6].sum(-1)).abs().max() < 1e-5


@pytest.fixture(scope="module")
def tiny():
    return models.load("tiny", "cpu")


def examples_of(task, count=6, length=64):
    from steerlens.evals.examples import generate

    return generate(task, count, first_seed=200_000, length=length)


class TestTiny:
    @pytest.mark.parametrize("measure", [contextual.measure, sra.measure], ids=["contextual", "sra"])
    def test_the_retrieval_heads_are_found(self, tiny, measure):
        found = measure(*tiny, examples_of("lookup" if measure is contextual.measure else "conflict"))
        assert found.top(7) == {1: [1, 2, 3, 4, 5, 6, 7]}
        assert found.summary["answered"] == 6

    @pytest.mark.parametrize("module", [lookback, contextual, sra], ids=lambda module: module.__name__[19:])
    def test_batches_do_not_matter(self, tiny, module):
        """Prompts and answers of several lengths: beside the rows that count there are pads and rows of prompts."""
        examples = [e for n in (40, 64) for e in examples_of("conflict", 2, n)]
        for i in (1, 2):
            examples[i] = dataclasses.replace(examples[i], answer=f"{examples[i].answer}{' or not' * i}")
        found = [module.measure(*tiny, examples, teacher_forced=True, batch_size=size) for size in (1, 4)]
        for head, values in found[0].scores.items():
            assert found[1].scores[head] == pytest.approx(values, abs=1e-4)
        numbers = [[v for v in side.summary.values() if isinstance(v, float)] for side in found]
        assert numbers[1] == pytest.approx(numbers[0], abs=1e-3)

    def test_own_answers_that_are_right_are_the_forced_ones(self, tiny):
        model, tokenizer = tiny
        given = {"groups": ("gold",), "batch_size": 6}
        one, other = (
            list(forced("x", model, tokenizer, examples_of("needle"), teacher_forced=side, **given))
            for side in (False, True)
        )
        assert one[0].responses == other[0].responses and torch.equal(one[0].ids, other[0].ids)
        assert one[0].groups == other[0].groups

    def test_answers_with_several_tokens_and_chats(self, tiny):
        _, tokenizer = tiny
        text = Example("Question: What is the code of the harbor office? Answer:", "9032")
        prompt = steerlens.encode(tokenizer, text.prompt)[0]["input_ids"][0].tolist()
        found = answer_ids(tokenizer, text, prompt)
        assert len(found) == 2 and tokenizer.decode(found).strip() == "9032"
        chat = Example(({"role": "user", "content": "What is the code of the harbor office?"},), "9032")
        assert tokenizer.decode(answer_ids(tokenizer, chat, [])).strip() == "9032"

    @pytest.mark.parametrize("end", [":", ": ", ":\n", ": ("])
    def test_an_answer_stands_right_behind_its_prompt(self, tiny, end):
        """With one space between them unless there is white space, however that is tokenised with either."""
        _, tokenizer = tiny
        example = Example(f"Question: What is the code of the harbor office? Answer{end}", "9032")
        prompt = steerlens.encode(tokenizer, example.prompt)[0]["input_ids"][0].tolist()
        whole = tokenizer.decode(prompt + answer_ids(tokenizer, example, prompt), skip_special_tokens=True)
        assert whole == f"{example.prompt}{'' if end[-1].isspace() else ' '}9032"

    def test_sra_summary(self, tiny):
        found = sra.measure(*tiny, examples_of("conflict"), teacher_forced=True)
        count = found.summary
        assert count["log_sra_paper_formula"] < count["log_sra"] < 0 < count["mass"] < 1
        assert count["mass_over_uninformed"] > 1

    def test_missing_parts_are_named(self, tiny):
        bare = Example("The mascot of Elmford is a fox. Question: What is it? Answer:")
        with pytest.raises(ExampleError, match=r"contextual needs a group 'gold'.*example 1 .*'The mascot"):
            contextual.measure(*tiny, [bare])
        with pytest.raises(ExampleError, match=r"needs an 'answer' and a group 'context'"):
            lookback.measure(*tiny, [bare], teacher_forced=True)

    def test_no_response(self, tiny, monkeypatch):
        monkeypatch.setattr("steerlens.measures.responses.greedy", lambda *a: [[]] * 6)
        with pytest.raises(MeasureError, match=r"answered none of the 6 prompts .*--teacher-forced"):
            lookback.measure(*tiny, examples_of("needle"))

    def test_nothing_behind_the_context(self, tiny):
        prompt = "The mascot of Elmford is a fox."
        example = Example(prompt, "blue", groups={"context": (prompt,)})
        with pytest.raises(MeasureError, match="no row sees a key behind the context"):
            lookback.measure(*tiny, [example], teacher_forced=True)
