"""DeCoRe: published logits, the numbers of methods/heads.md §2h, and modes of generation against a loop by hand."""

import json
import math
import threading
from pathlib import Path

import pytest
import torch
from modes import apart, assert_same, greedy, positions, whole
from safetensors.torch import load_file
from small_models import build
from transformers import AutoModelForCausalLM, DynamicCache, LogitsProcessorList, StaticCache, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import steerlens
from steerlens import caches
from steerlens.errors import MethodError, SteeringStateError, UnsupportedError
from steerlens.methods import ACT, PASTA, HeadMask, ZeroTuning, from_dict
from steerlens.methods.decore import DeCoRe

ROOT = Path(__file__).parent / "golden"
CASES = {c["case"]: c for c in json.loads((ROOT / "decore.json").read_text())["cases"]}
HEADS = {0: [1, 2], 2: "*"}


@pytest.fixture(scope="module")
def published():
    return {
        name: AutoModelForCausalLM.from_pretrained(ROOT / "models" / name).eval() for name in ("llama_mha", "llama_gqa")
    }


def method_of(settings, **more):
    heads = {}
    for layer, head in settings["masked_heads"]:
        heads.setdefault(layer, []).append(head)
    if settings["steering"] == "DeCoReVanilla":
        return DeCoRe(heads, "static", alpha=settings["alpha"], **more)
    return DeCoRe(heads, "entropy", cap=settings["alpha_cap"], scale=settings["scale_alpha"], **more)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_published_generation(name, backend, published):
    case = CASES[name]
    data, model = load_file(ROOT / case["file"]), published[case["model"]]
    steps = data["generated_ids"].shape[1]
    with steerlens.steer(model, method_of(case["settings"]), backend=backend):
        got = greedy(model, data["input_ids"], max_new_tokens=steps, eos_token_id=None)
    assert torch.equal(got.sequences[:, -steps:], data["generated_ids"])
    assert (torch.stack(got.logits, 1) - data["step_logits"]).abs().max() < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_published_score(name, published):
    """Published log-likelihoods mask the whole text, and are of the renormalised mix where `post_softmax`."""
    case = CASES[name]
    data, model = load_file(ROOT / case["file"]), published[case["model"]]
    ids, prompt = torch.cat([data["input_ids"], data["answer_ids"]], 1), data["input_ids"].shape[1]
    method = method_of(case["settings"], phase="all")
    got = method.score(model, {"input_ids": ids}, None)
    if case["settings"]["post_softmax"]:
        assert got[0, prompt - 1 :].sum().item() == pytest.approx(data["lm_score"].item(), abs=1e-4)
    else:
        with torch.no_grad():
            base = model(ids).logits[0].log_softmax(-1)
            with steerlens.steer(model, HeadMask(method.heads)):
                masked = model(ids).logits[0].log_softmax(-1)
        mixed = method.mix(torch.stack([base, masked]))[prompt - 1 : -1]
        assert mixed.gather(1, data["answer_ids"].T).sum().item() == pytest.approx(data["lm_score"].item(), abs=1e-4)


class TestOracle:
    """methods/heads.md §2h."""

    BASE, MASKED = (2.0, 1.0, 0.0, -1.0), (1.5, -1.0, 1.0, 0.0)

    def mix(self, method, base=BASE, masked=MASKED):
        return method.mix(torch.tensor([base, masked]))

    @pytest.mark.parametrize(
        ("method", "expected", "probabilities"),
        [
            (
                DeCoRe("0:0", "static"),
                (-0.336276, -0.586276, -3.086276, -4.086276),
                (0.535835, 0.417309, 0.034255, 0.012602),
            ),
            (DeCoRe("0:0"), (-0.243266, 0.178040, -3.664571, -4.664571), (0.389311, 0.593291, 0.012719, 0.004679)),
            (DeCoRe("0:0", scale=True), (-0.298139, -0.272884, -3.323394, -4.323394), None),
            (
                DeCoRe("0:0", cap=0.5),
                (-0.336276, -0.586276, -3.086276, -4.086276),
                None,
            ),
        ],
    )
    def test_scores(self, method, expected, probabilities):
        got = self.mix(method)
        assert (got - torch.tensor(expected)).abs().max() < 2e-6
        if probabilities:
            assert (got.softmax(-1) - torch.tensor(probabilities)).abs().max() < 2e-6

    def test_entropy_gain(self):
        """Its weight is the gain: here it is found back from two tokens' scores."""
        got = self.mix(DeCoRe("0:0", "entropy_gain"))
        p, q = (torch.tensor(x).log_softmax(-1) for x in (self.BASE, self.MASKED))
        weight = (got - p) / (p - q)
        assert (weight - 0.141529).abs().max() < 1e-5

    def test_implausible_tokens(self):
        base, masked = (3.0, 2.9, -4.0), (3.0, 2.9, -16.0)
        assert self.mix(DeCoRe("0:0"), base, masked).argmax() == 2
        kept = self.mix(DeCoRe("0:0", apc_beta=0.1), base, masked)
        assert kept.argmax() == 0 and kept[2] == -math.inf

    def test_score_of_an_answer(self):
        rows = torch.tensor([[self.BASE, (0.0, 1.0, 2.0, 0.0)], [self.MASKED, (0.5, 1.0, 0.0, 0.0)]])
        answer = torch.tensor([[0], [2]])
        got = DeCoRe("0:0").mix(rows)
        assert got.gather(1, answer).sum().item() == pytest.approx(0.686348, abs=2e-6)
        assert got.log_softmax(-1).gather(1, answer).sum().item() == pytest.approx(-1.012545, abs=2e-6)


