import datetime
import random
import re
from importlib import resources
from types import SimpleNamespace

import pytest

import steerlens
from steerlens import plainyaml
from steerlens.errors import RecipeError
from steerlens.facts import ModelFacts
from steerlens.methods import ACT, PASTA, HeadMask, ZeroTuning
from steerlens.recipe import HUB_FILE, Evidence, Recipe, RecipeFetchError, load_recipe, shipped

FACTS = ModelFacts("tiny", "llama", 6, (8,) * 6, (4,) * 6)
FULL = """\
schema: 1
name: full
model: {id: tiny, revision: null, layers: 6, heads: 8}
methods:
  - {method: pasta, alpha: 1e-1, heads: {1: [0, 3]}}
  - {method: headmask, heads: "3:7;4:*", mode: zero}
task: conflict
evidence: {metric: follows, baseline: 0.51, steered: 0.99, n: 200, interval: [0.46, 0.50], date: 2026-11-20}
"""


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_reads_every_field(tmp_path):
    recipe = load_recipe(write(tmp_path, FULL))
    assert recipe.methods == [
        PASTA(alpha=0.1, heads={1: [0, 3]}),
        HeadMask(heads={3: [7], 4: "*"}, mode="zero"),
    ]
    assert (recipe.name, recipe.task) == ("full", "conflict")
    assert (recipe.model.id, recipe.model.revision, recipe.model.layers, recipe.model.heads) == (
        "tiny",
        None,
        6,
        8,
    )
    assert recipe.evidence == Evidence(
        metric="follows",
        baseline=0.51,
        steered=0.99,
        n=200,
        interval=[0.46, 0.5],
        date=datetime.date(2026, 11, 20),
    )


def test_save_and_load_round_trip(tmp_path):
    recipe = load_recipe(write(tmp_path, FULL))
    path = recipe.save(tmp_path / "saved.yaml")
    assert load_recipe(path) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    "name", ["1e-2", "no", "3:17", "2026-11-20", "a: b", "# x", "é\u0085\u2028 \t", "null", "''", "&a"]
)
def test_odd_names_survive_saving(tmp_path, name):
    recipe = Recipe(name=name, model={"id": "tiny"}, methods=[ACT(beta=1e-5), ZeroTuning(gamma=2)], task="*")
    assert load_recipe(recipe.save(tmp_path / "r.yaml")) == recipe


def test_published_evidence_is_text(tmp_path):
    text = FULL.split("evidence")[0] + 'evidence: "published, not reproduced here: arXiv 2311.02262"\n'
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.evidence == "published, not reproduced here: arXiv 2311.02262"
    assert load_recipe(recipe.save(tmp_path / "again.yaml")) == recipe


