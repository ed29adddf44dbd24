"""Batches of documents under several steerings: what the model gives, what is shared, and what goes wrong alone."""

import copy
import gc
import math
from dataclasses import dataclass

import pytest
import torch
from small_models import NO_SDPA, build
from steerlens.evals import runner as running
from steerlens.evals import task as tasks
from steerlens.evals.batch import length
from steerlens.evals.doc import Doc, Steering
from steerlens.evals.examples import generate, of
from steerlens.evals.runner import Runner, RunnerError, validate
from steerlens.evals.world import probe
from steerlens.evals.world.tasks import follows
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from steerlens import decoder, models
from steerlens.encoding import Tokens
from steerlens.errors import HeadError, UnsupportedError
from steerlens.examples import Example
from steerlens.methods import ACT, PASTA, HeadMask, ZeroTuning
from steerlens.methods.base import DecodingMethod, PromptMethod
from steerlens.spans import Spans

BASELINE = Steering("baseline", role="baseline")


@dataclass(frozen=True)
class Task:
    name: str = "words"
    output: str = "generate"
    max_new_tokens: int = 8
    stop: tuple[str, ...] = ()
    chat: bool = False
    groups: frozenset[str] = frozenset({"emphasis"})


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


@pytest.fixture
def frozen():
    """What is loaded so far is not looked through whenever memory is freed."""
    gc.freeze()
    yield
    gc.unfreeze()


def docs_of(examples, **more) -> list[Doc]:
    return [Doc("words", 0, i, example, **more) for i, example in enumerate(examples)]


def word_docs(lengths=(30, 19, 24, 30), **more) -> list[Doc]:
    """Word prompts of several lengths, each with an emphasised range."""
    prompts = [" ".join(f"w{(7 * k + i * (3 + k)) % 94}" for i in range(n)) for k, n in enumerate(lengths)]
    return docs_of([Example(p, groups={"emphasis": (Tokens(14, 17),)}) for p in prompts], **more)


def world_docs(task: str, count: int = 24, length: int = 96) -> list[Doc]:
    return [Doc(task, 0, i, example) for i, example in enumerate(generate(task, count, length=length))]


def outputs(outcomes):
    assert [o.error for o in outcomes] == [None] * len(outcomes)
    return [o.output for o in outcomes]


def assert_same(some, others, tolerance=1e-5):
    for one, other in zip(outputs(some), outputs(others), strict=True):
        assert (one.texts, one.lengths, one.greedy) == (other.texts, other.lengths, other.greedy)
        assert one.logprob == pytest.approx(other.logprob, abs=tolerance, nan_ok=True)
        assert one.logprobs == pytest.approx(other.logprobs, abs=tolerance)


@dataclass(frozen=True)
class Plain(DecodingMethod):
    """The model itself, as a decoding method."""

    name = "plain"

    def generate(self, model, inputs, spans, **kwargs):
        return model.generate(**inputs, **kwargs)

    def score(self, model, inputs, spans):
        mask = inputs["attention_mask"]
        logits = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, :-1]
        return logits.log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None])[..., 0]


@dataclass(frozen=True)
class Swap(PromptMethod):
    """Puts another token at the place of the emphasised ones."""

    token: int = 50
    name = "swap"
    needs = ("emphasis",)

    def prepare(self, inputs, spans):
        ids = inputs["input_ids"].clone()
        for row, ranges in zip(ids, spans.groups["emphasis"], strict=True):
            for start, stop in ranges:
                row[start:stop] = self.token
        return {**inputs, "input_ids": ids}, Spans(spans.groups)


