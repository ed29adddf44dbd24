import ast
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import steerlens
from steerlens import methods
from steerlens.cli import app, doctor
from steerlens.methods import PASTA, ZeroTuning
from steerlens.recipe import load_recipe, shipped
from steerlens.vectors import VectorFile

ROOT = Path(__file__).resolve().parents[1]
WORDS = [f"w{i}" for i in range(60)]
PROMPT = "w1 w2 w3 w4 w5 w6 w7 w8"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small random Llama that never stops, with a word tokenizer and a chat template, as a folder."""
    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(3)
    net = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            weight.mul_(12 if "q_proj" in name or "k_proj" in name else 4 if weight.ndim > 1 else 1)
    net.save_pretrained(path)
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "<user>", "<system>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    fast.save_pretrained(path)
    return str(path)


@pytest.fixture
def call(model):
    """`call("run", …)` in this process, with `--model` and short answers."""

    def call(*arguments, input=None, run=True):
        extra = ["--model", model, "--max-new-tokens", "12"] if run else []
        return CliRunner().invoke(app, [*(["run"] if run else []), *extra, *map(str, arguments)], input=input)

    return call


def direct(model, method, prompts, emphasize=None, **options):
    """What the Python interface gives."""
    from steerlens.models import load

    net, tokenizer = load(model)
    inputs, spans = steerlens.encode(tokenizer, prompts, emphasize)
    with steerlens.steer(net, method or [], spans):
        out = net.generate(**inputs, max_new_tokens=12, do_sample=False, **options)
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def process(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
        **options,
    )


# --- the program itself -------------------------------------------------------------------------------------


def test_help_is_fast_and_loads_nothing_heavy(record_property):
    code = (
        "import sys; from steerlens.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'transformers', 'pydantic', 'numpy', 'yaml')\n"
        "print([m for m in heavy if m in sys.modules], file=sys.stderr)"
    )
    times = []
    for _ in range(3):
        start = time.perf_counter()
        found = process("-c", code)
        times.append(time.perf_counter() - start)
    sys.stdout.write(f"steerlens --help: {min(times):.2f} s (budget 0.3)\n")
    record_property("help_seconds", min(times))
    assert found.stderr.strip() == "[]"
    assert "Commands:" in found.stdout
    assert all(name in found.stdout for name in ("run", "heads", "list", "doctor", "bench"))
    assert min(times) < 3


def test_bare_call_prints_help_and_version_prints_the_version(call):
    bare = call(run=False)
    assert (bare.exit_code, bare.stdout) == (0, call("--help", run=False).stdout)
    assert call("--version", run=False).stdout == f"steerlens {steerlens.__version__}\n"


# --- one prompt ---------------------------------------------------------------------------------------------


def test_run_prints_the_steered_text_only(call, model):
    found = call("--method", "zerotuning", "--set", "gamma=4", "--prompt", PROMPT)
    assert (found.exit_code, found.stderr) == (0, "")
    assert found.stdout == direct(model, ZeroTuning(gamma=4), PROMPT)[0] + "\n"


def test_compare_shows_both_sides(call, model):
    found = call("--method", "pasta", "--set", "alpha=1e-3", "--prompt", PROMPT, "--emphasize", "w3 w4", "--compare")
    before, after = direct(model, None, PROMPT)[0], direct(model, PASTA(alpha=0.001), PROMPT, ["w3 w4"])[0]
    assert before != after
    assert found.stdout.splitlines() == [f"unsteered: {before}", f"steered:   {after}"]


def test_compare_says_when_nothing_changed(call):
    found = call("--method", "zerotuning", "--set", "gamma=1", "--prompt", PROMPT, "--compare")
    assert found.stdout.endswith("(the same text)\n")


def test_json_has_exactly_the_schema(call, model):
    arguments = [
        "--method",
        "zerotuning",
        "--set",
        "gamma=4",
        "--prompt",
        PROMPT,
        "--json",
        "--backend",
        "reference",
    ]
    plain = json.loads(call(*arguments).stdout)
    assert plain == {
        "model": model,
        "methods": [ZeroTuning(gamma=4).to_dict()],
        "backend": "reference",
        "results": [{"prompt": PROMPT, "steered": direct(model, ZeroTuning(gamma=4), PROMPT)[0]}],
    }
    compared = json.loads(call(*arguments, "--compare").stdout)
    assert compared["results"] == [{**plain["results"][0], "baseline": direct(model, None, PROMPT)[0]}]


def test_prompt_from_standard_input(call, model):
    found = call("--method", "zerotuning", "--set", "gamma=4", "--json", input=f"{PROMPT}\n")
    assert json.loads(found.stdout)["results"][0]["prompt"] == PROMPT


def test_stream_prints_what_is_generated(call, model):
    arguments = ["--method", "zerotuning", "--set", "gamma=4", "--prompt", PROMPT]
    assert call(*arguments, "--stream").stdout.split() == call(*arguments).stdout.split()
    both = call(*arguments, "--stream", "--compare").stdout
    assert both.startswith("unsteered:\n") and "\nsteered:\n" in both


def test_each_side_starts_from_the_seed(call):
    arguments = [
        "--method",
        "zerotuning",
        "--set",
        "gamma=1",
        "--prompt",
        PROMPT,
        "--temperature",
        "1.5",
        "--json",
        "--compare",
    ]
    texts = [json.loads(call(*arguments, "--seed", seed).stdout)["results"][0] for seed in (1, 1, 2)]
    assert texts[0]["baseline"] == texts[0]["steered"]
    assert texts[0] == texts[1] != texts[2]


def test_chat_and_system_use_the_template(call, model):
    plain = call("--method", "zerotuning", "--set", "gamma=4", "--prompt", PROMPT).stdout
    chat = call("--method", "zerotuning", "--set", "gamma=4", "--prompt", PROMPT, "--chat").stdout
    system = call("--method", "zerotuning", "--set", "gamma=4", "--prompt", PROMPT, "--system", "w9").stdout
    assert chat.strip() == direct(model, ZeroTuning(gamma=4), f"<user> {PROMPT}")[0]
    assert system.strip() == direct(model, ZeroTuning(gamma=4), f"<system> w9 <user> {PROMPT}")[0]
    assert len({plain, chat, system}) == 3


# --- methods, recipes and --set -----------------------------------------------------------------------------


def recipe_file(tmp_path, model, text="- {method: zerotuning, gamma: 4, heads: {1: [0]}}"):
    path = tmp_path / "r.yaml"
    path.write_text(
        f"schema: 1\nname: r\nmodel: {{id: {json.dumps(model)}, layers: 2, heads: 4}}\nmethods:\n  {text}\n"
    )
    return path


def used(found):
    return json.loads(found.stdout)["methods"]


def test_recipe_comes_first_then_set(call, model, tmp_path):
    recipe = recipe_file(tmp_path, model)
    arguments = ["--recipe", recipe, "--prompt", PROMPT, "--json"]
    assert used(call(*arguments)) == [ZeroTuning(gamma=4, heads={1: [0]}).to_dict() | {"heads": {"1": [0]}}]
    assert used(call(*arguments, "--set", "gamma=1e-1", "--heads", "0:1-2"))[0] == {
        "method": "zerotuning",
        "gamma": 0.1,
        "heads": {"0": [1, 2]},
    }


def test_recipe_says_the_model(model, tmp_path):
    recipe = recipe_file(tmp_path, model)
    found = CliRunner().invoke(
        app, ["run", "--recipe", str(recipe), "--prompt", PROMPT, "--json", "--max-new-tokens", "2"]
    )
    assert json.loads(found.stdout)["model"] == model


def test_methods_compose_recipe_first(call, model, tmp_path):
    found = call(
        "--recipe",
        recipe_file(tmp_path, model),
        "--method",
        "headmask",
        "--method",
        "act",
        "--prompt",
        PROMPT,
        "--json",
        "--set",
        "headmask.heads={0: [1]}",
        "--set",
        "beta=0.5",
        "--set",
        "act.threshold=0.2",
        "--set",
        "gamma=2",
    )
    assert [m["method"] for m in used(found)] == ["zerotuning", "headmask", "act"]
    assert [
        used(found)[0]["gamma"],
        used(found)[1]["heads"],
        used(found)[2]["beta"],
        used(found)[2]["threshold"],
    ] == [2.0, {"0": [1]}, 0.5, 0.2]


ZT = ("--method", "zerotuning", "--set", "gamma=2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "neither --method nor --recipe"),
        (("--method", "zerotunign"), "did you mean 'zerotuning'"),
        (("--method", "headmask"), "headmask needs heads"),
        (("--method", "zerotuning", "--set", "gama=2"), "did you mean 'gamma'"),
        (("--method", "zerotuning", "--set", "gamma"), "--set 'gamma' is not KEY=VALUE"),
        (("--method", "zerotuning", "--set", "gamma=-1"), "gamma=-1 is out of range; allowed: a number > 0"),
        (("--method", "zerotuning", "--set", "gamma=[1"), "--set gamma: '[1' cannot be read"),
        (
            ("--method", "act", *ZT, "--set", "heads=all"),
            "write --set act.heads=… or --set zerotuning.heads=…",
        ),
        (("--method", "act", *ZT, "--heads", "all"), "act and zerotuning both have 'heads'"),
        ((*ZT, "--set", "zerotunig.gamma=2"), "did you mean 'zerotuning'"),
        ((*ZT, "--heads", "5:1"), "layer 5 is out of range"),
        ((*ZT, "--heads", "1:4"), "head 4 of layer 1 is out of range"),
        ((*ZT, "--heads", "nonsense"), "heads: 'nonsense'"),
        ((*ZT, "--emphasize", "w3 w5"), "w3 w5"),
        (("--method", "pasta"), "pasta needs something to emphasise: give --emphasize"),
        ((*ZT, "--prompt", " "), "the prompt is empty"),
        ((*ZT, "--prompt", " ".join(["w1"] * 127)), "128 tokens"),
        ((*ZT, "--json", "--stream"), "--json and --stream exclude each other"),
        ((*ZT, "--prompt-file", "x"), "--prompt and --prompt-file exclude"),
        ((*ZT, "--output", "x"), "--output needs --prompt-file"),
        ((*ZT, "--resume"), "--resume needs --output"),
        ((*ZT, "--temperature", "-1"), "--temperature"),
        ((*ZT, "--max-new-tokens", "0"), "--max-new-tokens"),
        ((*ZT, "--backend", "cuda"), "--backend"),
        ((*ZT, "--promt", "x"), "--prompt"),
        ((*ZT, "--device", "gpu"), "device 'gpu' is unknown"),
        ((*ZT, "--dtype", "half"), "dtype 'half' is unknown"),
        ((*ZT, "--model-arg", "load_in_4bits=true"), "did you mean 'load_in_4bit'"),
        (("--recipe", "pasta-tniy"), "did you mean 'pasta-tiny'"),
        (("--recipe", "zerotuning-tiny"), "model.layers 6"),
    ],
)
def test_usage_errors_exit_2_with_one_clear_line(call, arguments, message):
    found = call("--prompt", PROMPT, *arguments)
    assert message in found.stderr, found.stderr
    assert (found.exit_code, found.stdout) == (2, "")
    assert "Traceback" not in found.stderr


def test_no_prompt_on_a_terminal(call, monkeypatch):
    monkeypatch.setattr("steerlens.cli.run.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    found = call(*ZT)
    assert (found.exit_code, "give --prompt TEXT" in found.stderr) == (2, True)


def test_a_model_that_cannot_be_fetched_exits_1(monkeypatch):
    from steerlens import models

    monkeypatch.setattr(models, "hub_is_reachable", lambda: False)
    found = CliRunner().invoke(app, ["run", *ZT, "--prompt", PROMPT, "--model", "llama"])
    assert (found.exit_code, found.stdout, found.stderr.count("\n")) == (1, "", 1)
    assert "--model tiny" in found.stderr


def test_a_bug_is_one_line_unless_debugging(call, monkeypatch):
    monkeypatch.setattr("steerlens.models.load", lambda *_: 1 / 0)
    found = call(*ZT, "--prompt", PROMPT)
    assert found.exit_code == 1
    assert found.stderr == "steerlens: failed: ZeroDivisionError: division by zero (STEERLENS_DEBUG=1 shows where)\n"
    monkeypatch.setenv("STEERLENS_DEBUG", "1")
    assert isinstance(call(*ZT, "--prompt", PROMPT).exception, ZeroDivisionError)


# --- many prompts -------------------------------------------------------------------------------------------


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_rows_are_batched_and_errors_recorded(call, model, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        lines(
            {"prompt": PROMPT, "emphasize": "w3"},
            "{torn",
            {"prompt": "w5 w6 w7", "emphasize": ["w6", "w7"]},
            {"prompt": "w8 w9", "emphasize": ["w30"]},
            {"promt": "w1"},
            {"prompt": "w8 w9 w10", "id": 7},
            {"messages": [{"role": "user", "content": "w1 w2"}], "emphasize": "w2"},
            {"prompt": ""},
            "[]",
            {"prompt": "w1", "emphasize": 3},
            {"messages": [{"role": "user"}]},
            {"prompt": "\ud800"},
            '{"prompt": NaN}',
            {"prompt": " ".join(["w9"] * 200)},
        )
    )
    found = call(
        "--method",
        "pasta",
        "--set",
        "alpha=0.01",
        "--prompt-file",
        source,
        "--output",
        out,
        "--batch-size",
        "4",
        "--emphasize",
        "w9",
        "--compare",
    )
    rows = read(out)
    assert (found.exit_code, found.stdout) == (3, "")
    assert "14 prompts, 10 with errors" in found.stderr
    assert [row["index"] for row in rows] == list(range(14))
    assert [i for i, row in enumerate(rows) if "steered" in row] == [0, 2, 5, 6]
    method = PASTA(alpha=0.01)
    expected = {
        0: (PROMPT, "w3"),
        2: ("w5 w6 w7", ["w6", "w7"]),
        5: ("w8 w9 w10", "w9"),
        6: ("<user> w1 w2", "w2"),
    }
    for index, (prompt, emphasize) in expected.items():
        assert rows[index]["steered"] == direct(model, method, prompt, emphasize)[0]
        assert rows[index]["baseline"] == direct(model, None, prompt)[0]
    assert set(rows[0]) == {"index", "prompt", "baseline", "steered"}
    assert set(rows[1]) == {"index", "prompt", "error"}
    errors = {i: row["error"] for i, row in enumerate(rows) if "error" in row}
    parts = {
        1: "not JSON",
        3: "w30",
        4: "did you mean 'prompt'",
        7: "not empty",
        8: "JSON object",
        9: "'emphasize' is 3",
        10: "is not a message",
        11: "surrogate",
        12: "NaN",
        13: "201 tokens",
    }
    assert errors.keys() == parts.keys()
    assert all(parts[i] in errors[i] for i in parts), errors


def test_without_output_results_go_to_stdout(call, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(lines({"prompt": "w1 w2"}, {"prompt": "w3"}))
    found = call(*ZT, "--prompt-file", source)
    assert (found.exit_code, [json.loads(line)["prompt"] for line in found.stdout.splitlines()]) == (
        0,
        ["w1 w2", "w3"],
    )
    document = json.loads(call(*ZT, "--prompt-file", source, "--json").stdout)
    assert [row["prompt"] for row in document["results"]] == ["w1 w2", "w3"]
    assert all(set(row) == {"prompt", "steered"} for row in document["results"])
    out = tmp_path / "out.jsonl"
    assert json.loads(call(*ZT, "--prompt-file", source, "--output", out, "--json").stdout) == document


def test_batches_draw_different_random_numbers(call, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(lines(*({"prompt": PROMPT} for _ in range(2))))
    arguments = [*ZT, "--prompt-file", source, "--batch-size", "1", "--temperature", "1.5", "--json"]
    one, other = json.loads(call(*arguments).stdout)["results"]
    assert one["steered"] != other["steered"]


@pytest.fixture
def finished(call, tmp_path):
    """A finished run over 7 rows: arguments, input and output."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(lines(*({"prompt": " ".join(WORDS[i : i + 2 + i % 3])} for i in range(6)), "broken"))
    arguments = [*ZT, "--prompt-file", source, "--batch-size", "3", "--temperature", "1.2"]
    assert call(*arguments, "--output", out).exit_code == 3
    return arguments, source, out