def test_save_replaces_whole_or_not_at_all(tmp_path, monkeypatch):
    recipe = load_recipe(write(tmp_path, FULL))
    target = tmp_path / "kept.yaml"
    target.write_text("before")
    monkeypatch.setattr(plainyaml, "dump", lambda data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        recipe.save(target)
    assert target.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept.yaml", "recipe.yaml"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: full", "nmae: full", r"recipe.yaml:2: nmae: unknown key; allowed: .*did you mean 'name'"),
        ("task: conflict", "tsak: conflict", r"recipe.yaml:7: tsak: unknown key.*did you mean 'task'"),
        ("layers: 6", "layer: 6", r"recipe.yaml:3: model.layer: unknown key.*did you mean 'layers'"),
        (
            "steered: 0.99",
            "steerd: 0.99",
            r"recipe.yaml:8: evidence.steerd: unknown key.*did you mean 'steered'",
        ),
        (
            "alpha: 1e-1",
            "alhpa: 1e-1",
            r"recipe.yaml:5: methods\[0\]: pasta has no parameter 'alhpa'.*did you mean 'alpha'",
        ),
        (
            "alpha: 1e-1",
            "alpha: yes",
            r"methods\[0\]: pasta: alpha='yes' is out of range; allowed: a number > 0",
        ),
        ("alpha: 1e-1", "alpha: -1", r"methods\[0\]: pasta: alpha=-1 is out of range"),
        ("alpha: 1e-1", f"alpha: 1{'0' * 400}", r"methods\[0\]: .*out of range"),
        ("method: pasta", "method: psata", r"methods\[0\]: unknown method 'psata'.*did you mean 'pasta'"),
        ("method: pasta", "methd: pasta", r"methods\[0\]: .*has no 'method'"),
        ('"3:7;4:*"', '"3-7"', r"recipe.yaml:6: methods\[1\]: heads: '3-7' in '3-7' has no ':'"),
        ('"3:7;4:*"', '"0-999999999:*"', r"methods\[1\]: heads: .* out of range for every model"),
        ("layers: 6", "layers: six", r"recipe.yaml:3: model.layers: 'six': input should be a valid integer"),
        ("layers: 6", "layers: true", r"model.layers: True: input should be a valid integer"),
        ("schema: 1", "schema: 2", r"recipe.yaml:1: schema: 2: input should be 1"),
        ("schema: 1\n", "", r"'schema' is missing"),
        ("id: tiny, ", "", r"model.id: is missing"),
        ("[0.46, 0.50]", "[0.5, 0.4]", r"evidence.interval: .*lower bound is above"),
        ("[0.46, 0.50]", "[0.5]", r"evidence.interval: .*at least 2 items"),
        ("2026-11-20", "2026-13-40", r"evidence.date: '2026-13-40' is not a date"),
        ("0.51", ".nan", r"evidence.baseline: nan: input should be a finite number"),
        (
            "task: conflict",
            "task: conflict\ntask: other",
            r"recipe.yaml: line 8: the key 'task' appears twice",
        ),
        ("task: conflict", "task: &a conflict", r"recipe.yaml: line 7: anchors and aliases"),
        (
            "task: conflict",
            "task: !!python/object/apply:os.system [ls]",
            r"line 7: the tag .*python/object/apply",
        ),
        ("task: conflict", "task: [", r"recipe.yaml: line \d+: while parsing a flow"),
    ],
)
def test_errors_name_file_place_and_nearest(tmp_path, old, new, message):
    assert old in FULL
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, FULL.replace(old, new)))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"- a",
        b"text",
        b"\x00",
        b"[" * 20_000,
        b"{a: " * 20_000,
        b"#" * 10**7,
        b"a: 1\n---\nb: 2",
        b"? [1]\n: 2",
        b"1: 2",
        b"!!set {a}",
        b"a: " + b"9" * 5000,
        b"\xef\xbb\xbf",
        b"methods: {}\nschema: 1",
    ],
    ids=range(15),
)
def test_odd_files_are_recipe_errors(tmp_path, content):
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        load_recipe(write(tmp_path, content))


def test_a_broken_file_raises_nothing_else(tmp_path):
    """A small run of the fuzz: mutate a valid file in 600 ways."""
    source, rng, loaded = FULL.encode(), random.Random(0), 0
    pieces = [
        b": ",
        b"- ",
        b"{",
        b"}",
        b"[",
        b"]",
        b"\n",
        b'"',
        b"!!int ",
        b"&a ",
        b"*a",
        b"null",
        b"1e999",
        b"-1",
        b"\t",
        b"0x",
        b"\xc3",
        b"method",
        b"heads",
        b"*",
        b"~",
        b"<<",
        b"true",
        b"\xf0\x9f\x98\x80",
        b"%",
        b"@",
        b"|",
        b">",
    ]
    for _ in range(600):
        text = bytearray(source)
        for _ in range(rng.randint(1, 4)):
            at, span = rng.randrange(len(text)), rng.choice([0, 0, 1, 5, 40])
            text[at : at + span] = rng.choice(pieces)
        try:
            load_recipe(write(tmp_path, bytes(text)))
            loaded += 1
        except RecipeError:
            pass
    assert 0 < loaded < 600


@pytest.mark.parametrize("wrong", [None, 3, b"x", [], {}, "", "\0", "a" * 5000, "a/b/c", "."])
def test_what_is_no_recipe_is_refused(wrong):
    with pytest.raises(RecipeError):
        load_recipe(wrong)


def test_unknown_name_lists_shipped_and_nearest():
    with pytest.raises(RecipeError, match=r"pasta-tiny, zerotuning-tiny\).*did you mean 'pasta-tiny'"):
        load_recipe("pasta-tniy")