class TestTexts:
    def test_the_world_is_answered_as_the_probe_does(self, tiny):
        """Unsteered and steered, in batches that are padded; PASTA on the asked statement settles conflicts."""
        from steerlens.evals.world.tasks import sample

        samples = [sample("conflict", seed, 96) for seed in range(24)]
        docs = docs_of([of(row) for row in samples])
        task = Task("conflict", max_new_tokens=14, stop=("\n",))
        pasta = PASTA(0.01, heads={1: [0, 3]})
        found = Runner(*tiny).run(task, docs, [BASELINE, Steering("pasta", (pasta,))])
        assert [o.text for o in outputs(found["baseline"])] == probe.answers(*tiny, samples)
        assert [o.text for o in outputs(found["pasta"])] == probe.answers(*tiny, samples, pasta)
        right = {
            label: sum(follows(o.text, d.example.answer) for o, d in zip(outputs(outcomes), docs, strict=True))
            for label, outcomes in found.items()
        }
        assert right["pasta"] > right["baseline"] + 5

    @torch.no_grad()
    def test_logprob_is_that_of_the_text_up_to_its_end(self, tiny):
        """By hand: the text's tokens and EOS behind the prompt, in one forward of the row alone."""
        model, tokenizer = tiny
        docs = world_docs("lookup", 6)
        found = outputs(Runner(*tiny).run(Task(max_new_tokens=14), docs, [BASELINE])["baseline"])
        for doc, output in zip(docs, found, strict=True):
            prompt = tokenizer(doc.example.prompt)["input_ids"]
            ids = torch.tensor([tokenizer(doc.example.prompt + output.text)["input_ids"] + [tokenizer.eos_token_id]])
            logs = model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
            by_hand = logs.gather(1, ids[0, len(prompt) :, None]).sum()
            assert output.lengths == (ids.shape[1] - len(prompt),)
            assert output.logprob == pytest.approx(float(by_hand), abs=1e-4)

    def test_stop(self, words, model_of):
        """The text is cut before the first stop, its tokens and their probability end with it, in each row alone."""
        runner, docs = Runner(model_of("llama-gqa"), words), word_docs()
        whole = outputs(runner.run(Task(), docs, [BASELINE])["baseline"])
        assert {o.lengths for o in whole} == {(8,)}
        first, second = whole[0].text.split(), whole[1].text.split()
        stops = (first[2], f"{second[3]} {second[4]}", "nothing")
        calls = []
        hook = runner.model.register_forward_hook(lambda *_: calls.append(1))
        cut = outputs(runner.run(Task(stop=stops), docs[:2], [BASELINE])["baseline"])
        hook.remove()
        for full, part in zip(whole, cut, strict=False):
            places = [full.text.find(stop) for stop in stops if stop in full.text]
            assert part.text == full.text[: min(places)]
            shorter = Task(max_new_tokens=part.lengths[0])
            alone = outputs(runner.run(shorter, [docs[cut.index(part)]], [BASELINE])["baseline"])[0]
            assert part.logprob == pytest.approx(alone.logprob, abs=1e-5)
            assert any(alone.text.endswith(stop) for stop in stops)
        assert len(calls) == max(o.lengths[0] for o in cut) < 8
        (at_once,) = outputs(runner.run(Task(stop=(first[0],)), docs[:1], [BASELINE])["baseline"])
        assert (at_once.text, at_once.lengths) == ("", (1,))

    def test_alone_as_in_a_batch(self, words, model_of):
        for family in ("llama-gqa", "gpt2"):
            runner, docs = Runner(model_of(family), words), word_docs()
            steerings = [BASELINE, Steering("p", (PASTA(0.1),)), Steering("act", (ACT(0.2, 0.05),))]
            together = runner.run(Task(), docs, steerings)
            again = runner.run(Task(), docs, steerings)
            alone = [runner.run(Task(), [doc], steerings) for doc in docs]
            for label, outcomes in together.items():
                assert_same(outcomes, again[label], 0)
                assert_same(outcomes, [found[label][0] for found in alone])

    def test_with_more_threads(self, words, model_of):
        runner, steerings = Runner(model_of("llama-gqa"), words), [BASELINE, Steering("p", (PASTA(0.1),))]
        found = []
        for threads in (2, 1):
            torch.set_num_threads(threads)
            found.append(runner.run(Task(max_new_tokens=2), word_docs(), steerings))
        for label, outcomes in found[0].items():
            assert_same(outcomes, found[1][label])

    def test_neutral_is_the_baseline(self, words, model_of):
        neutral = [ZeroTuning(1.0), PASTA(1.0), ACT(1.0), HeadMask({})]
        steerings = [BASELINE, *(Steering(m.name, (m,), role="neutral") for m in neutral), Steering("p", (PASTA(0.1),))]
        runner = Runner(model_of("llama-gqa"), words)
        for task, docs in (
            (Task(), word_docs()),
            (Task(output="choices"), word_docs(choices=("w1", "w2 w3"), target=1)),
        ):
            found = runner.run(task, docs, steerings)
            for method in neutral:
                assert [o.output for o in found[method.name]] == outputs(found["baseline"])

    def test_turns(self, tiny):
        """Each answer is asked for behind the answers before it, with the spans where they lie then."""
        chat = ({"role": "user", "content": "The code of the harbor is 1234. What is the code of the harbor?"},)
        groups = {"emphasis": ("1234",)}
        turns = ("What is the code of the harbor?", "Say it again: what is the code?")
        doc = Doc("words", 0, 0, Example(chat, groups=groups), turns=turns)
        other = Doc("words", 0, 1, Example(({"role": "user", "content": "The code is 1234. Which?"},), groups=groups))
        steerings = [BASELINE, Steering("pasta", (PASTA(0.05, heads={1: [0, 3], 2: [1]}),))]
        task = Task(max_new_tokens=10, chat=True)
        found = Runner(*tiny).run(task, [doc, other], steerings)
        for steering in steerings:
            output, brief = outputs(found[steering.label])
            assert len(output.texts) == len(output.lengths) == 3 and len(brief.texts) == 1
            messages, total = list(chat), 0.0
            for turn, text in zip((*turns, ""), output.texts, strict=True):
                one = Doc("words", 0, 0, Example(tuple(messages), groups=groups))
                (step,) = outputs(Runner(*tiny).run(task, [one], [steering])[steering.label])
                assert step.text == text
                total += step.logprob
                messages += [{"role": "assistant", "content": text}, {"role": "user", "content": turn}]
            assert output.logprob == pytest.approx(total, abs=1e-4)

    def test_a_stop_that_is_a_special_token(self, words, model_of):
        """It is left out of the text, and ends it all the same."""
        (whole,) = outputs(Runner(model_of("llama-gqa"), words).run(Task(), word_docs((30,)), [BASELINE])["baseline"])
        special, stop = copy.deepcopy(words), whole.text.split()[2]
        special.add_special_tokens({"extra_special_tokens": [stop]})
        runner = Runner(model_of("llama-gqa"), special)
        (cut,) = outputs(runner.run(Task(stop=(stop,)), word_docs((30,)), [BASELINE])["baseline"])
        assert cut.text.split() == whole.text.split()[:2] and cut.lengths == (3,)

    def test_a_decoding_method_generates(self, words, model_of):
        """In one batch, or row by row, where which step was whose is not known."""

        class Rows(Plain):
            name = "rows"

            def generate(self, model, inputs, spans, **kwargs):
                rows = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(len(inputs["input_ids"]))]
                found = [model.generate(**row, **kwargs).sequences[0] for row in rows]
                return torch.nn.utils.rnn.pad_sequence(found, batch_first=True)

        runner, docs = Runner(model_of("llama-gqa"), words), word_docs()
        stop = outputs(runner.run(Task(), docs, [BASELINE])["baseline"])[1].text.split()[3]
        steerings = [BASELINE, Steering("d", (Plain(),)), Steering("rows", (Rows(),))]
        found = runner.run(Task(stop=(stop,)), docs, steerings)
        assert_same(found["d"], found["baseline"])
        assert [o.texts for o in outputs(found["rows"])] == [o.texts for o in outputs(found["baseline"])]
        assert [o.lengths for o in outputs(found["rows"])] == [o.lengths for o in outputs(found["baseline"])]
        assert all(math.isnan(o.logprob) for o in outputs(found["rows"])[1:])