def test_an_existing_output_is_never_overwritten(call, finished):
    arguments, _, out = finished
    before = out.read_bytes()
    found = call(*arguments, "--output", out)
    assert (found.exit_code, "--resume" in found.stderr, out.read_bytes()) == (2, True, before)


@pytest.mark.parametrize("kept", [0, 1, 2, 4, 6])
def test_resume_drops_a_torn_line_and_makes_the_rest(call, finished, kept):
    arguments, _, out = finished
    whole = out.read_bytes()
    whole_lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(whole_lines[:kept]) + whole_lines[kept][:9])
    found = call(*arguments, "--output", out, "--resume")
    assert (found.exit_code, out.read_bytes()) == (3, whole)


def test_resume_of_a_finished_run_changes_nothing_and_loads_no_model(call, finished, monkeypatch):
    arguments, _, out = finished
    before = out.read_bytes()
    monkeypatch.setattr("steerlens.models.load", lambda *_: 1 / 0)
    assert (call(*arguments, "--output", out, "--resume").exit_code, out.read_bytes()) == (3, before)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--seed", "5"), "seed was 0, is 5"),
        (("--set", "gamma=3"), "methods was"),
        (("--compare",), "compare was False"),
        (("--batch-size", "2"), "batch_size was 3"),
        (("--dtype", "bf16"), "dtype was 'auto'"),
        ((), "prompt_file was"),
    ],
)
def test_resume_with_other_settings_is_refused(call, finished, change, named):
    arguments, source, out = finished
    before = out.read_bytes()
    if not change:
        source.write_text(lines({"prompt": "w1"}))
    found = call(*arguments, *change, "--output", out, "--resume")
    assert (found.exit_code, named in found.stderr, out.read_bytes()) == (2, True, before), found.stderr


