"""steerlens.encode on small real tokenizers made here: a selector takes its tokens, and no others."""

import logging
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import (
    Regex as SplitPattern,
)
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

import steerlens.spans
from steerlens.encoding import Chars, Regex, Role, Substring, Tokens, encode
from steerlens.errors import SpanError

CORPUS = [
    "Answer in JSON. The code of the harbor office is 4417, and the code of the old mill is 2093.",
    "Hello world, say it in capital letters. The user asks, the system answers.",
    "List three towns in JSON and end the answer in capital letters, in order.",
] * 4
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + CHATML.replace("m.content", "m.content | trim")
# As Llama 2 does it: the system message moves into the first user message.
MERGED = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}[{{ m.role }}] {{ (s if loop.first else '') + m.content }} {% endfor %}[assistant]"
)
# As Qwen 3 does it: the thoughts of earlier turns are dropped.
THINKING = CHATML.replace("m.content", "m.content.split('</think>')[-1]")


def byte_level(*, eos=False, bos=True, trim_offsets=False, prefix_space=False, template=CHATML, **kwargs):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tok.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(show_progress=False, vocab_size=360, special_tokens=special, initial_alphabet=alphabet),
    )
    around = processors.TemplateProcessing(
        single=f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tok.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim_offsets), around])
    made = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", **kwargs)
    made.chat_template = template
    return made


def words(*, normalizer=None, **kwargs):
    """One token per word, mark and space: offsets (0,5), (5,6), (6,11) for "Hello world"."""
    tok = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, "hello": 2, "Hello": 3, " ": 4, "world": 5}, "<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Split(SplitPattern(r"\s|\w+|[^\s\w]"), "isolated")
    if normalizer is not None:
        tok.normalizer = normalizer
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", unk_token="<unk>", **kwargs)


def metaspace():
    tok = Tokenizer(models.Unigram())
    tok.normalizer = normalizers.NFKC()
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    tok.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        show_progress=False, vocab_size=120, special_tokens=["<unk>", "<s>", "<pad>"], unk_token="<unk>"
    )
    tok.train_from_iterator(CORPUS, trainer)
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", unk_token="<unk>", pad_token="<pad>")


BPE, BPE_BARE = byte_level(), byte_level(bos=False)


def ranges(tokenizer, prompts, *args, group="emphasis", **kwargs):
    return encode(tokenizer, prompts, *args, **kwargs)[1].groups[group]


def texts(tokenizer, prompts, *args, group="emphasis", **kwargs):
    inputs, spans = encode(tokenizer, prompts, *args, **kwargs)
    return [row[group] for row in spans.preview(tokenizer, inputs["input_ids"])]


# ---- which tokens belong to a range


def test_token_that_ends_where_the_span_begins_is_not_taken():
    # core.md §3(g): the published rule takes (1, 3) here.
    assert ranges(words(), "Hello world", "world", add_special_tokens=False) == (((2, 3),),)


