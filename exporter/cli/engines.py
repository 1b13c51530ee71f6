"""The commands on finished engines: verify, inspect, run, bench, compare."""

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
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Tokens to generate at most; default 128.")
    ] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0.0, help="0, the default: greedy.")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", min=0.0, max=1.0, help="Nucleus sampling; default 1.0.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the sampling; default 0.")] = None,
    threads: Threads = 0,
    expect_digest: Digest = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate text with an engine, or tell the label of a prompt with a classifier."""
    from exporter.cli.answers import Answering, Question, classify_answer, generate_answer
    from exporter.runtime.engine import load

    output: Output = context.obj
    question = Question(prompt, _parse_ids(prompt_ids) if prompt_ids is not None else None, chat)
    question.check(output)
    answering = Answering(max_new_tokens, temperature, top_p, seed)
    answering.check()
    with load(engine, threads=threads, expect_digest=expect_digest) as loaded:
        answer = classify_answer if loaded.manifest.task.classifies else generate_answer
        answer(loaded, question, answering, output)


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError("usage.prompt_ids", f"{text!r} is not a list of token ids", "write 1,2,3") from None


@app.command()
def bench(
    context: typer.Context,
    engine: Engine,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int | None, typer.Option("--new-tokens", min=1, help="Tokens to decode; default 64.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows in the batch.")] = 1,
    context_tokens: Annotated[int, typer.Option("--context", min=0, help="Decode after this many tokens.")] = 0,
    threads: Threads = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure prefill and decode speed, load time and memory; of a classifier, how long a call takes."""
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
    if isinstance(value, dict):
        return ", ".join(f"{name} {part:.4g}" for name, part in value.items())
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