def test_resume_needs_to_know_what_made_the_file(call, finished, tmp_path):
    arguments, _, out = finished
    (tmp_path / "out.jsonl.run.json").unlink()
    assert "nothing says what made" in call(*arguments, "--output", out, "--resume").stderr


def test_resume_refuses_a_file_with_foreign_lines(call, finished):
    arguments, _, out = finished
    out.write_bytes(b"hello\n" + out.read_bytes())
    found = call(*arguments, "--output", out, "--resume")
    assert (found.exit_code, "line 1" in found.stderr) == (2, True)


@pytest.mark.parametrize("content", ["", "\n \n", None])
def test_prompt_files_without_prompts(call, tmp_path, content):
    source = tmp_path / "in.jsonl"
    if content is not None:
        source.write_text(content)
    found = call(*ZT, "--prompt-file", source, "--output", tmp_path / "out.jsonl")
    assert (found.exit_code, sorted(tmp_path.glob("out*"))) == (2, [])
    assert call(*ZT, "--prompt-file", tmp_path, "--output", tmp_path / "no" / "out").exit_code == 2


def test_a_failed_start_leaves_no_output(call, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(lines({"prompt": "w1"}))
    found = call(*ZT, "--heads", "9:1", "--prompt-file", source, "--output", tmp_path / "out.jsonl")
    assert (found.exit_code, sorted(tmp_path.glob("out*"))) == (2, [])


def test_signals_and_resume(call, model, tmp_path):
    """SIGINT and SIGKILL one after the other, each in the middle of the run; then the rest."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(lines(*({"prompt": " ".join(WORDS[i % 50 : i % 50 + 2 + i % 4])} for i in range(120))))
    arguments = [*ZT, "--prompt-file", source, "--batch-size", "2", "--temperature", "1"]
    command = [
        sys.executable,
        "-m",
        "steerlens.cli",
        "run",
        *map(str, arguments),
        "--model",
        model,
        "--max-new-tokens",
        "12",
        "--output",
        str(out),
        "--resume",
    ]
    for number, expected in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        before = len(out.read_bytes().splitlines()) if out.exists() else 0
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        deadline = time.monotonic() + 60
        while not (out.exists() and len(out.read_bytes().splitlines()) > before) and time.monotonic() < deadline:
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.005)
        running.send_signal(number)
        stdout, stderr = running.communicate(timeout=60)
        assert (running.returncode, stdout) == (expected, ""), (number, stderr)
        assert "prompts; run again with --resume" in stderr if number == signal.SIGINT else stderr == ""
        assert before < len(out.read_bytes().splitlines()) < 120
    assert call(*arguments, "--output", out, "--resume").exit_code == 0
    fresh = tmp_path / "fresh.jsonl"
    assert call(*arguments, "--output", fresh).exit_code == 0
    assert out.read_bytes() == fresh.read_bytes()
    assert len(read(out)) == 120


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_waiting_run_quietly(number):
    command = [sys.executable, "-m", "steerlens.cli", "run", *ZT]
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    running = subprocess.Popen(command, text=True, cwd=ROOT, **pipes)
    # sleeping in a system call with the handlers set: it waits for the prompt
    deadline = time.monotonic() + 60
    while not caught(running.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    running.send_signal(number)
    assert running.wait(60) == 128 + number
    assert (running.stdout.read(), running.stderr.read()) == ("", "")


def caught(pid):
    """Whether the handlers are set; SIGHUP is the last to get one."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return int(mask, 16) >> (signal.SIGHUP - 1) & 1


def test_a_reader_that_leaves_is_no_error():
    command = [sys.executable, "-m", "steerlens.cli", "list", "methods"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    running.stdout.close()
    assert (running.wait(60), running.stderr.read()) == (141, "")


# --- shipped recipes on the shipped model ------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_stays_loaded():
    """Commands of this module find the bundled model loaded."""
    from steerlens import models

    tiny = models.load("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", lambda *_: tiny)
        yield


def answers(command):
    """Both texts of a command that compares."""
    program, *arguments = shlex.split(command)
    found = CliRunner().invoke(app, [*arguments, "--json", "--max-new-tokens", "8"])
    assert (program, found.exit_code, found.stderr) == ("steerlens", 0, "")
    (result,) = json.loads(found.stdout)["results"]
    assert result["steered"].strip()
    return result["baseline"], result["steered"]


def shown(*arguments):
    found = CliRunner().invoke(app, ["list", *arguments, "--json"])
    assert found.exit_code == 0, found.stderr
    return json.loads(found.stdout)


@pytest.mark.parametrize("name", methods.names())
def test_both_examples_of_a_method_run_alike(name, tiny_stays_loaded):
    by_recipe, by_parameters = shown("methods", name)["examples"]
    assert f"--recipe {name}-tiny" in by_recipe
    assert "--recipe" not in by_parameters and f"--model tiny --method {name}" in by_parameters
    sides = answers(by_recipe)
    assert answers(by_parameters) == sides
    evidence = load_recipe(f"{name}-tiny").evidence
    if abs(evidence.steered - evidence.baseline) > 0.1:
        assert sides[0] != sides[1]


def test_every_shipped_recipe_for_tiny_is_an_example_of_its_method():
    listed = {item["name"]: item for item in shown("methods")}
    for name in (name for name in shipped() if name.endswith("-tiny")):
        recipe = load_recipe(name)
        (method,) = recipe.methods
        assert (name, recipe.model.id) == (f"{method.name}-tiny", "tiny")
        assert f"--recipe {name} " in listed[method.name].pop("example")
    assert not [name for name, item in listed.items() if "example" in item]


def test_examples_in_the_help_of_run_work(tiny_stays_loaded):
    page = CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "80"}).stdout
    assert "steerlens list methods NAME" in page and max(map(len, page.splitlines())) <= 80
    commands = page.partition("Examples")[2].replace("\\\n", " ").splitlines()[1:]
    ran = [answers(line) for line in commands if line.strip() and "--prompt-file" not in line]
    assert len(ran) == 4 and ran[0][0] != ran[0][1]


