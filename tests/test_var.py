"""VAR: the numbers of methods/context.md §8, and the tokens it finds in the hidden states."""

import pytest
import torch
from method_checks import BACKENDS, attend, close, generate, keeps_its_promises
from steerlens.evals.families import tiny
from typer.testing import CliRunner

import steerlens
from steerlens.cli import app
from steerlens.errors import MethodError, SpanError, UnsupportedError
from steerlens.methods import VAR, from_dict
from steerlens.stream import peaks

ROW = (0.40, 0.05, 0.12, 0.03, 0.15, 0.05, 0.20)
MOVED = (0.16, 0.105714, 0.048, 0.063429, 0.317143, 0.105714, 0.20)
KEPT = (0.24, 0.087143, 0.072, 0.052286, 0.261429, 0.087143, 0.20)
IMAGE = {"image": [[(1, 6)]]}
SPANS = {"image": [[(3, 9)], [(9, 12), (13, 15)], [(5, 11)]]}
SINKS = {(1,): [25.0, 0.0, 30.0, 0.0, 19.0, 20.0, 0.0]}
LOW = VAR(tuple(range(64)), 2.6, 0.6, 0.3, 0.05, first_layer=0)


def test_peaks():
    x = torch.tensor([[[0.1, 4, -0.2, 0.1], [0.5, 0.4, -0.3, 0.2], [0.2, -0.1, 0.3, 3]]])
    close(peaks(x, (1, 3)), [[1.996260, 1.088658, 1.984623]])
    close(peaks(1e-4 * x[:, 1:2], (1, 3)), [[0.4e-4 / (0.135e-8 + 1e-6) ** 0.5]])


@pytest.mark.parametrize("backend", BACKENDS)
class TestOracle:
    @pytest.mark.parametrize(("moved", "expected"), [(0.6, MOVED), (0.4, KEPT)])
    def test_one_row(self, backend, moved, expected):
        """The published code's p = 0.6 is what sinks keep."""
        got = attend([[ROW]], VAR([1], moved=moved, first_layer=0), backend, spans=IMAGE, peaks=SINKS)
        close(got[0, 0], expected)
        assert got.sum().item() == pytest.approx(1, abs=1e-6)

    def test_all_that_sinks_hold(self, backend):
        got = attend([[ROW]], VAR([1], moved=1, first_layer=0), backend, spans=IMAGE, peaks=SINKS)[0, 0]
        close(got, [0, 0.05 * (s := 1 + 0.52 / 0.28), 0, 0.03 * s, 0.15 * s, 0.05 * s, 0.20])

    @pytest.mark.parametrize(
        ("change", "applies"),
        [
            ({"share": 0.69}, True),
            ({"share": 0.71}, False),
            ({"least": 0.39}, True),
            ({"least": 0.41}, False),
            ({"threshold": 18.0}, True),
            ({"threshold": 30.0}, False),  # a sink is above it
            ({"first_layer": 1}, False),
        ],
    )
    def test_the_gate(self, backend, change, applies):
        method = VAR([1], **{"first_layer": 0, "share": 0.2} | change)
        got = attend([[ROW]], method, backend, spans=IMAGE, peaks=SINKS, layers=2)[0, 0]
        assert ((got - torch.tensor(ROW)).abs().max() > 0.1) == applies

    def test_each_head_and_row_by_itself(self, backend):
        """Head 1 looks elsewhere; rows of the image and before it stay; a generated row is steered."""
        away = (0.70, 0.01, 0.02, 0.01, 0.05, 0.01, 0.20)
        image = [0.4, 0.1, 0.3, 0.2, 0, 0, 0]
        got = attend([[image, ROW], [image, away]], VAR([1], first_layer=0), backend, spans=IMAGE, peaks=SINKS)
        assert got.shape == (2, 2, 7)
        close(got[:, 1], [MOVED, away])
        before = [1.0, *[0.0] * 6]
        rows = [before, *[image] * 5, ROW]
        got = attend([rows], VAR([1], first_layer=0), backend, spans=IMAGE, peaks=SINKS)[0]
        close(got[[0, 4, 6]], [before, image, MOVED])
        late = attend([[ROW]], VAR([1], first_layer=0), backend, spans=IMAGE, peaks={(1,): SINKS[1,][:6]}, prompt=6)
        close(late[0, 0], MOVED)

    def test_an_image_without_sinks(self, backend):
        peaks = {(1,): [25.0, *[0.0] * 6]}
        close(attend([[ROW]], VAR([1], first_layer=0), backend, spans=IMAGE, peaks=peaks)[0, 0], ROW, 1e-6)


@pytest.mark.parametrize("method", [LOW, VAR((3, 40), 0.9, 0.3, 0.2, 0.0, 1, 1, {1: [0, 2, 5]})], ids=["all", "some"])
def test_promises(method, model, prompts):
    keeps_its_promises(model, method, VAR([3], moved=0), prompts, SPANS)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}], ids=["beams", "static"])
def test_sinks_follow_the_cache(model, prompts, options):
    ids, mask = prompts("left")
    found = generate(model, LOW, SPANS, ids, mask, use_cache=False, **options | {"cache_implementation": None})
    assert (generate(model, LOW, SPANS, ids, mask, **options) - found).abs().max() < 1e-3


