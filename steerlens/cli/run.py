"""`steerlens run`: prompts in, steered text out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from steerlens.cli import options
from steerlens.cli.guard import UsageError

# Blocks that begin with \b are shown as they stand.
EXAMPLES = """\b
Examples on the bundled model, which --model M replaces:

\b
  steerlens run --method seka --vectors seka-tiny.safetensors \\
      --set min_shift=0.04 --compare --prompt "{documents} {query}" \\
      --documents documents-tiny.jsonl \\
      --emphasize "The color of the valley workshop is orange." \\
      --query "Question: What is the color of the valley workshop? Answer:"

\b
  steerlens run --method selective_context --set keep=2 --compare \\
      --documents documents-tiny.jsonl --prompt "{documents} {query}" \\
      --query "Question: What is the color of the valley workshop? Answer:"

\b
  steerlens run --method focusicl --demos demos-tiny.jsonl --compare \\
      --prompt "{demos} Question: What does tractor belong to? Answer:"

\b
  steerlens run --method headmask --heads "1:1-7" --compare \\
      --prompt "The code is 5020. Question: What is the code? Answer:"

\b
  steerlens run --recipe pasta-tiny --prompt-file prompts.jsonl \\
      --output answers.jsonl
"""


def run(
    method: options.Methods = None,
    model: options.Model = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="The prompt. Default: standard input.")] = None,
    emphasize: Annotated[
        list[str] | None,
        typer.Option("--emphasize", metavar="TEXT", help="Text in the prompt to emphasise; repeatable."),
    ] = None,
    documents: Annotated[
        Path | None,
        typer.Option(
            "--documents",
            metavar="F.jsonl",
            help="Texts of the prompt that are its documents; a prompt with {documents} is built from them.",
        ),
    ] = None,
    demos: Annotated[
        Path | None,
        typer.Option("--demos", metavar="F.jsonl", help="The same for its examples, {demos}."),
    ] = None,
    query: Annotated[
        str | None, typer.Option("--query", metavar="TEXT", help="The same for what is asked, {query}.")
    ] = None,
    span: Annotated[
        list[str] | None,
        typer.Option("--span", metavar="GROUP=TEXT", help="Text in the prompt, for another span group; repeatable."),
    ] = None,
    heads: options.HeadSpec = None,
    vectors: options.Vectors = None,
    settings: options.Settings = None,
    recipe: options.Recipes = None,
    compare: Annotated[bool, typer.Option("--compare", help="Run unsteered first and show both.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print tokens as they come.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompt-file",
            metavar="F.jsonl",
            help="Rows with 'prompt' or 'messages', and optional 'emphasize', 'documents', 'demos', 'query', 'groups'.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="OUT.jsonl", help="Where results of --prompt-file go. Default: stdout."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts per forward.")] = 8,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with an --output that was stopped; the same settings are needed."),
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Render the prompt as a message in the chat template.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="System message; implies --chat.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the sampling; starts anew on each side.")] = 0,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    model_arg: options.ModelArgs = None,
    trust_remote_code: options.TrustRemoteCode = False,
    backend: options.BackendOption = options.Backend.auto,
) -> int | None:
    """Generate text with a model whose attention is steered.

    Each method's example with its inputs: steerlens list methods NAME
    """
    from steerlens.cli.job import Job
    from steerlens.cli.session import Sampling

    _check(prompt, prompt_file, output, resume, stream, as_json)
    loaded = None
    if recipe is not None:
        from steerlens.recipe import load_recipe

        loaded = load_recipe(recipe)
    methods = options.build_methods(method or [], loaded, heads, settings or [], vectors)
    groups = _groups(documents, demos, query, span or [])
    chosen = options.ModelOptions.of(
        model,
        loaded,
        device=device,
        device_map=device_map,
        dtype=dtype,
        revision=revision,
        model_args=model_arg or [],
        trust_remote_code=trust_remote_code,
    )
    job = Job(
        chosen,
        methods,
        loaded,
        backend.value,
        compare,
        chat or system is not None,
        system,
        Sampling(max_new_tokens, temperature, seed),
        as_json,
        groups,
    )
    if prompt_file is not None:
        return job.file(prompt_file, emphasize or [], output, batch_size, resume)
    job.single(_prompt(prompt), emphasize or [], stream)
    return None


def _check(
    prompt: str | None,
    prompt_file: Path | None,
    output: Path | None,
    resume: bool,
    stream: bool,
    as_json: bool,
) -> None:
    wrong = {
        "--json and --stream exclude each other": as_json and stream,
        "--prompt and --prompt-file exclude each other": prompt is not None and prompt_file is not None,
        "--stream shows one prompt; with --prompt-file leave it out": stream and prompt_file is not None,
        "--output needs --prompt-file; redirect standard output for one prompt": output is not None
        and prompt_file is None,
        "--resume needs --output": resume and output is None,
    }
    for problem, found in wrong.items():
        if found:
            raise UsageError(problem)


def _groups(documents: Path | None, demos: Path | None, query: str | None, spans: list[str]) -> dict[str, list[str]]:
    """Texts per span group."""
    from steerlens.cli.jsonl import read_texts

    groups: dict[str, list[str]] = {}
    for name, path in (("documents", documents), ("demos", demos)):
        if path is not None:
            groups[name] = read_texts(path, f"--{name}")
    if query is not None:
        groups["query"] = [query]
    for text in spans:
        name, equals, value = text.partition("=")
        if not equals or not name.strip() or not value:
            raise UsageError(f"--span {text!r} is not GROUP=TEXT")
        if name == "emphasis":
            raise UsageError("--span emphasis=…: give --emphasize TEXT")
        groups.setdefault(name, []).append(value)
    return groups


def _prompt(given: str | None) -> str:
    if given is None:
        if sys.stdin.isatty():
            raise UsageError("no prompt: give --prompt TEXT, --prompt-file F.jsonl, or pipe a text into standard input")
        try:
            given = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise UsageError(f"standard input is not text: {error}") from None
        given = given.removesuffix("\n")
    if not given.strip():
        raise UsageError("the prompt is empty; give --prompt TEXT, --prompt-file F.jsonl, or a text on standard input")
    return given