class TestChoices:
    @torch.no_grad()
    def test_log_likelihoods_by_hand(self, tiny):
        model, tokenizer = tiny
        docs = [
            Doc("lookup", 0, i, e, choices=(e.answer, "amber", "a very long one"), target=0)
            for i, e in enumerate(generate("lookup", 5, length=64))
        ]
        found = outputs(Runner(*tiny).run(Task(output="choices"), docs, [BASELINE])["baseline"])
        for doc, output in zip(docs, found, strict=True):
            prompt = tokenizer(doc.example.prompt)["input_ids"]
            for choice, logprob, size, greedy in zip(
                doc.choices, output.logprobs, output.lengths, output.greedy, strict=True
            ):
                ids = torch.tensor([tokenizer(f"{doc.example.prompt} {choice}")["input_ids"]])
                assert ids[0, : len(prompt)].tolist() == prompt and size == ids.shape[1] - len(prompt)
                logs = model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
                assert logprob == pytest.approx(float(logs.gather(1, ids[0, len(prompt) :, None]).sum()), abs=1e-4)
                assert greedy == (logs.argmax(-1).tolist() == ids[0, len(prompt) :].tolist())
            assert output.logprob == output.logprobs[0] and output.texts == ()
        assert sum(o.greedy[0] for o in found) > 2 and not any(any(o.greedy[1:]) for o in found)

    def test_choice_tokens_count_as_generated(self, words, model_of):
        """A choice is as likely as its tokens are when they are decoded one by one, under each method."""
        runner, docs = Runner(model_of("llama-gqa"), words, share=False), word_docs()
        methods = [PASTA(0.05), HeadMask("all", phase="decode"), HeadMask({1: [0, 5]}, phase="prefill"), ACT(0.2, 0.05)]
        steerings = [Steering(f"s{i}", (method,)) for i, method in enumerate(methods)]
        texts = runner.run(Task(max_new_tokens=2), docs, steerings)
        for steering in steerings:
            decoded = outputs(texts[steering.label])
            whole = [d for d in docs if len(decoded[d.doc_id].text.split()) == 2]  # without special tokens
            assert len(whole) >= 2
            asked = [Doc("words", 0, d.doc_id, d.example, (decoded[d.doc_id].text, "w1"), 0) for d in whole]
            scored = outputs(runner.run(Task(output="choices"), asked, [steering])[steering.label])
            assert all(o.greedy == (True, False) and o.lengths == (2, 1) for o in scored)
            expected = [decoded[d.doc_id].logprob for d in whole]
            assert [o.logprob for o in scored] == pytest.approx(expected, abs=1e-4)

    def test_methods_around_the_forward(self, words, model_of):
        """A decoding method scores itself, with edits in force; a prompt method's prompts are what is scored."""
        runner = Runner(model_of("llama-gqa"), words)
        docs = word_docs(choices=("w1", "w2 w3"), target=1)
        swapped = [
            Doc(
                "words",
                0,
                d.doc_id,
                Example(
                    " ".join(["w47" if 13 <= i < 16 else w for i, w in enumerate(d.example.prompt.split())]),
                    groups=d.example.groups,
                ),
                d.choices,
                1,
            )
            for d in docs
        ]
        task, zero = Task(output="choices"), ZeroTuning(4.0)
        steerings = [
            BASELINE,
            Steering("z", (zero,)),
            Steering("d", (Plain(),)),
            Steering("dz", (zero, Plain())),
            Steering("swap", (Swap(),)),
            Steering("swap z", (Swap(), zero)),
        ]
        found = runner.run(task, docs, steerings)
        plain = runner.run(task, swapped, steerings[:2])
        for label, expected in (
            ("d", found["baseline"]),
            ("dz", found["z"]),
            ("swap", plain["baseline"]),
            ("swap z", plain["z"]),
        ):
            got = outputs(found[label])
            for one, other in zip(got, outputs(expected), strict=True):
                assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert outputs(found["z"])[0].logprob != pytest.approx(outputs(found["baseline"])[0].logprob, abs=1e-2)

        class Embeds(Swap):
            name = "embeds"

            def prepare(self, inputs, spans):
                return {"inputs_embeds": None}, spans

        with pytest.raises(UnsupportedError, match="embeds does not rewrite each prompt into token ids"):
            runner.run(task, docs, [Steering("e", (Embeds(),))])