@torch.no_grad()
def by_hand(model, method, ids, mask, tokens, outer=(), spans=None, other=None):
    """Mixed logits per step from two caches, each branch alone, over the tokens generated."""
    branches = []
    for masked in (False, True):
        one = other if masked and other is not None else model
        methods = [*outer, *([HeadMask(method.heads, phase=method.phase)] if masked else [])]
        with steerlens.steer(one, methods, spans if one is model else None, backend="reference"):
            longer, cache, logits = mask, None, []
            part, at = ids, positions(mask)
            for column in [*tokens.T, None]:
                out = one(part, attention_mask=longer, position_ids=at, **{caches.NAME: cache})
                logits.append(out.logits[:, -1])
                if column is not None:
                    longer, cache, part = whole(longer, 1), caches.find(out), column[:, None]
                    at = positions(longer)[:, -1:]
            branches.append(torch.stack(logits[:-1]))
    return method.mix(torch.stack(branches))


METHODS = {
    "entropy": DeCoRe(HEADS),
    "static": DeCoRe(HEADS, "static", alpha=1.0),
    "gain": DeCoRe(HEADS, "entropy_gain", phase="all"),
    "whole": DeCoRe(HEADS, phase="all", scale=True),
    "plausible": DeCoRe(HEADS, apc_beta=0.1),
}
SPANS = [[(9, 12)], [(10, 13), (15, 16)], [(8, 11)]]


def generate(model, methods, spans, ids, mask=None, **options):
    with steerlens.steer(model, methods, spans):
        return greedy(model, ids, mask, **options)


def near(got, expected):
    got = torch.stack(got) if isinstance(got, tuple) else got
    assert torch.equal(got.isinf(), expected.isinf())
    return apart(got.nan_to_num(neginf=0), expected.nan_to_num(neginf=0)) < 1e-4