def test_span_at_the_first_character_takes_neither_bos_nor_pads():
    inputs, spans = encode(words(), ["Hello world", "Hello world Hello world"], [["Hello"], ["world"]])
    assert inputs["attention_mask"].tolist() == [[0] * 4 + [1] * 4, [1] * 8]
    assert inputs["input_ids"].tolist() == [[0] * 4 + [0, 3, 4, 5], [0, 3, 4, 5, 4, 3, 4, 5]]
    assert spans.groups["emphasis"] == (((5, 6),), ((3, 4), (7, 8)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [None, "<|im_end|>"])
def test_batch_is_left_padded_and_the_tokenizer_is_as_it_was(side, pad):
    tokenizer = byte_level(padding_side=side, truncation_side="left", pad_token=pad, model_max_length=8)
    before = {k: getattr(tokenizer, k) for k in ("padding_side", "truncation_side", "pad_token", "pad_token_id")}
    before["special"] = tokenizer.special_tokens_map
    prompts = ["in JSON", "The code of the harbor office is 4417, in JSON."]
    inputs, spans = encode(tokenizer, prompts, "JSON")
    after = {k: getattr(tokenizer, k) for k in before if k != "special"} | {"special": tokenizer.special_tokens_map}
    assert after == before
    assert set(inputs) == {"input_ids", "attention_mask"}
    for row, prompt in enumerate(prompts):
        alone = tokenizer(prompt)["input_ids"]
        padding = inputs["input_ids"].shape[1] - len(alone)
        filler = tokenizer.eos_token_id if pad is None else tokenizer.pad_token_id
        assert inputs["input_ids"][row].tolist() == [filler] * padding + alone
        assert inputs["attention_mask"][row].tolist() == [0] * padding + [1] * len(alone)
        ((start, stop),) = spans.groups["emphasis"][row]
        assert tokenizer.decode(inputs["input_ids"][row, start:stop]).strip() == "JSON"
    assert inputs["input_ids"].dtype == inputs["attention_mask"].dtype == torch.int64
    assert len(tokenizer(prompts[1])["input_ids"]) > 8  # model_max_length truncated nothing


def test_a_tokenizer_without_pad_and_eos_pads_with_zero():
    inputs, _ = encode(words(), ["Hello", "Hello world"], add_special_tokens=False)
    assert inputs["input_ids"].tolist() == [[0, 0, 3], [3, 4, 5]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_substring_takes_exactly_the_tokens_that_carry_its_bytes(data):
    alphabet = st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("in JSON the 🙂é漢"))
    text = data.draw(st.text(alphabet, min_size=1, max_size=40).filter(lambda t: "<" not in t))
    start = data.draw(st.integers(0, len(text) - 1))
    stop = data.draw(st.integers(start + 1, len(text)))
    inputs, spans = encode(BPE, [text, text + " and more"], Chars(start, stop))
    ids, ((first, last),) = inputs["input_ids"][0].tolist(), spans.groups["emphasis"][0]
    assert text[start:stop] in BPE.decode(ids[first:last], clean_up_tokenization_spaces=False)
    # The bytes of each token, counted without offsets: <s> and pads carry none.
    low, high = len(text[:start].encode()), len(text[:stop].encode())
    at, carries = 0, []
    for i, token in enumerate(BPE.convert_ids_to_tokens(ids)):
        size = 0 if token in ("<s>", "</s>") else len(token)
        if at < high and at + size > low and size:
            carries.append(i)
        at += size
    assert at == len(text.encode())
    assert list(range(first, last)) == carries


def test_all_tokens_of_a_character_of_several_bytes_are_taken():
    inputs, spans = encode(BPE, "so 🙂 it is", "🙂")
    ((start, stop),) = spans.groups["emphasis"][0]
    assert stop - start >= 3 and BPE.decode(inputs["input_ids"][0, start:stop]).strip() == "🙂"


def test_a_leading_space_in_the_token_comes_along():
    assert texts(BPE, "Answer in JSON.", "in") == [[" in"]]
    assert texts(BPE, "Answer in JSON.", " in") == [[" in"]]
    # Here the tokenizer says that "Ġin" is (7, 9), without its space, and white space alone is zero wide.
    trimmed = byte_level(trim_offsets=True)
    assert texts(trimmed, "Answer in   JSON.", "in") == [[" in"]]
    with pytest.raises(SpanError, match="no token carries it"):
        encode(trimmed, "Answer in   JSON.", "  ", occurrence="first")


def test_metaspace_and_normalised_text():
    tokenizer = metaspace()
    assert [t[0].strip() for t in texts(tokenizer, ["Hello world", "say Hello"], "Hello")] == [
        "Hello",
        "Hello",
    ]
    assert ranges(tokenizer, "Hello world", "Hello")[0][0][0] == 1  # not the BOS
    # NFKC makes two letters of one: characters are those of the text as it was given.
    ((found,),) = texts(tokenizer, "the oﬃce in JSON", "in")
    assert found.replace("▁", " ").strip() == "in"


def test_normaliser_that_changes_lengths():
    tokenizer = words(normalizer=normalizers.Sequence([normalizers.Replace("…", " ... "), normalizers.Lowercase()]))
    inputs, spans = encode(tokenizer, "Hello… WORLD", ["WORLD"])
    ((start, stop),) = spans.groups["emphasis"][0]
    assert stop - start == 1 and inputs["input_ids"][0, start:stop].tolist() == [5]


def test_truncation_and_padding_of_the_tokenizer_file_do_not_apply():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=200)
    inputs, spans = encode(tokenizer, "The code of the harbor office is 4417, in JSON.", "JSON")
    assert 4 < inputs["input_ids"].shape[1] < 100
    assert spans.preview(tokenizer, inputs["input_ids"]) == [{"emphasis": [" JSON"]}]


