"""The commands on finished engines: verify, inspect, run, bench, compare."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from exporter.cli.app import Debug, Json, app
from exporter.cli.output import Output
from exporter.core.errors import InputError

Engine = Annotated[Path, typer.Argument(metavar="ENGINE", help="Artifact directory.")]
Against = Annotated[Path, typer.Option("--against", help="The checkpoint the engine was built from.")]
Text = Annotated[Path | None, typer.Option("--text", help="Evaluation text; default: the built-in sample.")]
QParams = Annotated[
    Path | None,
    typer.Option("--qparams", help="The quantization parameters it was built with; without: eager's limits alone."),
]
Report = Annotated[Path | None, typer.Option("--report", help="Write an HTML report here.")]
Threads = Annotated[int, typer.Option("--threads", min=0, help="Threads; 0: one per physical core.")]
ProgressStyle = Annotated[str, typer.Option("--progress", help="auto, plain, jsonl or none.")]
Digest = Annotated[str | None, typer.Option("--expect-digest", help="Refuse any other artifact.")]


@app.command()
def verify(
    context: typer.Context,
    engine: Engine,
    against: Against,
    text: Text = None,
    qparams: QParams = None,
    report: Report = None,
    threads: Threads = 0,
    progress: ProgressStyle = "auto",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Prove an engine equal to the eager model within its recipe's limits."""
    from exporter import api
    from exporter.cli.progress import close, make_progress

    shown = make_progress(progress, {"load": 1, "verify": 20})
    try:
        result = api.verify(
            engine, against=against, text=text, qparams=qparams, report=report, threads=threads, progress=shown
        )
    finally:
        close(shown)
    output: Output = context.obj
    output.result(result.to_json(), result.describe())


@app.command()
def inspect(
    context: typer.Context,
    engine: Engine,
    for_host: Annotated[bool, typer.Option("--for-host", help="Also check that it runs on this host.")] = False,
    expect_digest: Digest = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check an artifact's files and show what it is. Nothing of it is executed."""
    from exporter import api

    seen = api.inspect(engine, for_host=for_host, expect_digest=expect_digest)
    output: Output = context.obj
    output.result(seen.to_json(), seen.describe())


@app.command()
def run(
    context: typer.Context,
    engine: Engine,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Text to continue, or the question with --chat.")
    ] = None,
    prompt_ids: Annotated[str | None, typer.Option("--prompt-ids", help="Token ids: 1,2,3")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Use the chat template; without --prompt: a conversation.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Nucleus sampling.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling.")] = 0,
    threads: Threads = 0,
    expect_digest: Digest = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate text with an engine."""
    from exporter.runtime.engine import load
    from exporter.runtime.sampling import Sampling

    output: Output = context.obj
    ids = _parse_ids(prompt_ids) if prompt_ids is not None else None
    if (prompt is None) == (ids is None) and not (chat and ids is None):
        raise InputError("usage.prompt", "give one of --prompt, --prompt-ids or --chat", "see `enginesmith run --help`")
    if chat and (ids is not None or (prompt is None and output.json)):
        raise InputError("usage.chat", "--chat takes --prompt, or a terminal without --json", "give --prompt TEXT")
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    with load(engine, threads=threads, expect_digest=expect_digest) as loaded:
        if chat and prompt is None:
            _converse(loaded, output, max_new_tokens, sampling)
            return
        if chat:
            assert prompt is not None
            messages = [{"role": "user", "content": prompt}]
            answer = loaded.chat(messages, max_new_tokens=max_new_tokens, sampling=sampling, on_text=output.stream)
        else:
            given = ids if ids is not None else prompt
            assert given is not None
            answer = loaded.generate(given, max_new_tokens=max_new_tokens, sampling=sampling, on_text=output.stream)
        output.result(answer.to_json(), "")


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError("usage.prompt_ids", f"{text!r} is not a list of token ids", "write 1,2,3") from None


def _converse(loaded: "object", output: Output, max_new_tokens: int, sampling: "object") -> None:
    """One chat on standard input: a line a turn, until the end of input."""
    from exporter.runtime.engine import Engine as Loaded
    from exporter.runtime.sampling import Sampling

    assert isinstance(loaded, Loaded) and isinstance(sampling, Sampling)
    messages: list[dict[str, str]] = []
    print("Type a message; end with Ctrl-D.", file=sys.stderr)
    for line in sys.stdin:
        messages.append({"role": "user", "content": line.rstrip("\n")})
        answer = loaded.chat(messages, max_new_tokens=max_new_tokens, sampling=sampling, on_text=output.stream)
        output.stream("\n")
        messages.append({"role": "assistant", "content": answer.text})


@app.command()
def bench(
    context: typer.Context,
    engine: Engine,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens to decode.")] = 64,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows in the batch.")] = 1,
    context_tokens: Annotated[int, typer.Option("--context", min=0, help="Decode after this many tokens.")] = 0,
    threads: Threads = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure prefill and decode speed, load time and memory."""
    from exporter import api

    measured = api.bench(
        engine,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        context=context_tokens,
        threads=threads,
    )
    width = max(map(len, measured))
    output: Output = context.obj
    output.result(measured, "\n".join(f"{name:<{width}}  {_short(value)}" for name, value in measured.items()))


def _short(value: object) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


@app.command()
def compare(
    context: typer.Context,
    engines: Annotated[list[Path], typer.Argument(metavar="ENGINE...", help="Artifact directories.")],
    against: Against,
    text: Text = None,
    report: Report = None,
    threads: Threads = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Tabulate engines of one checkpoint: size, quality against eager and each other, speed."""
    from exporter import api

    found = api.compare(engines, against=against, text=text, threads=threads, report=report)
    output: Output = context.obj
    output.result(found.to_json(), found.describe())