class TestGenerate:
    @pytest.mark.parametrize("name", METHODS)
    @pytest.mark.parametrize("family", ["llama-gqa", "mistral"])
    def test_is_two_branches(self, family, name, model_of, prompts):
        model, (ids, mask) = model_of(family), prompts("left")
        got = generate(model, METHODS[name], None, ids, mask)
        tokens = got.sequences[:, 20:]
        expected = by_hand(model, METHODS[name], ids, mask, tokens)
        assert near(got.logits, expected) and torch.equal(expected.argmax(-1).T, tokens)
        assert apart(got.logits, torch.stack(greedy(model, ids, mask).logits).log_softmax(-1)) > 1e-3

    @pytest.mark.parametrize(
        "options",
        [{"use_cache": False}, {"prefill_chunk_size": 7}, {"cache_implementation": "static"}, {}],
        ids=["none", "chunks", "static", "given"],
    )
    @pytest.mark.parametrize("name", ["entropy", "whole"])
    def test_caches(self, name, options, model, prompts):
        ids, mask = prompts("left")
        plain = generate(model, METHODS[name], None, ids, mask)
        options = options or {caches.NAME: DynamicCache(config=model.config)}
        got = generate(model, METHODS[name], None, ids, mask, **options)
        assert_same(got, plain)
        cache = caches.find(got)  # of a static cache's rows none can be taken alone
        assert cache is None if {"use_cache", "cache_implementation"} & set(options) else len(cache.layers[0].keys) == 3

    @pytest.mark.parametrize("outer", [PASTA(0.05), ACT(0.0, 0.08), ZeroTuning(3.0)], ids=lambda m: m.name)
    @pytest.mark.parametrize("name", ["entropy", "whole"])
    def test_other_methods_steer_both_branches(self, name, outer, model, prompts):
        ids, mask = prompts("left")
        got = generate(model, [outer, METHODS[name]], SPANS, ids, mask)
        expected = by_hand(model, METHODS[name], ids, mask, got.sequences[:, 20:], [outer], SPANS)
        assert near(got.logits, expected)
        assert apart(got.logits, generate(model, METHODS[name], None, ids, mask).logits) > 1e-3

    def test_the_prompt_is_read_once(self, model, prompts):
        ids, _ = prompts(None)
        shapes = []
        hook = model.model.register_forward_pre_hook(
            lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        try:
            for name in ("entropy", "whole"):
                generate(model, METHODS[name], None, ids, max_new_tokens=2)
        finally:
            hook.remove()
        assert shapes == [(3, 19), (6, 1), (6, 1), (6, 20), (6, 1)]

    def test_sampling_several_sequences(self, model, prompts):
        ids, mask = prompts("left")
        torch.manual_seed(3)
        options = {"do_sample": True, "num_return_sequences": 2, "temperature": 0.7, "top_k": 5, "top_p": None}
        got = generate(model, METHODS["entropy"], None, ids, mask, **options)
        repeated = [x.repeat_interleave(2, 0) for x in (ids, mask)]
        expected = by_hand(model, METHODS["entropy"], *repeated, got.sequences[:, 20:])
        assert near(got.logits, expected)
        kept = torch.stack(got.scores).isfinite()
        assert (kept.sum(-1) == 5).all() and torch.equal(kept, (expected >= expected.topk(5).values[..., -1:]))

    def test_processors_stops_and_ends_per_row(self, model, prompts):
        ids, mask = prompts("left")
        plain = generate(model, METHODS["entropy"], None, ids, mask).sequences[:, 20:]
        end = int(plain[1, 2])

        class Stop(StoppingCriteria):
            def __call__(self, ids, scores, **kwargs):
                return torch.full((len(ids),), ids.shape[1] >= 26, device=ids.device)

        seen = []

        def processor(tokens, scores):
            seen.append(scores.clone())
            return scores

        options = {
            "eos_token_id": end,
            "stopping_criteria": [Stop()],
            "logits_processor": LogitsProcessorList([processor]),
        }
        got = generate(model, METHODS["entropy"], None, ids, mask, **options)
        assert apart(tuple(seen), got.logits) == 0
        for row, tokens in enumerate(got.sequences[:, 20:].tolist()):
            expected = plain[row, :6].tolist()
            stop = expected.index(end) + 1 if end in expected else 6
            assert tokens == expected[:stop] + [0] * (len(tokens) - stop)

    def test_a_streamer_in_another_thread(self, model, row):
        class Collect(BaseStreamer):
            def __init__(self):
                self.tokens = []

            def put(self, value):
                self.tokens += value.view(-1).tolist()

            def end(self):
                self.tokens.append("end")

        streamer = Collect()
        plain = generate(model, METHODS["entropy"], None, row).sequences[0].tolist()
        with steerlens.steer(model, METHODS["entropy"]):
            thread = threading.Thread(target=greedy, args=(model, row), kwargs={"streamer": streamer})
            thread.start()
            thread.join(60)
        assert streamer.tokens == [*plain, "end"]

    def test_the_returned_cache_is_the_first_branch(self, model, prompts):
        ids, mask = prompts("left")
        got = generate(model, METHODS["entropy"], None, ids, mask, output_hidden_states=True)
        tokens = got.sequences
        with torch.no_grad():
            longer = whole(mask, 8)
            expected = model(tokens, attention_mask=longer, position_ids=positions(longer))
            again = model(
                tokens[:, -1:],
                attention_mask=longer,
                position_ids=positions(longer)[:, -1:],
                **{caches.NAME: caches.find(got)},
            )
        assert apart(again.logits[:, -1], expected.logits[:, -1]) < 1e-4
        assert got.hidden_states[0][0].shape[:2] == (3, 20)

    @pytest.mark.parametrize("name", ["entropy", "whole"])
    @torch.no_grad()
    def test_goes_on_with_a_cache(self, name, model, prompts):
        """Of an earlier turn: both branches begin with it as it is."""
        ids, _ = prompts(None)
        cache = caches.find(model(ids[:, :12]))
        got = generate(model, METHODS[name], None, ids, torch.ones_like(ids), **{caches.NAME: cache})
        assert cache.get_seq_length() == 27 and cache.layers[0].keys.shape[0] == 3
        logits = [model(ids).logits[:, -1]]
        twin = caches.find(model(ids[:, :12]))
        with steerlens.steer(model, HeadMask(HEADS, phase=METHODS[name].phase)):
            logits.append(model(ids[:, 12:], **{caches.NAME: twin}).logits[:, -1])
        assert near(got.logits[0], METHODS[name].mix(torch.stack(logits)))

    def test_guidance_leaves_the_other_prompt_alone(self, model, prompts):
        ids, mask = prompts("left")
        got = generate(model, METHODS["entropy"], None, ids, mask, guidance_scale=3.0)
        tokens = got.sequences[:, 20:]
        mixed = by_hand(model, METHODS["entropy"], ids, mask, tokens).log_softmax(-1)
        with torch.no_grad():
            for step in range(8):
                other = model(torch.cat([ids[:, -1:], tokens[:, :step]], 1)).logits[:, -1].log_softmax(-1)
                expected = 3 * (mixed[step] - other) + other
                assert apart(got.scores[step], expected) < 1e-4

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_beams": 2}, "num_beams=2"),
            ({"custom_generate": lambda model, **kwargs: None}, "custom_generate=function"),
            ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
            ({"assistant_early_exit": 1}, "assistant_early_exit"),
        ],
    )
    def test_what_it_refuses(self, options, message, model, row):
        with steerlens.steer(model, METHODS["entropy"]):
            with pytest.raises(UnsupportedError, match=message):
                greedy(model, row, **options)
            with pytest.raises(SteeringStateError, match="score"):
                model(row)
            after = greedy(model, row)
        assert "forward" not in vars(model) and "generate" not in vars(model)
        assert_same(after, generate(model, METHODS["entropy"], None, row))

    def test_a_cache_whose_rows_cannot_be_repeated(self, model, row):
        with pytest.raises(UnsupportedError, match="a StaticCache of such layers"):
            generate(model, METHODS["whole"], None, row, **{caches.NAME: StaticCache(model.config, max_cache_len=40)})

    def test_an_error_inside_leaves_the_model_as_it_was(self, model, row):
        def fail(tokens, scores):
            raise ZeroDivisionError

        before = set(vars(model)), set(vars(model.model))
        with pytest.raises(ZeroDivisionError):
            generate(model, METHODS["entropy"], None, row, logits_processor=LogitsProcessorList([fail]))
        assert (set(vars(model)), set(vars(model.model))) == before

    def test_inside_a_wrapper(self, model_of, row):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(build("llama-gqa"), config).eval()
        got = generate(model, METHODS["entropy"], None, row)
        merged = model.merge_and_unload()
        assert_same(got, generate(merged, METHODS["entropy"], None, row))
        assert apart(got.logits, generate(model_of("llama-gqa"), METHODS["entropy"], None, row).logits) > 1e-3

    def test_captured_rows_are_the_branches(self, model, row):
        with steerlens.capture(model, stats=("lse",)) as record:
            generate(model, METHODS["entropy"], None, row, max_new_tokens=3)
        assert record[0].lse.shape == (2, 8, 22)

    def test_without_steer(self, model, row):
        got = METHODS["entropy"].generate(model, {"input_ids": row}, None, max_new_tokens=8, do_sample=False)
        assert torch.equal(got, generate(model, METHODS["entropy"], None, row).sequences)

    @pytest.mark.parametrize("method", [DeCoRe(HEADS, "static", alpha=0), DeCoRe({})], ids=["alpha 0", "no heads"])
    def test_neutral_is_native(self, method, model, prompts):
        ids, mask = prompts("left")
        got, expected = generate(model, method, None, ids, mask), greedy(model, ids, mask)
        assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))
        with torch.no_grad():
            native = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        assert torch.equal(method.score(model, {"input_ids": ids}, None), native)