@pytest.mark.parametrize("name", sorted(name for name in shipped() if not name.endswith("-tiny")))
def test_the_first_line_of_a_published_recipe_asks_for_its_model(name, monkeypatch):
    from steerlens import models

    asked = []

    def load(name, *_, **__):
        asked.append(name)
        raise models.ModelLoadError("not on this machine")

    monkeypatch.setattr(models, "load", load)
    command, *arguments = shlex.split(shipped()[name].read_text().splitlines()[0].removeprefix("# "))
    found = CliRunner().invoke(app, arguments)
    assert (command, found.exit_code, "not on this machine" in found.stderr) == ("steerlens", 1, True)
    assert asked == [load_recipe(name).model.id]


def test_pasta_tiny_follows_what_is_emphasised():
    facts = [f"The keeper of the castle chapel is {name}." for name in ("Bruno", "Mara")]
    question = "Question: What is the keeper of the castle chapel? Answer:"
    prompt = f"{facts[0]} The color of the lagoon depot is red. {facts[1]} {question}"
    for fact, answer in zip(facts, ("Bruno", "Mara"), strict=True):
        arguments = ["run", "--recipe", "pasta-tiny", "--prompt", prompt, "--emphasize", fact]
        assert CliRunner().invoke(app, [*arguments, "--max-new-tokens", "8"]).stdout.strip() == answer