def test_a_prompt_that_was_read_without_it(model, row):
    with torch.no_grad():
        cache = model(row[:, :10]).past_key_values
        with steerlens.steer(model, LOW, {"image": [[(3, 9)]]}):
            with pytest.raises(UnsupportedError, match=r"the cache holds prompt columns that it read before"):
                model(row[:, 10:], past_key_values=cache)
            model(row)
    assert not model.model.layers[1]._forward_pre_hooks


@pytest.fixture(scope="module")
def llava():
    return tiny("llava")


class TestVisionLanguage:
    """A LLaVA whose text tower is a tiny Llama; its image tokens are the span."""

    @pytest.fixture
    def inputs(self, llava):
        image, vision = llava.config.image_token_id, llava.config.vision_config
        count = (vision.image_size // vision.patch_size) ** 2
        ids = torch.tensor([[5, *[image] * count, 30, 31, 32, 33], [6, *[image] * count, 40, 41, 42, 43]])
        shape = (2, 3, vision.image_size, vision.image_size)
        pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    @pytest.fixture
    def image(self, llava, inputs):
        columns = (inputs["input_ids"][0] == llava.config.image_token_id).nonzero()[:, 0]
        return int(columns[0]), int(columns[-1]) + 1

    def test_is_its_definition(self, llava, inputs, image):
        """From the dense weights and the hidden states of the unsteered model, which a first steered layer sees too."""
        layer, moved, share, least = 1, 0.6, 0.3, 0.1
        with torch.no_grad(), steerlens.capture(llava, maps={layer: "*"}) as before:
            hidden = llava(**inputs, output_hidden_states=True).hidden_states[layer]
        x = hidden.float()
        phi = (x.abs().amax(-1) / x.square().mean(-1).sqrt())[:, None]
        threshold = float(phi[:, 0, slice(*image)].median())
        method = VAR(tuple(range(x.shape[-1])), threshold, moved, share, least, layer, layer)
        with (
            torch.no_grad(),
            steerlens.steer(llava, method, {"image": [[image]] * 2}),
            steerlens.capture(llava, maps={layer: "*"}) as after,
        ):
            llava(**inputs)
        expected = before[layer].map.clone()
        visual = torch.zeros(x.shape[1], dtype=torch.bool)
        visual[slice(*image)] = True
        edited = 0
        for b, h, i in torch.cartesian_prod(*map(torch.arange, expected.shape[:3])).tolist():
            a, sinks = expected[b, h, i], phi[b, 0] > threshold
            shown, of_image = a[visual & ~sinks].sum(), a[visual].sum()
            if visual[i] or of_image < least or shown / of_image < share or not a[visual & sinks].sum():
                continue
            budget, edited = moved * a[sinks].sum(), edited + 1
            expected[b, h, i] = torch.where(sinks, (1 - moved) * a, torch.where(visual, a * (1 + budget / shown), a))
        assert edited > 20
        assert (after[layer].map - expected).abs().max() < 1e-5

    def test_generated_rows(self, llava, inputs, image):
        options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        method = VAR(tuple(range(llava.config.text_config.hidden_size)), 2.5, 0.8, 0.1, 0.0, 0)
        found = []
        for methods, cached in ((method, True), (method, False), ([], True)):
            with steerlens.steer(llava, methods, {"image": [[image]] * 2}):
                found.append(torch.stack(llava.generate(**inputs, **options, use_cache=cached).logits))
        assert (found[0] - found[1]).abs().max() < 1e-4 * found[0].abs().max()
        assert (found[0] - found[2]).abs().max() > 1e-3 * found[0].abs().max()


def test_recipe_of_the_bundled_model():
    """A text in the place of the image, on the command line."""
    fact = "The color of the lagoon depot is red."
    prompt = f"The color of the lagoon depot is blue. {fact} Question: What is the color of the lagoon depot? Answer:"
    arguments = ["run", "--recipe", "var-tiny", "--prompt", prompt, "--max-new-tokens", "4"]
    assert CliRunner().invoke(app, [*arguments, "--emphasize", fact]).stdout.strip().startswith("red")
    arguments += ["--set", "group=image", "--span"]
    assert CliRunner().invoke(app, [*arguments, f"image={fact}"]).stdout.strip().startswith("red")
    assert CliRunner().invoke(app, [*arguments, f"image={fact}", "--set", "moved=0"]).stdout.startswith("blue")


def test_parameters(model, row):
    assert from_dict(VAR([4, 2]).to_dict()) == VAR((2, 4))
    for wrong in ({"channels": []}, {"channels": [1.5]}, {"channels": 3}, {"channels": [-1]}):
        with pytest.raises(MethodError, match="channels"):
            VAR(**wrong)
    with pytest.raises(MethodError, match="last_layer=1 is out of range; allowed: a whole number >= 2"):
        VAR([1], last_layer=1)
    with pytest.raises(MethodError, match=r"last_layer=9 is out of range; .* has layers 0..2"):
        steerlens.steer(model, VAR([1], last_layer=9), {"image": [[(1, 4)]]})
    with pytest.raises(SpanError, match="var needs the span group 'image', and these spans have emphasis"):
        steerlens.steer(model, VAR([1]), [[(1, 4)]])
    with pytest.raises(MethodError, match="group=''"):
        VAR([1], group="")
    assert VAR([1], group="emphasis").needs == ("emphasis",)
    with (
        steerlens.steer(model, VAR([64], first_layer=0), {"image": [[(1, 4)]]}),
        pytest.raises(MethodError, match="64"),
    ):
        model(row)