@pytest.fixture(scope="module")
def small():
    return build("llama-mha", num_hidden_layers=2, hidden_size=32)


class TestLite:
    @pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 7}], ids=str)
    @pytest.mark.parametrize("phase", ["decode", "all"])
    def test_is_the_smaller_model_masked(self, phase, options, model, small, prompts):
        ids, mask = prompts("left")
        method = DeCoRe("1:*", phase=phase, amateur=small)
        got = generate(model, method, None, ids, mask, **options)
        expected = by_hand(model, method, ids, mask, got.sequences[:, 20:], other=small)
        assert near(got.logits, expected)
        assert not any(name in vars(small) for name in ("generate", "forward"))

    def test_from_a_folder(self, model, small, row, tmp_path):
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        small.save_pretrained(tmp_path)
        words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<s>").save_pretrained(tmp_path)
        named = DeCoRe("1:*", amateur=str(tmp_path))
        assert from_dict(named.to_dict()) == named
        assert_same(generate(model, named, None, row), generate(model, DeCoRe("1:*", amateur=small), None, row))

    def test_what_does_not_fit(self, model, row):
        with pytest.raises(MethodError, match=r"vocabulary of 50 tokens.* of 97"):
            generate(model, DeCoRe("1:*", amateur=build("llama-mha", vocab_size=50)), None, row)


