import dataclasses
import datetime
import hashlib
import json
import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest

import steerlens
from steerlens import facts, plainyaml
from steerlens.errors import HeadError, RecipeError
from steerlens.facts import ModelFacts
from steerlens.methods import ACT, PASTA, EditMethod, HeadMask, ZeroTuning, from_dict
from steerlens.recipe import HUB_FILE, Evidence, Recipe, RecipeFetchError, load_recipe, shipped

ROOT = Path(__file__).resolve().parents[1]
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


@pytest.mark.parametrize("method", ["act", "pasta", "zerotuning"])
def test_evidence_of_the_tuned_recipes_is_that_of_their_reports(method):
    recipe = load_recipe(f"{method}-tiny")
    report = json.loads((ROOT / "evals" / "records" / "tune" / f"{method}-tiny.report.json").read_text())
    against = report["tuned_versus"]["baseline"]["accuracy"]
    assert from_dict(report["method"]) == recipe.methods[0] and report["run"]["task"] == recipe.task
    found = recipe.evidence
    assert (found.metric, found.n, found.date.isoformat()) == ("accuracy", against["n"], report["date"])
    assert [found.baseline, found.steered, *found.interval] == pytest.approx(
        [report["test"]["baseline"]["accuracy"], report["test"]["tuned"]["accuracy"], *against["interval"]], abs=1e-4
    )


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


@pytest.mark.parametrize("wrong", [None, 3, b"x", [], {}, "", "\0", "a" * 5000, "a/b/c", "."])
def test_what_is_no_recipe_is_refused(wrong):
    with pytest.raises(RecipeError):
        load_recipe(wrong)


def test_unknown_name_lists_shipped_and_nearest():
    with pytest.raises(RecipeError, match=r"pasta-tiny, .*zerotuning-tiny\).*did you mean 'pasta-tiny'"):
        load_recipe("pasta-tniy")


def test_an_existing_file_comes_before_a_shipped_name(tmp_path, monkeypatch):
    (tmp_path / "pasta-tiny").write_text(FULL)
    assert load_recipe("pasta-tiny").name == "pasta-tiny"
    monkeypatch.chdir(tmp_path)
    assert load_recipe("pasta-tiny").name == "full"


def config_of(model):
    """The shape of a model that a recipe is shipped for, as its own config has it."""
    from transformers import AutoConfig

    kind, kv_heads = MODELS[model]
    shape = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": kv_heads}
    return AutoConfig.for_model(kind, vocab_size=97, hidden_size=128, intermediate_size=64, head_dim=4, **shape)


