"""The byte-level BPE tokenizer of `tiny`: every word of the world is one token, other text falls back to bytes."""

from __future__ import annotations

import random
from typing import Final

from steerlens.evals.world import vocabulary as words
from steerlens.evals.world.tasks import INSTRUCTIONS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD: Final = "<pad>"
BOS: Final = "<s>"
EOS: Final = "</s>"
SYSTEM: Final = "<|system|>"
USER: Final = "<|user|>"
ASSISTANT: Final = "<|assistant|>"
SPECIAL: Final = (PAD, BOS, EOS, SYSTEM, USER, ASSISTANT)
"""Special tokens; a token's position here is its id."""

CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] | trim "
    "+ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _word_list() -> list[str]:
    rng = random.Random(words.WORLD_SEED)
    values = [value for pool in words.ATTRIBUTES.values() if pool for value in pool]
    text = " ".join(
        [
            *(words.filler(rng) for _ in range(3000)),
            *(word for pool in words.CATEGORIES.values() for word in pool),
            *words.CATEGORIES,
            *words.ATTRIBUTES,
            *words.PLACES,
            *words.KINDS,
            *words.NAMES,
            *words.LABELS,
            *words.COUNTRIES,
            *(name for pool in words.RELATIONS.values() for name in pool),
            *INSTRUCTIONS.values(),
            "Question: What is the code of the harbor office? Answer: Which river flows through Name city capital",
            "What does belong to? belongs What kind of thing is You are a helpful assistant.",
        ]
    )
    spaced = sorted({word for word in text.replace(",", " ").replace(".", " ").replace("?", " ").split()})
    bare = [*words.ATTRIBUTES, *values, *(word for pool in words.CATEGORIES.values() for word in pool)]
    bare += [
        *words.COUNTRIES,
        *[
            "The",
            "What",
            "Which",
            "Name",
            "Nobody",
            "Question",
            "Answer",
            "You",
            "After",
            "In",
            "On",
            "Before",
            "Long",
            "As",
        ],
    ]
    return [
        *(f" {word}" for word in spaced),
        *bare,
        *(f" {value.upper()}" for value in values),
        *(f"{lead}{number:02d}" for lead in ("", " ") for number in range(100)),
        *(f"{lead}{digit}" for lead in ("", " ") for digit in range(10)),
        *(' "', " {", " (", " -"),
    ]


def build(vocabulary: int = 2048) -> PreTrainedTokenizerFast:
    """Train the tokenizer (deterministic; at most `vocabulary` tokens) with its special tokens and chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words.PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Longer words count more, so that no word of the world is left in parts.
    tokenizer.train_from_iterator((word for word in _word_list() for _ in range(2)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