class TestScore:
    @pytest.mark.parametrize("name", METHODS)
    def test_is_generation_teacher_forced(self, name, model, prompts):
        ids, mask = prompts("left")
        method = METHODS[name]
        got = generate(model, method, None, ids, mask)
        longer = whole(mask, 8)
        lengths = mask.sum(1).tolist()
        inputs = {"input_ids": got.sequences, "attention_mask": longer}
        with steerlens.steer(model, method, prompt_lengths=lengths):
            scores = method.score(model, inputs, None)
            with pytest.raises(SteeringStateError):
                model(ids)
        assert scores.shape == (3, 27)
        mixed = torch.stack(got.logits, 1).log_softmax(-1)
        expected = mixed.gather(2, got.sequences[:, 20:, None])[..., 0]
        assert apart(scores[:, 19:], expected) < 1e-4

    def test_rows_alone(self, model, prompts):
        ids, mask = prompts("left")
        method = METHODS["whole"]
        together = method.score(model, {"input_ids": ids, "attention_mask": mask}, None)
        for row, length in enumerate((20, 13, 17)):
            alone = method.score(model, {"input_ids": ids[row : row + 1, 20 - length :]}, None)
            assert apart(together[row, 20 - length :], alone[0]) < 1e-4

    def test_must_know_the_prompt(self, model, row):
        with steerlens.steer(model, METHODS["entropy"]), pytest.raises(SteeringStateError, match="prompt_lengths"):
            METHODS["entropy"].score(model, {"input_ids": row}, None)
        assert "_steerlens_engine" not in vars(model.model)


def test_a_control_masks_other_heads(model, row):
    method = DeCoRe(HEADS, control=1)
    drawn = method.branches(model)[1].methods[0].heads.table
    assert len([h for _, heads in drawn for h in heads]) == 10
    assert not any(layer == 2 or (layer == 0 and {1, 2} & set(heads)) for layer, heads in drawn)
    again = generate(model, DeCoRe(HEADS, control=1), None, row)
    assert_same(again, generate(model, method, None, row))
    assert apart(again.logits, generate(model, METHODS["entropy"], None, row).logits) > 1e-3


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"mode": "entropi"}, "did you mean 'entropy'"),
        ({"apc_beta": 1}, "leaves no token"),
        ({"cap": 0}, "cap=0"),
        ({"scale": "yes"}, "scale='yes'"),
        ({"control": 0.5}, "control=0.5"),
        ({"amateur": 3}, "amateur=3"),
    ],
)
def test_bad_parameters(parameters, message):
    with pytest.raises(MethodError, match=message):
        DeCoRe("0:1", **parameters)


def test_published_recipes_mask_the_heads_of_the_masked_branch():
    for count in (10, 50):
        name = f"llama-3-8b-instruct-{count}heads"
        [contrast], [mask] = (steerlens.load_recipe(f"{kind}-{name}").methods for kind in ("decore", "headmask"))
        assert contrast.branches(None)[1].methods == (mask,)


def test_what_the_neutral_strength_is_of():
    assert DeCoRe("0:1", "static").search["alpha"].neutral == 0 and not DeCoRe("0:1").search