def test_headmask_tiny_breaks_look_up():
    prompt = "The code of the harbor bakery is 5020. Question: What is the code of the harbor bakery? Answer:"
    arguments = [
        "run",
        "--recipe",
        "headmask-tiny",
        "--prompt",
        prompt,
        "--compare",
        "--json",
        "--max-new-tokens",
        "8",
    ]
    result = json.loads(CliRunner().invoke(app, arguments).stdout)["results"][0]
    assert result["baseline"].strip() == "5020" != result["steered"].strip()


# --- list and doctor ----------------------------------------------------------------------------------------


def test_list_names_everything(call):
    shown = call("list", "methods", run=False).stdout
    assert all(name in shown for name in methods.names())
    found = {m["name"]: m for m in json.loads(call("list", "methods", "--json", run=False).stdout)}
    assert list(found) == methods.names()
    assert found["headmask"]["required"] == ["heads"] and found["zerotuning"]["required"] == []
    assert found["pasta"]["parameters"]["alpha"] == PASTA().alpha
    assert found["pasta"]["needs"] == ["emphasis"]
    assert "needs:       emphasis (--emphasize TEXT); vectors (--vectors F.safetensors, from steerlens.fit" in shown
    assert shown.count("\n    example:     steerlens run --recipe ") == len(found)
    assert "2311.02262" in found["pasta"]["source"]
    assert "meta-llama/Llama-3.1-8B-Instruct" in call("list", "models", run=False).stdout
    recipes = {r["name"]: r for r in json.loads(call("list", "recipes", "--json", run=False).stdout)}
    assert recipes["pasta-tiny"]["methods"][0]["method"] == "pasta"
    shown = call("list", "recipes", run=False).stdout
    assert "heads=0:0,4;1:0,3,5,7\n" in shown and "heads=(86 in 26 layers)\n" in shown
    assert len(recipes["pasta-llama-7b-86heads"]["methods"][0]["heads"]) == 26
    assert call("list", "tasks", run=False).exit_code == 0
    assert call("list", "method", run=False).exit_code == 2