# ---- selectors

TWICE = "The code is 4417, in JSON. Answer in JSON, in order."


@pytest.mark.parametrize(
    ("occurrence", "count", "first"),
    [("all", 3, 18), ("first", 1, 18), ("last", 1, 43), (0, 1, 18), (1, 1, 34), (-1, 1, 43)],
)
def test_occurrences(occurrence, count, first):
    assert TWICE[first : first + 2] == "in"
    for selector in ("in", re.compile("in"), Substring("in"), Regex("in")):
        found = ranges(BPE, TWICE, selector, occurrence=occurrence)[0]
        assert len(found) == count and found[0] == ranges(BPE, TWICE, Chars(first, first + 2))[0][0]
    for selector in (Substring("in", occurrence), Regex("in", occurrence)):  # its own comes before encode's
        assert len(ranges(BPE, TWICE, selector, occurrence="only")[0]) == count


def test_only_and_impossible_occurrences():
    with pytest.raises(SpanError, match=r"row 0, group 'emphasis': 'in' occurs 3 times, at characters \[18, 34, 43\]"):
        encode(BPE, TWICE, "in", occurrence="only", on_missing="ignore")
    assert texts(BPE, TWICE, "Answer", occurrence="only") == [["Answer"]]
    with pytest.raises(SpanError, match="no occurrence=3"):
        encode(BPE, TWICE, "in", occurrence=3)
    for wrong in ("some", True, 1.0):
        with pytest.raises(SpanError, match="allowed:"):
            encode(BPE, TWICE, "in", occurrence=wrong)


def test_expressions_take_the_named_group_then_the_first_then_the_match():
    assert texts(words(), "a 1 b 22", re.compile(r"\d+"), add_special_tokens=False) == [["<unk>", "<unk>"]]
    prompt = "The code is 4417, in JSON."
    expected = ranges(BPE, prompt, "4417")
    assert ranges(BPE, prompt, re.compile(r"is (\d+), (in)")) == expected
    assert ranges(BPE, prompt, Regex(r"(is) (?P<span>\d+)")) == expected
    assert ranges(BPE, prompt, Regex(r"(?:\d+)")) == expected
    assert ranges(BPE, prompt, Regex(r"\d*", "first")) == expected  # matches without characters do not count
    assert ranges(BPE, prompt, Regex(r"XML|(JSON)|The")) == ranges(BPE, prompt, "JSON")
    for wrong in (Regex("("), re.compile(b"is"), Regex(3)):
        with pytest.raises(SpanError, match="not a regular expression"):
            encode(BPE, prompt, wrong)


def test_character_and_token_ranges_are_slices():
    prompt = "Hello world"
    spans = encode(words(), [prompt, prompt + " world"], [Tokens(1, 2), Tokens(-1)])[1]
    assert spans.groups["emphasis"] == (((3, 4), (5, 6)), ((1, 2), (5, 6)))
    assert ranges(words(), prompt, Chars(-5)) == ranges(words(), prompt, "world")
    assert ranges(words(), prompt, Chars(0, 5)) == ranges(words(), prompt, "Hello")
    assert ranges(words(), prompt, Chars(None)) == (((1, 4),),)
    for empty in (Tokens(9), Tokens(2, 2), Chars(40, 50), Chars(3, 3)):
        with pytest.raises(SpanError, match=r"is empty: the (row|text) has"):
            encode(words(), prompt, empty)


