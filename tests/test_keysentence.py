"""The sentence that a model names is found in the context, and can be emphasised."""

import pytest
import torch

import steerlens
from steerlens import key_sentences, models
from steerlens.errors import SpanError
from steerlens.keysentence import KeySentence, sentences
from steerlens.methods import SpotLight

FACTS = [
    "The code of the harbor office is 4417.",
    "The letter was cold.",
    "The keeper of the castle chapel is Bruno.",
    "The code of the harbor bakery is 5020.",
]
CONTEXT = " ".join(FACTS)
PLAIN = "{context} Question: {question} Answer:"


@pytest.fixture(scope="module")
def tiny():
    return models.load("tiny", device="cpu")


@pytest.fixture
def saying(monkeypatch, tiny):
    """`saying(text)`: the bundled model, which says this to whatever it is asked, and the prompts it was asked."""
    model, tokenizer = tiny
    asked = []

    def make(text):
        def generate(**inputs):
            asked.extend(tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True))
            said = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]] * len(inputs["input_ids"]))
            return torch.cat([inputs["input_ids"], said.long()], 1)

        monkeypatch.setattr(model, "generate", generate)
        return model, tokenizer, asked

    return make


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ('He said "no." Then 3.5 left.\n\nA title\nEnd', ['He said "no."', "Then 3.5 left.", "A title", "End"]),
        ("  … ... Wait... what?  ", ["Wait...", "what?"]),
        ("一。二！", ["一。", "二！"]),
        ("「一。」二！", ["「一。」", "二！"]),
        ("\n ", []),
    ],
)
def test_sentences(text, expected):
    assert [text[a:b] for a, b in sentences(text)] == expected


def test_what_was_said_is_found_where_it_stands(saying):
    model, tokenizer, asked = saying("the keeper of the Castle chapel is bruno")
    [found] = key_sentences(model, tokenizer, [CONTEXT], ["Who keeps the chapel?"], ask="<{question}> {context}")
    assert found == KeySentence(FACTS[2], 60, 60 + len(FACTS[2]), "the keeper of the Castle chapel is bruno", 1.0)
    assert CONTEXT[found.start : found.stop] == found.text
    assert len(asked) == 1 and asked[0].endswith(CONTEXT)


def test_a_paraphrase_needs_vectors(saying):
    """A sentence that shares more words is not nearer by meaning."""
    model, tokenizer, _ = saying("The letter is the code")
    assert key_sentences(model, tokenizer, [CONTEXT], ["?"])[0].text == FACTS[0]

    def embed(texts):
        return [[float("letter" in text), float("harbor" in text), 0.1] for text in texts]

    [found] = key_sentences(model, tokenizer, [CONTEXT], ["?"], embed=embed)
    assert found.text == FACTS[1] and found.similarity == pytest.approx(1)


def test_nothing_in_common(saying):
    for said in ("zzz", ""):
        model, tokenizer, _ = saying(said)
        assert key_sentences(model, tokenizer, [CONTEXT] * 2, ["?"] * 2) == [None, None]


def test_braces_in_texts_stay_as_they_are(saying):
    model, tokenizer, asked = saying("a {question} b")
    [found] = key_sentences(model, tokenizer, ["a {question} b. c."], ["{context} {0}"], ask="{context}|{question}")
    assert found.text == "a {question} b." and asked == ["a {question} b. c.|{context} {0}"]


def test_the_bundled_model_names_the_sentence_and_answers_by_it(tiny):
    """Questions of a batch; the answer, not a sentence, is what this model says, and its words find the sentence."""
    model, tokenizer = tiny
    asked = ["the code of the harbor bakery", "the keeper of the castle chapel", "the code of the harbor office"]
    questions = [f"What is {what}?" for what in asked]
    found = key_sentences(model, tokenizer, [CONTEXT] * 3, questions, ask=PLAIN, max_new_tokens=4, batch_size=2)
    assert [sentence.text for sentence in found] == [FACTS[3], FACTS[2], FACTS[0]]
    prompts = [f"{CONTEXT} Question: {question} Answer:" for question in questions]
    inputs, spans = steerlens.encode(tokenizer, prompts, [[sentence.text] for sentence in found])
    with steerlens.steer(model, SpotLight(0.3), spans):
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [answer.split(".")[0].strip() for answer in answers] == ["5020", "Bruno", "4417"]


def test_refusals(tiny):
    with pytest.raises(SpanError, match="2 contexts and 1 questions"):
        key_sentences(*tiny, [CONTEXT] * 2, ["?"])
    with pytest.raises(SpanError, match=r"no \{context\}"):
        key_sentences(*tiny, [CONTEXT], ["?"], ask="{question}")
    with pytest.raises(SpanError, match="context 1 has no sentence"):
        key_sentences(*tiny, [CONTEXT, " \n"], ["?"] * 2)