MODELS = {
    "huggyllama/llama-7b": ("llama", 32),
    "meta-llama/Llama-2-7b-chat-hf": ("llama", 32),
    "yaofu/llama-2-7b-80k": ("llama", 32),
    "meta-llama/Meta-Llama-3-8B-Instruct": ("llama", 8),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", 8),
    "mistralai/Mistral-7B-Instruct-v0.2": ("mistral", 8),
    "meta-llama/Llama-2-7b-hf": ("llama", 32),
    "lmsys/vicuna-7b-v1.5": ("llama", 32),
    "lmsys/vicuna-7b-v1.5-16k": ("llama", 32),
    "allenai/tulu-2-7b": ("llama", 32),
}
HEADS = {
    "act-llama-2-7b-chat-classification": 184,
    "act-llama-2-7b-chat-multiple-choice": 72,
    "act-mistral-7b-instruct-v0.2-classification": 16,
    "act-mistral-7b-instruct-v0.2-multiple-choice": 104,
    "context_awareness-llama-3-8b-instruct-retrieval": 1024,
    "decore-llama-3-8b-instruct-10heads": 10,
    "decore-llama-3-8b-instruct-50heads": 50,
    "headmask-llama-2-7b-80k": 10,
    "headmask-llama-3-8b-instruct-10heads": 10,
    "headmask-llama-3-8b-instruct-50heads": 50,
    "pasta-llama-7b-25heads": 25,
    "pasta-llama-7b-53heads": 53,
    "pasta-llama-7b-86heads": 86,
    "zerotuning-llama-3.1-8b-instruct-boolq": 1024,
    "zerotuning-llama-3.1-8b-instruct-sst2": 1024,
}


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_fit_their_models(name):
    recipe = load_recipe(name)
    assert recipe.name == name and name.startswith(f"{recipe.methods[0].name}-")
    first = (resources.files("steerlens.recipes") / f"{name}.yaml").read_text().splitlines()[0]
    assert re.match(rf"# steerlens run --recipe {name} ", first)
    if recipe.model.id == "tiny":
        assert isinstance(recipe.evidence, Evidence)
        recipe.check(FACTS)
        return
    assert recipe.evidence.startswith("published, not reproduced here: ")
    assert re.search(r"commit [0-9a-f]{7,8}\b|; no code was published$", recipe.evidence)
    assert re.search(r"arXiv \d{4}\.\d{5}", recipe.evidence)
    known = facts.read(config_of(recipe.model.id))
    assert (recipe.model.layers, recipe.model.heads) == (32, 32)
    recipe.check(known)
    [method] = recipe.methods
    if name in HEADS or hasattr(method, "heads"):
        assert sum(map(len, method.heads.resolve(known).values())) == HEADS.get(name, 1024)
    elif isinstance(method, EditMethod):
        assert method.plan(known, None)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_shipped_recipes_cover_the_methods():
    recipes = [load_recipe(name) for name in shipped()]
    for own in (True, False):
        found = {method.name for recipe in recipes if (recipe.model.id == "tiny") is own for method in recipe.methods}
        assert found >= {"pasta", "zerotuning", "act", "headmask"}


@pytest.mark.parametrize(
    "name", [n for n in HEADS if not n.startswith("decore") and re.search("classification|heads|80k", n)]
)
def test_published_recipes_steer_a_model_of_that_shape(name):
    import torch
    from transformers import AutoModelForCausalLM

    recipe = load_recipe(name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(recipe.model.id)).eval()
    ids = torch.randint(3, 97, (1, 24), generator=torch.Generator().manual_seed(0))
    plain = model(ids).logits
    # columns of a random model get no more than about 1/N
    settings = {"threshold": 0.03} if recipe.methods[0].name == "act" else {}
    method = dataclasses.replace(recipe.methods[0], **settings)
    with steerlens.steer(model, recipe.model_copy(update={"methods": [method]}), spans=[[(4, 8)]]) as steered:
        logits = model(ids).logits
    assert logits.isfinite().all() and not torch.equal(logits, plain)
    assert len(steered.report()) == len(method.heads.table)


def test_published_score_files_load(tmp_path):
    """Retrieval scores as Wu et al. and DeCoRe keep them, head lists as PASTA does."""
    scores = {f"{layer}-{head}": [0] * 3 for layer in range(6) for head in range(8)}
    scores |= {"4-7": [0.9, 0.8, 1.0], "1-0": [0, 0.5, 0.5], "1-3": [1, 0, 0], "0-2": 0.2}
    (tmp_path / "scores.json").write_text(json.dumps(scores) + "\n")
    (tmp_path / "lists.json").write_text('{"4": [7, 1], "1": [0]}')
    (tmp_path / "ours.json").write_text(json.dumps({"scores": scores, "model": "tiny"}))
    text = FULL.split("methods")[0]
    for heads, table in (
        ("scores.json:top1", ((4, (7,)),)),
        ("scores.json:top4", ((0, (2,)), (1, (0, 3)), (4, (7,)))),
        ("ours.json:top1", ((4, (7,)),)),
        ("lists.json", ((1, (0,)), (4, (1, 7)))),
    ):
        recipe = load_recipe(write(tmp_path, f"{text}methods: [{{method: headmask, heads: '{tmp_path}/{heads}'}}]\n"))
        assert recipe.methods[0].heads.table == table
        saved = recipe.save(tmp_path / "saved.yaml")
        assert "json" not in saved.read_text() and load_recipe(saved) == recipe
        recipe.check(FACTS)