class TestSharing:
    METHODS = {
        "pasta": (PASTA(0.05),),
        "decode": (HeadMask({1: [0], 2: [3]}, phase="decode"),),
        "both": (HeadMask({1: [2]}, phase="decode"), PASTA(0.2, heads={1: [0, 3]})),
        "act": (ACT(0.2, 0.05),),
        "plain": (Plain(),),
    }

    @pytest.mark.parametrize(
        "family", ["llama-gqa", "gpt2", "qwen3", "deepseek_v3", "mistral", "qwen3_next", "gpt_oss"]
    )
    @pytest.mark.parametrize("output", ["generate", "choices"])
    def test_sharing_changes_nothing(self, family, output, words, model_of):
        """And where a window or a state stands in the way, nothing is shared."""
        model = model_of(family, "eager" if family in NO_SDPA else "sdpa")
        docs = word_docs((40, 19, 34, 40), choices=("w5", "w6 w7 w8"), target=0)
        steerings = [BASELINE, *(Steering(name, methods) for name, methods in self.METHODS.items())]
        shared, alone = Runner(model, words), Runner(model, words, share=False)
        task = Task(output=output, max_new_tokens=5)
        found, plain = shared.run(task, docs, steerings), alone.run(task, docs, steerings)
        for label, outcomes in found.items():
            assert_same(outcomes, plain[label])
        assert alone.saved == 0
        windows = family in ("mistral", "qwen3_next", "gpt_oss")
        if windows:
            assert shared.saved == 0
            return
        # prompts of 41, 20, 35 and 41 tokens; in columns, the emphasis begins at 14, 35, 20 and 14; a choice is up to
        # three tokens wide, so that the prompts of shorter ones end later
        rows = (
            [(41, 3), (41, 1), (20, 3), (20, 1), (35, 3), (35, 1), (41, 3), (41, 1)]
            if output == "choices"
            else [(41, 0), (20, 0), (35, 0), (41, 0)]
        )
        width = max(prompt + more for prompt, more in rows)
        pads = [width - prompt - more for prompt, more in rows]
        first = min(pad + 14 for pad in pads)
        last = min(pad + prompt - 1 for pad, (prompt, _) in zip(pads, rows, strict=True))
        assert shared.saved == sum(max(c - pad, 0) for c in (first, first, last) for pad in pads)

    def test_some_documents_of_the_batch(self, words, model_of):
        """Those without the group are left out, and the rest start from their own rows."""
        docs = word_docs()
        docs[1] = Doc("words", 0, 1, Example(docs[1].example.prompt))
        docs[3] = Doc("words", 0, 3, Example(docs[3].example.prompt, groups={"emphasis": ("absent",)}))
        steerings = [BASELINE, Steering("pasta", (PASTA(0.05),)), Steering("zero", (ZeroTuning(2.0),))]
        shared = Runner(model_of("llama-gqa"), words)
        found = shared.run(Task(), docs, steerings)
        assert shared.saved > 0
        outputs(found["baseline"]), outputs(found["zero"])
        assert "document 1 of seed 0: it has no span group 'emphasis'" in found["pasta"][1].error
        assert (
            "document 3 of seed 0: group 'emphasis'" in found["pasta"][3].error and "absent" in found["pasta"][3].error
        )
        alone = Runner(model_of("llama-gqa"), words, share=False)
        for i in (0, 2):
            assert_same([found["pasta"][i]], alone.run(Task(), [docs[i]], steerings)["pasta"])

    @pytest.mark.parametrize("name", ["drift", "multiple_choice", "extraction"])
    def test_tasks(self, name, tiny):
        """Shipped tasks, of several turns and of choices too: the same scores, from fewer computed tokens."""
        task = tasks.load(name)
        docs = task.docs(4, 0)
        methods = {"hm": HeadMask({2: [1]}, phase="decode"), "pasta": PASTA(0.1, heads={1: [0, 3]})}
        steerings = [BASELINE, *(Steering(label, (method,)) for label, method in methods.items())]
        validate(task, steerings, decoder.read(decoder.find(tiny[0]))[0])
        shared, alone = Runner(*tiny), Runner(*tiny, share=False)
        found, plain = shared.run(task, docs, steerings), alone.run(task, docs, steerings)
        for label, outcomes in found.items():
            assert_same(outcomes, plain[label], 1e-4)
            scores = [task.score(doc, output) for doc, output in zip(docs, outputs(outcomes), strict=True)]
            assert all(set(task.metrics) <= set(score) for score in scores)
        assert shared.saved > 0 == alone.saved

    def test_a_model_that_does_not_go_on_from_a_cache(self, words, caplog):
        model = build("llama-gqa")
        model.model.register_forward_pre_hook(
            lambda m, a, k: (
                (a, {**k, "position_ids": torch.arange(k["input_ids"].shape[1])[None] * 2 + 1})
                if k["input_ids"].shape[1] > 1
                else None
            ),
            with_kwargs=True,
        )
        steerings = [BASELINE, Steering("p", (PASTA(0.05),))]
        shared, alone = Runner(model, words), Runner(model, words, share=False)
        assert_same(shared.run(Task(), word_docs(), steerings)["p"], alone.run(Task(), word_docs(), steerings)["p"])
        assert shared.saved == 0 and "cannot share a cache" in caplog.text