def test_editors_know_every_method_of_the_registry():
    own = {
        cls.__name__: cls.__module__
        for cls in map(methods.get, methods.names())
        if cls.__module__.startswith("steerlens.methods.")
    }
    tree = ast.parse(Path(methods.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    assert {line.names[0].name: line.module for line in block.body} == own
    rest = {"DecodingMethod", "EditMethod", "Method", "PerRow", "PromptMethod", "from_dict", "get", "names"}
    assert set(methods.__all__) == {*own, *rest} and len(methods.__all__) == len(own) + len(rest)
    assert all(getattr(methods, name).__name__ == name for name in methods.__all__)


def test_list_shows_one_in_full(call):
    page = call("list", "methods", "spotlight", run=False).stdout
    assert "log(τ/ψ) nats" in page and "target: float = 0.1\n" in page and "emphasis (--emphasize TEXT)" in page
    assert "law: Literal['ratio', 'odds'] = 'ratio'" in page
    item = json.loads(call("list", "methods", "spotlight", "--json", run=False).stdout)
    assert item["documentation"] in page and all(f"    {command}\n" in page for command in item["examples"])
    assert call("list", "recipes", "var-tiny", run=False).stdout == shipped()["var-tiny"].read_text()
    assert "stands in for the image" in " ".join(shown("recipes", "var-tiny")["notes"])
    assert shown("models", "tiny")["name"] == "tiny"
    found = call("list", "methods", "spotligt", run=False)
    assert found.exit_code == 2 and "'spotligt' is not among the methods: act, " in found.stderr
    assert "did you mean 'spotlight'" in found.stderr


FACTS = "The code of the office is 4417. The letter was cold. Question: What is the code? Answer:"


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("found_in_the_middle", [], "needs the span group 'documents': give --documents F.jsonl"),
        ("found_in_the_middle", ["--span", "document=The letter was cold."], "in the row; given: 'document'"),
        ("found_in_the_middle", ["--documents", "elsewhere.jsonl"], "group 'documents': 'The sea was calm.' is not in"),
        ("found_in_the_middle", ["--documents", "none.jsonl"], "--documents none.jsonl cannot be read: No such file"),
        ("lookback_lens", ["--vectors", "lookback_lens-tiny.safetensors"], "give --span context=TEXT, or 'groups'"),
        ("seka", ["--emphasize", "The letter was cold."], "seka needs vectors, from steerlens.fitting.seka(model"),
        ("headmask", [], "headmask needs heads, such as '3:17,7;8:*' or 'scores.json:top20'"),
        ("var", ["--span", "image=The letter was cold."], 'var needs channels, from steerlens.capture(model, stats="'),
        ("massive_activations", [], "needs layer, channels, from steerlens.fitting.massive_activations(model, texts)"),
        ("positional_scaling", [], "needs channel, from steerlens.fitting.positional_channels(model); `steerlens list"),
    ],
)
def test_what_is_missing_is_named_with_its_source(method, options, message, tmp_path, monkeypatch, tiny_stays_loaded):
    monkeypatch.chdir(tmp_path)
    Path("elsewhere.jsonl").write_text('"The letter was cold."\n"The sea was calm."\n')
    found = CliRunner().invoke(app, ["run", "--method", method, "--prompt", FACTS, *options])
    assert (found.exit_code, found.stdout) == (2, "") and message in found.stderr