def test_an_existing_file_comes_before_a_shipped_name(tmp_path, monkeypatch):
    (tmp_path / "pasta-tiny").write_text(FULL)
    assert load_recipe("pasta-tiny").name == "pasta-tiny"
    monkeypatch.chdir(tmp_path)
    assert load_recipe("pasta-tiny").name == "full"


def test_shipped_recipes_cover_the_methods():
    recipes = {name: load_recipe(name) for name in shipped()}
    assert all(recipe.name == name for name, recipe in recipes.items())
    methods = {method.name for recipe in recipes.values() if recipe.model.id == "tiny" for method in recipe.methods}
    assert methods >= {"pasta", "zerotuning", "act", "headmask"}
    for recipe in recipes.values():
        if recipe.model.id == "tiny":
            recipe.check(FACTS)
    for name in shipped():
        first = (resources.files("steerlens.recipes") / f"{name}.yaml").read_text().splitlines()[0]
        assert re.match(rf"# steerlens run --recipe {name} ", first)


def test_check_compares_with_the_model(tmp_path):
    recipe = load_recipe(write(tmp_path, FULL))
    recipe.check(FACTS)
    with pytest.raises(RecipeError, match=r"model.layers 6, but small has 4"):
        recipe.check(ModelFacts("small", "llama", 4, (8,) * 4, (8,) * 4))
    with pytest.raises(RecipeError, match=r"model.heads 8, but narrow has 4"):
        recipe.check(ModelFacts("narrow", "llama", 6, (4,) * 6, (4,) * 6))
    free = Recipe(name="free", model={"id": "tiny"}, methods=[HeadMask(heads={9: [1]})])
    with pytest.raises(RecipeError, match=r"recipe 'free': methods\[0\]: heads: layer 9 is out of range"):
        free.check(FACTS)


def test_from_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    from steerlens import models

    asked = []
    monkeypatch.setattr(models, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda repo, file, **_: asked.append((repo, file)) or str(write(tmp_path, FULL)),
    )
    assert load_recipe("someone/recipe").name == "full"
    assert asked == [("someone/recipe", "steerlens.yaml")]


def test_an_unreachable_hub_is_one_clear_error(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        RecipeFetchError,
        match=r"'someone/recipe' is no file here and cannot be fetched from the Hub: .*HF_TOKEN",
    ):
        load_recipe("someone/recipe")


def test_push_to_hub_uploads_what_load_reads(tmp_path, monkeypatch):
    import huggingface_hub

    uploaded = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo, **_):
            uploaded["repo"] = repo

        def upload_file(self, *, path_or_fileobj, path_in_repo, **_):
            uploaded[path_in_repo] = path_or_fileobj
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    recipe = load_recipe(write(tmp_path, FULL))
    assert recipe.push_to_hub("me/mine") == "https://hub/commit/1"
    assert uploaded["repo"] == "me/mine"
    assert load_recipe(write(tmp_path, uploaded[HUB_FILE])) == recipe


def test_recipe_steers_like_its_methods(model_of, prompts):
    import torch

    model, (ids, mask) = model_of("llama-gqa"), prompts("left")
    inputs = {"input_ids": ids, "attention_mask": mask}
    recipe = Recipe(name="r", model={"id": "x", "layers": 3, "heads": 8}, methods=[ZeroTuning(gamma=4)])
    with steerlens.steer(model, recipe):
        by_recipe = model(**inputs).logits
    with steerlens.steer(model, ZeroTuning(gamma=4)):
        by_method = model(**inputs).logits
    assert torch.equal(by_recipe, by_method)
    assert not torch.equal(by_recipe, model(**inputs).logits)
    with pytest.raises(RecipeError, match="layers 6"):
        steerlens.steer(model, load_recipe("zerotuning-tiny"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-2", 0.01),
        ("-3", -3),
        ("+.5", 0.5),
        ("3:17,7;8:*", "3:17,7;8:*"),
        ("3:17", "3:17"),
        ("no", "no"),
        ("true", True),
        ("", None),
        ("{3: [17, 7]}", {3: [17, 7]}),
        ("[a, 1]", ["a", 1]),
        ("'12'", "12"),
        ("*", "*"),
        (".inf", float("inf")),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("2026-11-20", "2026-11-20"),
    ],
)
def test_scalars(text, value):
    found = plainyaml.scalar(text)
    assert (found, type(found)) == (value, type(value))
