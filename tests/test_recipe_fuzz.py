import resource
import time
from contextlib import suppress

import pytest
import recipe_files
from recipe_files import CODE, HEAD, HEAD_SPECS, METHODS

from steerlens import plainyaml
from steerlens.errors import HeadError, RecipeError
from steerlens.heads import Heads
from steerlens.recipe import Recipe, load_recipe

CHUNKS, EACH = 10, 1000
LONGEST = 25_000  # characters of a message: at most 20 problems of some 1,000


@pytest.fixture(scope="module")
def watch():
    return recipe_files.Watch()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a file that got something to run would leave its mark; a module there tells when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "recipe_bait.py").write_text("open('executed', 'w').close()\n\nclass Bait: pass\n")
    load_recipe("pasta-tiny")  # what is imported on first use is imported now
    with pytest.raises(RecipeError):
        load_recipe("pasta-tniy")
    return tmp_path


def outcome(path, content, watch):
    """The recipe, or the message of its `RecipeError`; anything else fails."""
    path.write_bytes(content)
    try:
        with watch:
            return load_recipe(path), ""
    except RecipeError as error:
        assert type(error) is RecipeError
        return None, str(error)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_malformed_files_give_only_clean_errors(folder, watch, chunk):
    check(folder, watch, chunk, EACH)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 6))
def test_malformed_files_of_other_seeds(folder, watch, seed):
    check(folder, watch, 1000 * seed, CHUNKS * EACH)


def check(folder, watch, seed, wanted):
    path, refused, loaded, slowest = folder / "recipe.yaml", 0, 0, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for content in recipe_files.malformed(seed):
        start = time.perf_counter()
        recipe, message = outcome(path, content, watch)
        slowest = max(slowest, time.perf_counter() - start)
        assert watch.seen == [], content
        if recipe is None:
            refused += 1
            assert "recipe.yaml" in message and len(message) < LONGEST, content
            assert message.replace("\n", "").isprintable(), content
        else:
            loaded += 1
            assert load_recipe(recipe.save(folder / "saved.yaml")) == recipe == Recipe.from_dict(recipe.to_dict()), (
                content
            )
        if refused == wanted:
            break
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"seed {seed}: {refused} refused, {loaded} loaded, slowest {slowest:.2f} s, {grown:.0f} MiB more")  # noqa: T201
    assert 0 < loaded < refused
    assert slowest < 20 and grown < 400  # nothing that grows out of hand; in practice 0.2 s and 50 MiB
    assert not (folder / "executed").exists()


BOMBS = {
    "laughs": "a: &a [x,x]\n" + "".join(f"b{i}: &b{i} [*b{i - 1},*b{i - 1}]\n" for i in range(1, 30)),
    "many keys": HEAD + METHODS + "".join(f"k{i}: 1\n" for i in range(20_000)),
    "twice": "a: b\n" * 50_000,
    "many wrong methods": HEAD + "methods: [" + "1," * 100_000 + "]\n",
    "long key": HEAD + METHODS + "? " + "k" * 200_000 + "\n: 1\n",
    "long name": HEAD.replace("fuzz", "n" * 200_000) + METHODS,
    "long scalar": HEAD + METHODS + "task: [" + "9" * 200_000 + "]",
    "deep": "[" * 200_000,
    "blanks": " " * 250_000,
    "quotes": "'" * 200_001,
    "escapes": '"' + "\\u0041" * 40_000 + '"',
    "layers": HEAD + "methods: [{method: headmask, heads: {" + ",".join(f"{i}: [0]" for i in range(20_000)) + "}}]",
    "too large": "#" * (plainyaml.MAX_BYTES + 1),
}


@pytest.mark.parametrize("name", BOMBS)
def test_large_files_take_bounded_time_and_memory(folder, watch, name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    recipe, message = outcome(folder / "recipe.yaml", BOMBS[name].encode(), watch)
    assert (recipe is not None) == (name == "layers")
    assert len(message) < LONGEST
    assert time.perf_counter() - start < 60
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 800


@pytest.mark.parametrize("where", ["task", "name", "key", "method", "methods", "parameter", "heads", "model", "whole"])
def test_no_file_runs_code(folder, watch, where):
    texts = {
        "task": HEAD + METHODS + "task: @\n",
        "name": HEAD.replace("fuzz", "@") + METHODS,
        "key": HEAD + METHODS + "? @\n: 1\n",
        "method": HEAD + "methods: [{method: @}]\n",
        "methods": HEAD + "methods: @\n",
        "parameter": HEAD + "methods: [{method: pasta, alpha: @}]\n",
        "heads": HEAD + "methods: [{method: pasta, heads: @}]\n",
        "model": HEAD.replace("tiny", "@") + METHODS,
        "whole": "@\n",
    }
    for code in CODE:
        for value in (code, "'" + code.replace("'", "''") + "'"):
            recipe, message = outcome(folder / "recipe.yaml", texts[where].replace("@", value).encode(), watch)
            assert watch.seen == [] and not (folder / "executed").exists(), code
            # as text it may stand where text stands, and stays text
            assert recipe is None or where in ("task", "name", "model"), (code, message)


@pytest.mark.parametrize("spec", HEAD_SPECS)
def test_head_specifications_take_bounded_time(folder, watch, spec):
    start = time.perf_counter()
    with watch, suppress(HeadError):
        assert len(Heads.parse(spec).table or ()) < 10_001
    assert watch.seen == [] and time.perf_counter() - start < 10
