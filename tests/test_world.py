"""The generated world and the model trained on it."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from steerlens.evals.world import corpus, tokenizer
from steerlens.evals.world.facts import Fact, split_of
from steerlens.evals.world.tasks import TASKS, follows, sample
from steerlens.evals.world.vocabulary import ATTRIBUTES, MEMORY, size
from transformers import AutoModelForCausalLM, AutoTokenizer

import steerlens

TINY = Path(steerlens.__file__).parent / "tiny"
STATEMENT = re.compile(rf"The ({'|'.join([*ATTRIBUTES, 'capital', 'river'])}) of ([A-Za-z ]+?) is (\w+)\.")


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(TINY)


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_reproducible_and_spans_cover_what_they_name(task: str) -> None:
    row = sample(task, 7, 96)
    assert row == sample(task, 7, 96) != sample(task, 8, 96)
    assert split_of(row.key) == "eval"
    assert row.prompt.endswith(" Answer:") and size(row.prompt) <= 96
    texts = [row.prompt[start:stop] for start, stop in row.spans]
    assert all(text.endswith(".") and text in row.prompt for text in texts)
    if task in ("needle", "lookup", "dense", "conflict", "contradiction"):
        assert texts[0].endswith(f" is {row.answer}.")
    if task == "conflict":
        assert texts[1].endswith(f" is {row.alternatives[0]}.")


def statements(text: str) -> list[Fact]:
    return [Fact(*found) for found in STATEMENT.findall(text)]


def test_training_text_and_evaluation_prompts_share_no_statement() -> None:
    fast = tokenizer.build()
    ids, _ = corpus.batch(fast.backend_tokenizer, random.Random(5), 64, 256, background=0.0, repeated=0.0)
    trained = {fact.key for row in ids for fact in statements(fast.decode(row))}
    asked = {fact.key for task in TASKS for seed in range(20) for fact in statements(sample(task, seed, 256).prompt)}
    true = {f"{relation}|{subject}|{value}" for (relation, subject), value in MEMORY.items()}
    assert len(trained) > 300 and len(asked) > 300
    assert {split_of(key) for key in trained - true} == {"train"}
    assert {split_of(key) for key in asked} == {"eval"}
    assert not trained & asked


def test_the_length_is_what_the_shipped_tokenizer_counts(tiny: tuple[Any, Any]) -> None:
    _, fast = tiny
    for task in TASKS:
        row = sample(task, 3, 128)
        assert len(fast(row.prompt)["input_ids"]) == size(row.prompt) + 1 <= 128


def test_the_tokenizer_has_what_steering_needs(tiny: tuple[Any, Any]) -> None:
    _, fast = tiny
    encoded = fast("The color is red.", return_offsets_mapping=True)
    assert fast.is_fast and encoded["input_ids"][0] == fast.bos_token_id
    assert fast.decode(encoded["input_ids"], skip_special_tokens=True) == "The color is red."
    assert len({fast.pad_token_id, fast.bos_token_id, fast.eos_token_id, None}) == 4
    chat = fast.apply_chat_template([{"role": "user", "content": "Hi."}], add_generation_prompt=True, tokenize=False)
    assert chat == "<s><|user|> Hi.</s><|assistant|>"
    assert fast("naïve 漢字", add_special_tokens=False)["input_ids"]


def test_the_shipped_files_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in TINY.iterdir() if path.is_file()}
    assert {"README.md", "config.json", "heads.json", "model.safetensors", "tokenizer.json"} <= set(sizes)
    assert sum(sizes.values()) <= 8_000_000


def test_tiny_looks_up_facts_in_prompts_it_never_saw(tiny: tuple[Any, Any]) -> None:
    model, fast = tiny
    rows = [sample("lookup", seed, 256) for seed in range(900_000, 900_020)]
    inputs = fast([row.prompt for row in rows], return_tensors="pt", padding=True, padding_side="left")
    out = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=6, do_sample=False
    )
    texts = fast.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert sum(follows(text, row.answer) for text, row in zip(texts, rows, strict=True)) >= 18