class TestErrors:
    def test_bad_documents_alone(self, words, model_of):
        runner, good = Runner(model_of("llama-gqa"), words), word_docs()
        chat = Example(({"role": "user", "content": "w1"},))
        bad = [Example("w1 " * 249), Example("  "), chat]
        docs = docs_of([good[0].example, *bad, good[1].example])
        found = runner.run(Task(), docs, [BASELINE, Steering("z", (ZeroTuning(2.0),))])
        for outcomes in found.values():
            expected = runner.run(Task(), good[:2], [BASELINE, Steering("z", (ZeroTuning(2.0),))])
            label = next(k for k, v in found.items() if v is outcomes)
            assert_same([outcomes[0], outcomes[4]], expected[label])
            assert (
                "words, document 1 of seed 0: 250 tokens and 8 to generate, the model has room for 256"
                in outcomes[1].error
            )
            assert "document 2 of seed 0: its prompt is empty" in outcomes[2].error
            assert "document 3" in outcomes[3].error and "no chat template" in outcomes[3].error
        assert runner.run(Task(output="choices"), good[:1], [BASELINE])["baseline"][0].error.endswith(
            "it has no choices"
        )

    def test_a_template_that_fails_on_what_it_is_given(self, tiny):
        model, tokenizer = tiny
        broken = type(tokenizer).from_pretrained(tokenizer.name_or_path)
        broken.chat_template = (
            "{{ raise_exception('roles must alternate') if messages|length > 1 }}" + tokenizer.chat_template
        )
        one = {"role": "user", "content": "What is the code?"}
        docs = docs_of([Example((one,)), Example((one, one)), Example((one,))])
        found = Runner(model, broken).run(Task(chat=True), docs, [BASELINE])["baseline"]
        outputs([found[0], found[2]])
        assert "document 1" in found[1].error and "roles must alternate" in found[1].error

    def test_what_concerns_the_whole_run_raises(self, words, model_of):
        runner, docs = Runner(model_of("llama-gqa"), words), word_docs()
        with pytest.raises(HeadError, match="99"):
            runner.run(Task(), docs, [BASELINE, Steering("h", (ZeroTuning(2.0, heads={0: [99]}),))])
        with pytest.raises(HeadError, match="99"):
            validate(Task(), [Steering("h", (ZeroTuning(2.0, heads={0: [99]}),))], runner.facts)
        with pytest.raises(
            RunnerError, match=r"'p': pasta needs the span group 'emphasis', which task 'words'.*context"
        ) as e:
            validate(Task(groups=frozenset({"context"})), [BASELINE, Steering("p", (PASTA(0.1),))])
        assert e.value.exit_code == 2
        validate(Task(), [BASELINE, Steering("p", (PASTA(0.1),))], runner.facts)

    def test_no_numbers(self, words):
        model = build("llama-gqa")
        with torch.no_grad():
            model.model.embed_tokens.weight[words("w11", add_special_tokens=False)["input_ids"][0]] = float("nan")
        docs = word_docs((19, 19))
        docs.append(Doc("words", 0, 2, Example("w11 w12")))
        for task in (Task(), Task(output="choices")):
            asked = [Doc("words", 0, d.doc_id, d.example, ("w3",), 0) for d in docs]
            asked[0] = Doc("words", 0, 0, Example("w3 w4 w5"), ("w3",), 0)
            asked[1] = Doc("words", 0, 1, Example("w3 w4 w6"), ("w3",), 0)
            found = Runner(model, words).run(task, asked, [BASELINE])["baseline"]
            outputs(found[:2])
            assert "document 2 of seed 0: logits that are no numbers in torch.float32" in found[2].error
            assert "--dtype float32 or bfloat16" in found[2].error

    @pytest.mark.parametrize(
        "failure",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            ValueError("odd rows"),
        ],
    )
    def test_too_much_for_memory(self, failure, words, frozen, caplog):
        """Batches are halved until they fit; a document that never fits is an error, and no other."""
        model, sizes = build("llama-gqa"), []
        poison = words("w90", add_special_tokens=False)["input_ids"][0]

        def limit(module, arguments, keywords):
            ids = keywords["input_ids"]
            sizes.append(len(ids))
            if len(ids) > 3 or (ids == poison).any():
                raise failure

        docs = word_docs((20, 18, 25, 19, 22, 30, 17))
        docs = [
            Doc("words", 0, i, Example(d.example.prompt.replace("w90", "w91"), groups=d.example.groups))
            for i, d in enumerate(docs)
        ]
        steerings = [BASELINE, Steering("p", (PASTA(0.1),))]
        expected = Runner(model, words).run(Task(), docs, steerings)
        docs[4] = Doc("words", 0, 4, Example("w90 " + docs[4].example.prompt, groups=docs[4].example.groups))
        model.model.register_forward_pre_hook(limit, with_kwargs=True)
        found = Runner(model, words).run(Task(), docs, steerings)
        assert max(sizes) == 7 and 3 in sizes and "words: a batch of 7 documents failed" in caplog.text
        for label, outcomes in found.items():
            assert "document 4 of seed 0" in outcomes[4].error and str(failure)[:12] in outcomes[4].error
            assert ("out of memory for this document alone" in outcomes[4].error) != isinstance(failure, ValueError)
            rest = [i for i in range(7) if i != 4]
            assert_same([outcomes[i] for i in rest], [expected[label][i] for i in rest])

    @pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="this torch has no error of its own for it")
    def test_a_device_that_fails(self, words):
        """It computes nothing more, so it is no document's error."""
        model = build("llama-gqa")

        def fail(*_):
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")

        model.model.register_forward_pre_hook(fail)
        with pytest.raises(torch.AcceleratorError, match="device-side"):
            Runner(model, words).run(Task(), word_docs(), [BASELINE])

    def test_one_steering_too_many(self, words, model_of, monkeypatch, frozen):
        """What a steering alone needs too much for takes nothing from the others."""
        runner, generated = Runner(model_of("llama-gqa"), words), running._Job._generate

        def generate(self, steering, *more):
            if steering.methods:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return generated(self, steering, *more)

        monkeypatch.setattr(running._Job, "_generate", generate)
        found = runner.run(Task(), word_docs((30, 19)), [BASELINE, Steering("p", (PASTA(0.1),))])
        outputs(found["baseline"])
        assert all("out of memory for this document alone" in o.error for o in found["p"])


def test_length(tiny):
    """With a tokenizer what is run; without one an estimate."""
    _, tokenizer = tiny
    (doc,) = world_docs("lookup", 1, length=128)
    exact = length(tokenizer, Task(), doc)
    assert exact == len(tokenizer(doc.example.prompt)["input_ids"]) == Runner(*tiny).length(Task(), doc)
    assert exact / 2 < length(None, Task(), doc) < exact * 2
    chosen = Doc("x", 0, 0, doc.example, choices=("amber", "a very long one"))
    assert length(tokenizer, Task(output="choices"), chosen) == exact + len(
        tokenizer(" a very long one", add_special_tokens=False)["input_ids"]
    )
    turns = Doc("x", 0, 0, doc.example, turns=("And then?",))
    assert length(None, Task(max_new_tokens=100), turns) > length(None, Task(), doc) + 100