VECTORS = ["adaseka", "anchor_reweighting", "focus_directions", "iti", "lookback_lens", "nl_iti", "seka"]


@pytest.mark.parametrize("method", VECTORS)
def test_vectors_of_another_method_are_refused(method, tmp_path, monkeypatch, tiny_stays_loaded):
    monkeypatch.chdir(tmp_path)
    spans = ["--emphasize", "The letter was cold.", "--span", "context=The letter was cold."]
    command = ["run", "--method", method, "--prompt", FACTS, *spans, "--vectors"]
    fit = f"steerlens.fitting.{method}(model, tokenizer, "
    for other in set(VECTORS) - {method}:
        found = CliRunner().invoke(app, [*command, f"{other}-tiny.safetensors"])
        assert (found.exit_code, found.stdout) == (2, "")
        assert f"{method}: vectors: {other}-tiny.safetensors was fitted for {other}; {fit}" in found.stderr
    VectorFile("other", {"other.0": torch.ones(2, 2)}, {}).save("unnamed.safetensors")
    found = CliRunner().invoke(app, [*command, "unnamed.safetensors"])
    assert found.exit_code == 2 and "vectors; it holds other; " + fit in found.stderr
    found = CliRunner().invoke(app, [*command, "gone.safetensors"])
    assert found.exit_code == 2 and "cannot read gone.safetensors: No such file" in found.stderr and fit in found.stderr
    found = CliRunner().invoke(app, [*command, "vectors.pt"])
    assert found.exit_code == 2 and f"allowed: the path of a .safetensors file, as {fit}" in found.stderr


def test_doctor_runs_the_backends(call):
    found = call("doctor", "--json", run=False)
    report = json.loads(found.stdout)
    assert (found.exit_code, report["ok"]) == (0, True)
    assert report["versions"]["torch"] == torch.__version__
    assert "cpu" in report["devices"]
    status = {check["name"]: check["status"] for check in report["checks"]}
    assert [status[name] for name in ("neutral", "reference", "sdpa")] == ["works"] * 3
    assert status["triton"] in ("works", "not here")


def test_doctor_fails_when_a_backend_is_wrong(call, monkeypatch):
    original = doctor._backend

    def wrong(model, inputs, native, backend, reference):
        return original(model, inputs, native + 0, backend, {"logits": native} if backend == "sdpa" else reference)

    monkeypatch.setattr(doctor, "_backend", wrong)
    found = call("doctor", run=False)
    assert found.exit_code == 1
    assert any(
        line.startswith("sdpa") and "fails: AssertionError: differs" in line for line in found.stdout.splitlines()
    )
