"""The recipes for the bundled model that act on emphasised spans do what their files say, on a prompt of their own."""

import pytest
from typer.testing import CliRunner

from steerlens.cli import app

FACTS = [f"The keeper of the castle chapel is {name}." for name in ("Bruno", "Mara")]
QUESTION = "Question: What is the keeper of the castle chapel? Answer:"


def run(recipe, prompt, fact):
    arguments = ["run", "--recipe", recipe, "--prompt", prompt, "--emphasize", fact, "--max-new-tokens", "8"]
    return CliRunner().invoke(app, arguments).stdout.strip()


@pytest.mark.parametrize("method", ["spotlight", "instaboost", "guide", "context_awareness", "anchor_reweighting"])
def test_what_is_emphasised_is_followed(method):
    prompt = f"{FACTS[0]} The color of the lagoon depot is red. {FACTS[1]} {QUESTION}"
    for fact, answer in zip(FACTS, ("Bruno", "Mara"), strict=True):
        assert run(f"{method}-tiny", prompt, fact) == answer


def test_what_is_cut_off_is_not_found():
    prompt = f"The color of the lagoon depot is red. {FACTS[1]} {QUESTION}"
    assert run("knockout-tiny", prompt, "The color of the lagoon depot is red.") == "Mara"
    assert run("knockout-tiny", prompt, FACTS[1]) != "Mara"