def test_order_is_kept_and_equal_ranges_are_given_once():
    a, b = ranges(BPE, TWICE, "JSON")[0]
    ((code,),) = ranges(BPE, TWICE, "4417")
    assert ranges(BPE, TWICE, ["JSON", "4417", "JSO", Substring("JSON", "last")]) == ((a, b, code),)
    assert ranges(BPE, TWICE, [Substring("JSON", "last"), "4417", "JSON"]) == ((b, code, a),)


def test_groups_and_rows():
    prompts = ["in JSON", "The code"]
    groups = {"query": "o", "rest": [[Tokens(0)], [Tokens(0), "code"]]}
    _, spans = encode(BPE, prompts, [["JSON"], []], groups=groups, on_missing="ignore")
    assert list(spans.groups) == ["emphasis", "query", "rest"]
    assert [len(row) for row in spans.groups["emphasis"]] == [1, 0]
    assert [len(row) for row in spans.groups["query"]] == [0, 1]
    assert [len(row) for row in spans.groups["rest"]] == [1, 2]
    merged = ranges(BPE, "in <em>JSON</em>", ["in"], groups={"emphasis": Tokens(0, 1)}, tags="em")
    assert merged[0] == (*ranges(BPE, "in JSON", "in")[0], (0, 1), *ranges(BPE, "in JSON", "JSON")[0])
    for wrong in ([["JSON"]], [["JSON"], "code"], [["JSON"], ["code"], []]):
        with pytest.raises(SpanError, match=r"not one list of selectors per prompt row \(2 rows\)"):
            encode(BPE, prompts, wrong)
    for wrong in (7, (4, 9), [None], {"JSON"}):
        with pytest.raises(SpanError, match="is not a selector"):
            encode(BPE, prompts, wrong)


def test_nothing_asked_still_fingerprints():
    inputs, spans = encode(BPE, ["in JSON", "The code of the mill"])
    assert dict(spans.groups) == {}
    assert spans.fingerprint == steerlens.spans.digests(inputs["input_ids"], inputs["attention_mask"])
    spans.check(inputs["input_ids"], inputs["attention_mask"])
    with pytest.raises(SpanError, match="row 1"):
        spans.check(inputs["input_ids"][[0, 0]], inputs["attention_mask"])
    assert encode(BPE, "in JSON", device="meta")[0]["input_ids"].device.type == "meta"


# ---- missing


def test_missing_text_shows_row_and_nearest_text(caplog):
    prompts = ["Answer in JSON, please.", "Answer in capital letters, please."]
    with pytest.raises(SpanError, match=r"row 1, group 'emphasis': .* nearest text is 'in capital'.*ignore"):
        encode(BPE, prompts, "in JSON")
    with pytest.raises(SpanError, match="nearest text is 'in JSON'"):
        encode(BPE, prompts, "in JSN")
    with pytest.raises(SpanError, match="nearest text is '漢字を含む'"):
        encode(BPE, "これは漢字を含む文", "漢字を詰む")
    with pytest.raises(SpanError, match="nearest text is 'in JSON'"):
        encode(BPE, " ".join(f"{i} mills {i}" for i in range(100, 300)) + prompts[0], "in JSN")
    with pytest.raises(SpanError, match="the text is 'Answer in"):
        encode(BPE, prompts, "ZZZZZ")
    with pytest.raises(SpanError, match=r"expression 'XML\|YAML' is not in"):
        encode(BPE, prompts, re.compile("XML|YAML"))
    with pytest.raises(SpanError, match="empty text"):
        encode(BPE, prompts, "", on_missing="ignore")
    with caplog.at_level(logging.WARNING, "steerlens"):
        assert [len(row) for row in ranges(BPE, prompts, "in JSON", on_missing="ignore")] == [1, 0]
        assert not caplog.records
        assert [len(row) for row in ranges(BPE, prompts, "in JSON", on_missing="warn")] == [1, 0]
    assert [r.name for r in caplog.records] == ["steerlens"] and "row 1" in caplog.text
    with pytest.raises(SpanError, match="on_missing='skip'; allowed"):
        encode(BPE, prompts, "in", on_missing="skip")