@pytest.mark.parametrize(
    ("content", "spec", "message"),
    [
        ("{", ":top1", "cannot read"),
        ("[" * 100_000, ":top1", "cannot read"),
        ('{"1-1": ' + "9" * 5000 + "}", ":top1", "cannot read"),
        ("[]", ":top1", "holds a list"),
        ('{"scores": []}', ":top1", "holds a list"),
        ('{"1-1": NaN}', ":top1", "'1-1': nan is not"),
        ('{"1-1": [Infinity]}', ":top1", "is not"),
        ('{"1-1": []}', ":top1", "is not"),
        ('{"1-x": 1}', ":top1", "is not"),
        ('{"1-1": 1}', "", "say how many"),
        ('{"1-1": 1}', ":top2", "more heads than the 1"),
        ('{"x": [1]}', "", "layer 'x' is not an index"),
    ],
)
def test_wrong_score_files_are_one_clear_error(tmp_path, content, spec, message):
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(HeadError, match=rf"heads: .*{re.escape(message)}"):
        HeadMask(heads=f"{tmp_path}/scores.json{spec}")


def test_a_score_file_must_be_a_file_of_reasonable_size(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(65 * 2**20)
    for name in ("pipe.json", "large.json"):
        with pytest.raises(HeadError, match=f"{name} is no file of at most 64 MiB"):
            HeadMask(heads=f"{tmp_path}/{name}:top1")


LOGITS = """
import sys, hashlib, torch
import steerlens
from steerlens import models
torch.set_num_threads(1)
model, tokenizer = models.load("tiny", device="cpu", dtype="float32")
inputs, spans = steerlens.encode(tokenizer, [sys.argv[2]], [[sys.argv[3]]], device=model.device)
with steerlens.steer(model, steerlens.load_recipe(sys.argv[1]), spans=spans):
    print(hashlib.sha256(model(**inputs).logits.detach().numpy().tobytes()).hexdigest())
"""


def test_a_recipe_gives_the_same_output_in_a_fresh_process(tmp_path):
    import torch

    from steerlens import models

    fact = "The keeper of the castle chapel is Mara."
    prompt = (
        f"The keeper of the castle chapel is Bruno. {fact} Question: What is the keeper of the castle chapel? Answer:"
    )
    method = PASTA(alpha=0.07, heads={1: [1, 2, 3], 3: [0]})
    path = Recipe(name="mine", model={"id": "tiny", "layers": 6}, methods=[method]).save(tmp_path / "mine.yaml")

    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    run = [sys.executable, "-m", "steerlens.cli", "run", "--recipe", path, "--prompt", prompt, "--emphasize", fact]
    commands = [
        [*run, "--json", "--max-new-tokens", "16", "--device", "cpu", "--dtype", "float32"],
        [sys.executable, "-c", LOGITS, path, prompt, fact],
    ]
    fresh = [[subprocess.check_output(c, env=environment, text=True, cwd=tmp_path) for c in commands] for _ in range(2)]
    assert fresh[0] == fresh[1]

    model, tokenizer = models.load("tiny", device="cpu", dtype="float32")
    inputs, spans = steerlens.encode(tokenizer, [prompt], [[fact]], device=model.device)
    with steerlens.steer(model, method, spans=spans):
        tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        logits = model(**inputs).logits
    plain = model(**inputs).logits
    text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert json.loads(fresh[0][0])["results"][0]["steered"] == text
    assert fresh[0][1].strip() == hashlib.sha256(logits.detach().numpy().tobytes()).hexdigest()
    assert not torch.equal(logits, plain)


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