def test_text_that_no_token_carries_is_missing():
    tok = words()
    tok.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(SpanError, match="at characters 5 to 6, but no token carries it"):
        encode(tok, "Hello world", " ")
    assert ranges(tok, "Hello world", " ", on_missing="ignore") == ((),)


@pytest.mark.parametrize("prompts", ["", ["Hello", ""], [], None, [[]], 5, [["Hello"]]])
def test_prompts_that_are_none(prompts):
    with pytest.raises(SpanError, match=r"no tokens|give a text|neither a text nor a chat"):
        encode(BPE_BARE, prompts)
    assert encode(BPE, "")[0]["input_ids"].shape == (1, 1)  # the BOS alone is a prompt


def test_slow_tokenizer_is_refused_only_when_spans_are_asked():
    class Slow(PreTrainedTokenizer):
        vocab_size = 256

        def get_vocab(self):
            return {chr(i): i for i in range(256)}

        def _tokenize(self, text):
            return list(text)

        def _convert_token_to_id(self, token):
            return ord(token)

        def _convert_id_to_token(self, index):
            return chr(index)

    assert encode(Slow(), "abc")[0]["input_ids"].tolist() == [[97, 98, 99]]
    with pytest.raises(SpanError, match=r"Slow is a slow tokenizer.*fast one"):
        encode(Slow(), "abc", "b")


# ---- tags


def test_tags_are_removed_and_select_what_they_enclose():
    prompts = ["Answer <em>in JSON</em>, in <em>order</em>.", "<em><doc>The code</doc> is</em> 4417"]
    inputs, spans = encode(BPE, prompts, tags={"emphasis": "em", "documents": "doc"}, on_missing="ignore")
    plain = ["Answer in JSON, in order.", "The code is 4417"]
    assert torch.equal(inputs["input_ids"], encode(BPE, plain)[0]["input_ids"])
    assert spans.preview(BPE, inputs["input_ids"]) == [
        {"emphasis": [" in JSON", " order"], "documents": []},
        {"emphasis": ["The code is"], "documents": ["The code"]},
    ]
    assert ranges(BPE, prompts[0], tags="em") == ranges(BPE, plain[0], ["in JSON", "order"])
    assert texts(BPE, "<em>The <em>code</em> is</em>", tags="em") == [["The code is", " code"]]
    # <b> is no tag here, and selectors see the text without tags.
    assert texts(BPE, "<b>in</b> <em>JSON</em>, in order", "JSON, in", tags="em") == [[" JSON, in", " JSON"]]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("Answer <em>in JSON", "row 0: <em> is never closed: put a </em> after what it is for, in 'in JSON'"),
        ("Answer in</em> JSON", "row 0: </em> at character 9 closes nothing"),
        ("</em>in<em> JSON", "closes nothing"),
        ("Answer in JSON", "row 0, group 'emphasis': no <em>…</em> reached the text 'Answer in JSON'"),
        ("Answer <em></em>in JSON", "no token carries it"),
    ],
)
def test_tags_that_do_not_fit(prompt, message):
    with pytest.raises(SpanError, match=re.escape(message)):
        encode(BPE, prompt, tags="em")
    with pytest.raises(SpanError, match="not a tag's name"):
        encode(BPE, prompt, tags={"emphasis": "<em>"})


# ---- chats

CHAT = [
    {"role": "system", "content": "  You are the system.  "},
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": "The user asks."},
    {"role": "user", "content": "Answer <em>in JSON</em>, user."},
]


@pytest.mark.parametrize("template", [CHATML, WITH_BOS, MERGED])
@pytest.mark.parametrize("tokenizer_bos", [True, False])
def test_chats_select_only_what_was_said(template, tokenizer_bos):
    tokenizer = byte_level(bos=tokenizer_bos, template=template)
    groups = {
        "role": [[Role("user", 0)]],
        "all": Role("user"),
        "word": "user",
        "system": Role("system"),
        "em": "in JSON",
    }
    inputs, spans = encode(tokenizer, [CHAT], groups=groups, tags={"tag": "em"})
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(tokenizer.bos_token_id) == (tokenizer_bos or template == WITH_BOS)
    assert tokenizer_bos is False or ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.eos_token_id) == 0
    (found,) = spans.preview(tokenizer, inputs["input_ids"])
    found = {group: [t.strip() for t in sections] for group, sections in found.items()}
    assert found == {
        "role": ["user"],
        "all": ["user", "Answer in JSON, user."],
        "word": ["user", "user", "user"],
        "system": ["You are the system."],
        "em": ["in JSON"],
        "tag": ["in JSON"],
    }
    rendered = tokenizer.apply_chat_template(
        [{**m, "content": re.sub("</?em>", "", m["content"])} for m in CHAT],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert tokenizer.decode(ids).removeprefix("<s>") == rendered.removeprefix("<s>")


def test_chat_wraps_plain_text_and_system():
    inputs, spans = encode(BPE, ["Answer in JSON.", "in order"], groups={"in": "in"}, chat=True, system="Be kind.")
    for row, prompt in enumerate(["Answer in JSON.", "in order"]):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        expected = "<s><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n" + prompt
        assert BPE.decode(ids) == expected + "<|im_end|>\n<|im_start|>assistant\n"
    # "kind" is said too, "assistant" is the template's
    assert [len(r) for r in spans.groups["in"]] == [2, 2]
    one = [{"role": "user", "content": "Answer in JSON."}]
    assert torch.equal(
        encode(BPE, one, system="Be kind.")[0]["input_ids"],
        encode(BPE, "Answer in JSON.", chat=True, system="Be kind.")[0]["input_ids"],
    )
    assert one == [{"role": "user", "content": "Answer in JSON."}]
    with pytest.raises(SpanError, match="'assistant' is not in the prompt"):
        encode(BPE, "Answer in JSON.", "assistant", chat=True)
    mixed = ranges(BPE, ["Answer in JSON.", one], "in JSON")
    assert [len(row) for row in mixed] == [1, 1]


def test_chat_gets_one_bos_and_no_eos():
    for tokenizer in (byte_level(eos=True, template=WITH_BOS), byte_level(eos=True, template=CHATML)):
        ids = encode(tokenizer, "in JSON", chat=True)[0]["input_ids"][0].tolist()
        assert ids[0] == 0 and ids.count(0) == 1 and ids.count(1) == 0
        assert encode(tokenizer, "in JSON")[0]["input_ids"][0].tolist() == tokenizer("in JSON")["input_ids"]
    assert encode(byte_level(), "in", chat=True, add_special_tokens=False)[0]["input_ids"][0, 0] != 0
    # A text that was rendered by the user has its BOS already.
    assert encode(BPE, "<s>in JSON")[0]["input_ids"].tolist() == encode(BPE, "in JSON")[0]["input_ids"].tolist()
    assert ranges(BPE, "<s>in JSON", "in") == ranges(BPE, "in JSON", "in")


def test_templates_that_look_into_the_content():
    chat = [
        {"role": "user", "content": "say code"},
        {"role": "assistant", "content": "<think>in order</think>The code is 4417."},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": "Answer in JSON"},
    ]
    tokenizer = byte_level(template=THINKING.replace("m.content.", "(m.content or '')."))
    found = texts(tokenizer, [chat], [Role("assistant"), "code"])[0]
    assert [t.strip() for t in found] == ["The code is 4417.", "code", "code"]
    with pytest.raises(SpanError, match="'in order' is not in the prompt"):
        encode(tokenizer, [chat], "in order")
    # Nothing is found in what the template leaves out, or in its own words.
    dropped = "{% for m in messages if m.role == 'user' %}The system says {{ m.content }}.{% endfor %}"
    tokenizer = byte_level(template=dropped)
    said = [{"role": "system", "content": "system"}, {"role": "user", "content": "in order"}]
    assert ranges(tokenizer, [said], ["system", Role("system")], on_missing="ignore") == ((),)
    # One that refuses the mark, or answers to it with other words, leaves what is unique.
    strict = "{% if 'JSON' not in messages[0].content %}{{ raise_exception('no JSON') }}{% endif %}" + CHATML
    assert texts(byte_level(template=strict), "in JSON", Role("user"), chat=True) == [["in JSON"]]
    other = "{% if 'JSON' in messages[0].content %}Mind the form. {% endif %}" + CHATML
    assert texts(byte_level(template=other), "in JSON", Role("user"), chat=True) == [["in JSON"]]
    other = "{% if 'JSON' in messages[0].content %}Mind the JSON. {% endif %}" + CHATML
    assert ranges(byte_level(template=other), "JSON", Role("user"), chat=True, on_missing="ignore") == ((),)
    with pytest.raises(SpanError, match="row 0: no JSON"):
        encode(byte_level(template=strict), "in order", chat=True)


def test_a_content_that_is_said_twice_is_found_twice():
    twice = "{% for m in messages %}A {{ m.content }} B {{ m.content }} C{% endfor %}"
    assert [t.strip() for t in texts(byte_level(template=twice), "in order", Role("user"), chat=True)[0]] == [
        "in order"
    ] * 2


def test_templates_that_trim_or_move_contents():
    trim = byte_level(template=WITH_BOS)
    assert texts(trim, "\n\nAnswer <em>in JSON</em>", tags="em", chat=True) == [[" in JSON"]]
    assert texts(trim, "<em>\n\nin JSON\n</em>", tags="em", chat=True) == [["in JSON"]]
    backwards = byte_level(template="{% for m in messages | reverse %}{{ m.content }}. {% endfor %}")
    chat = [
        {"role": "user", "content": "Answer <em>order</em>"},
        {"role": "user", "content": "code <em>order</em>"},
    ]
    first, second = ranges(backwards, [chat], "order", tags={"tag": "em"})[0]
    assert first < second and ranges(backwards, [chat], tags="em") == ((first, second),)
    said = [{"role": "system", "content": "steerlensmark"}, *[{"role": "user", "content": "in JSON"}] * 2]
    assert texts(BPE, [said], Role("user")) == [["in JSON", "in JSON"]]


def test_role_leaves_out_the_white_space_a_special_token_swallows():
    tokenizer = byte_level(template="<|im_start|>{{ messages[0].content }}")
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken("<|im_start|>", rstrip=True, special=True)]})
    assert texts(tokenizer, "\n\nin JSON ", Role("user"), chat=True) == [["in JSON"]]


def test_wrong_chats():
    with pytest.raises(SpanError, match=r"row 0: this .* has no chat template.*chat=False"):
        encode(byte_level(template=None), "in JSON", chat=True)
    with pytest.raises(SpanError, match="is plain text; give messages, or chat=True"):
        encode(BPE, "in JSON", Role("user"))
    with pytest.raises(SpanError, match=r"role 'usr'.*did you mean 'user'.*\['user'\]"):
        encode(BPE, "in JSON", Role("usr"), chat=True)
    with pytest.raises(SpanError, match="has 1 messages of that role"):
        encode(BPE, "in JSON", Role("user", 1), chat=True)
    with pytest.raises(SpanError, match="system= needs a chat"):
        encode(BPE, "in JSON", system="Be kind.")
    with pytest.raises(SpanError, match="has a system message"):
        encode(BPE, CHAT, system="Be kind.", tags="em")
    with pytest.raises(SpanError, match="is a list, it must be text"):
        encode(BPE, [{"role": "user", "content": [{"type": "text", "text": "in"}]}])
    rewritten = byte_level(template="{{ messages[0].content | replace('order', 'rank') }}")
    with pytest.raises(SpanError, match="rewrites"):
        encode(rewritten, "in <em>order</em>", tags="em", chat=True)
