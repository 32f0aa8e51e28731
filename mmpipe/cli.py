"""The command line. Thin: each command parses, calls what Python users call, and prints.

Results go to standard output, progress and errors to standard error. Nothing here imports torch before a command that
needs it runs.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from mmpipe import __version__
from mmpipe.errors import ConfigError, Interrupted, MmpipeError
from mmpipe.loading import heed_interrupts, keep_freed_memory, leave_garbage_at_exit, use_huge_pages

if TYPE_CHECKING:
    from mmpipe.config import Config
    from mmpipe.media import Listing

app = typer.Typer(
    name="mmpipe",
    help="Multimodal inference pipelines: one YAML, one fused torch.fx graph, early exits, jobs that lose nothing.\n\n"
    "Start with: mmpipe run quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 3 done but more failed than allowed, "
    "4 output refused, 130 and 143 interrupted.",
)

ConfigArgument = Annotated[str, typer.Argument(help="A packaged name (quickstart, clip_clap, …) or a YAML file.")]
InputOption = Annotated[Path | None, typer.Option(help="Folder or manifest to read instead of the configuration's.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key: runtime.batch_size=8. May be repeated."),
]

_AFRESH = ("fusion.calibration=null",)  # what was certified before


def main() -> None:
    """Entry point: errors become one message and an exit code, never a traceback."""
    use_huge_pages()
    keep_freed_memory()
    leave_garbage_at_exit()
    heed_interrupts()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that can't show a character shows its number
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def _reporting(*, as_json: bool = False) -> Iterator[None]:
    """MmpipeError → message on standard error and its exit code."""
    try:
        with _results():
            yield
    except KeyboardInterrupt:
        _fail("interrupted", 130, as_json)
    except Interrupted as error:
        _fail(f"{error}: what was committed is complete", error.exit_code, as_json)
    except MmpipeError as error:
        _fail(str(error), error.exit_code, as_json)


@contextmanager
def _results() -> Iterator[None]:
    """Printing of results: a reader that goes away (`| head`) is no error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int, as_json: bool) -> NoReturn:
    _say(f"mmpipe: {message}", event="error" if as_json else None)
    raise typer.Exit(code)


def _say(text: str, event: str | None = None) -> None:
    """A line on standard error: plain, or as JSON where `event` is given."""
    from mmpipe.jobs.progress import visible

    line = visible(text, "\n") if event is None else json.dumps({"event": event, "text": text})
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - the command line's own voice


def _print(text: str = "") -> None:
    print(text)  # noqa: T201 - results


def _version(wanted: bool) -> None:
    if wanted:
        _print(f"mmpipe {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of all commands."""


@app.command()
def run(
    config: ConfigArgument,
    input: InputOption = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write into.")] = None,
    set_: SetOption = None,
    mode: Annotated[
        str, typer.Option(metavar="new|overwrite", help="overwrite: replace what mmpipe wrote into the output before.")
    ] = "new",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N samples.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 when any sample failed, even partly.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Progress as JSON lines, the summary as JSON.")] = False,
) -> None:
    """Run a folder of media: one row of predictions per sample, run.json and report.html.

    The output folder must be new or empty, and not inside the input folder.
    """
    with _reporting(as_json=json_):
        from mmpipe.jobs.output import check_mode

        check_mode(mode)
        loaded = _load(config, set_)
        listing, folder = _job(loaded, input, output, mode)
        from mmpipe.jobs.progress import for_stream

        progress = for_stream(as_json=json_)
        progress.say(f"building {loaded.source.name or config}")
        from mmpipe import Pipeline
        from mmpipe.jobs.job import run_job

        with Pipeline(loaded, say=progress.say) as pipeline:
            for note in pipeline.notes:
                progress.say(f"note: {note}")
            summary = run_job(pipeline, listing, folder, mode=mode, limit=limit, progress=progress)
        with _results():
            if json_:
                _print(json.dumps(summary.run, ensure_ascii=False))
            else:
                from mmpipe.jobs.terminal import show_summary

                show_summary(summary, packaged=loaded.source.name if loaded.source.packaged else None)
        code = summary.exit_code(strict=strict)
        if code:
            progress.say(f"exit code {code}: {summary.verdict(strict=strict)}")
        raise typer.Exit(code)


@app.command()
def predict(
    config: ConfigArgument,
    image: Annotated[Path | None, typer.Option(help="A picture.")] = None,
    text: Annotated[str | None, typer.Option(help="The text itself; @FILE reads a file.")] = None,
    audio: Annotated[Path | None, typer.Option(help="A sound.")] = None,
    set_: SetOption = None,
) -> None:
    """Predict one sample; prints JSON."""
    with _reporting():
        if image is None and text is None and audio is None:
            raise ConfigError("nothing to predict", hint="give --image, --text or --audio")
        for option, path in (("--image", image), ("--audio", audio)):
            if path is not None and not path.exists():
                raise ConfigError(f"{str(path)!r}: there is no such file", where=option)
        loaded = _load(config, set_)
        words: Any = Path(text[1:]) if text is not None and text.startswith("@") else text
        from mmpipe import Pipeline

        with Pipeline(loaded) as pipeline:
            prediction = pipeline(image=image, text=words, audio=audio)
        _print(json.dumps(_plain(prediction), ensure_ascii=False, indent=2))
        raise typer.Exit(1 if prediction.status == "failed" else 0)


@app.command()
def check(
    config: ConfigArgument,
    input: InputOption = None,
    set_: SetOption = None,
) -> None:
    """Validate a configuration, pair and count its input. Loads no model, opens no medium."""
    with _reporting():
        from mmpipe.jobs.progress import visible
        from mmpipe.jobs.terminal import show_listing
        from mmpipe.starter import BLANK_LABELS

        loaded = _load(config, set_)
        _print(f"{visible(str(loaded.source.file or config))}: the configuration is valid")
        if loaded.all_labels == BLANK_LABELS:
            _print(f"note: the labels are still those that init wrote ({', '.join(BLANK_LABELS)}): put in your own")
        if input is None and loaded.input.folder is None and loaded.input.manifest is None:
            _print("no input is configured: give --input PATH to see what it holds")
            return
        show_listing(_samples(loaded, input), loaded.modalities)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="A folder of media, as it is.")],
    output: Annotated[Path | None, typer.Option(help="The YAML to write; default: mmpipe.yaml in the folder.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Write a configuration for a folder: looks at how its files pair up."""
    with _reporting():
        from mmpipe.jobs.progress import visible
        from mmpipe.jobs.terminal import show_listing
        from mmpipe.starter import write_starter

        starter = write_starter(folder, output, force=force)
        show_listing(starter.pairing.listing, starter.pairing.modalities)
        path = visible(str(starter.path))
        for note in starter.notes:
            _print(f"note: {visible(note)}")
        _print(f"\nwrote {path}")
        _print(
            f"next: put your labels into it, then\n  mmpipe pull {shlex.quote(path)}\n  mmpipe run {shlex.quote(path)}"
        )


@app.command()
def pull(config: ConfigArgument, set_: SetOption = None) -> None:
    """Fetch the weights of a configuration's models ahead of time."""
    with _reporting():
        loaded = _load(config, set_)
        from mmpipe.build import pull_weights

        for modality, model, files in pull_weights(loaded, say=_say):
            if not files:
                _print(f"{modality}: {model}: nothing to fetch")
                continue
            size = sum(os.path.getsize(file) for file in files if os.path.exists(file))
            _print(f"{modality}: {model}: {len(files)} files, {size / 1e6:.1f} MB, {files[0]}")


@app.command()
def explain(
    config: ConfigArgument,
    input: InputOption = None,
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("explain.html"),
    limit: Annotated[int, typer.Option(min=1, help="How many samples to measure with.")] = 128,
    json_: Annotated[bool, typer.Option("--json", help="Print what the page is made of; write no page.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Write the run as a trace for Perfetto too.")] = None,
    set_: SetOption = None,
) -> None:
    """Why is it as fast as it is: measure a run, and write one page that shows where the time goes.

    Where the configuration has no input, and none is given, the run is measured with made-up media.
    """
    with _reporting(as_json=json_):
        loaded = _load(config, set_)
        given = input is not None or loaded.input.folder is not None or loaded.input.manifest is not None
        listing = _samples(loaded, input) if given else None
        from mmpipe import Pipeline
        from mmpipe.explain import collect, writing

        with Pipeline(loaded, say=_say) as pipeline:
            if listing:
                pipeline.settle(listing.samples)  # as a run over all of them would be
            samples = listing.samples[:limit] if listing else collect.made_up(pipeline, limit)
            explained = collect.explain(pipeline, samples, say=_say)
        if trace is not None:
            writing.write_trace(trace, explained)
        if json_:
            _print(json.dumps(explained, ensure_ascii=False))
            return
        writing.write_page(output, explained)
        _print(writing.summary(explained))
        _print(f"\npage   {output}" + (f"\ntrace  {trace}: open it at https://ui.perfetto.dev" if trace else ""))


@app.command()
def autotune(
    config: ConfigArgument,
    input: InputOption = None,
    backends: Annotated[str, typer.Option(help="Those to try, with commas between; default: all.")] = "",
    json_: Annotated[bool, typer.Option("--json", help="Print all that was measured as JSON.")] = False,
    set_: SetOption = None,
) -> None:
    """Measure which backend and number type is fastest for each encoder on this machine, and keep it.

    Compiles each encoder for each backend: minutes for large ones. Later runs with runtime.backend: auto use the
    winners where that pays. Parity with float32 is judged on the input's first samples, where there are some.
    """
    with _reporting(as_json=json_):
        loaded = _load(config, [*(set_ or []), "runtime.backend=eager"])
        given = input is not None or loaded.input.folder is not None or loaded.input.manifest is not None
        listing = _samples(loaded, input) if given else None
        from mmpipe import Pipeline
        from mmpipe.autotune import autotune as measure
        from mmpipe.parity import TRIED

        with Pipeline(loaded, say=_say) as pipeline:
            names = [name.strip() for name in backends.split(",") if name.strip()]
            tuning = measure(pipeline, listing.samples[:TRIED] if listing else [], backends=names, say=_say)
        if json_:
            _print(json.dumps(tuning.plain()))
            return
        for (segment, rows, _), best in tuning.best.items():
            _print(f"{segment:<10} {rows:>3} rows  {best.told}")


@app.command()
def bench(
    config: ConfigArgument,
    input: InputOption = None,
    limit: Annotated[int, typer.Option(min=1, help="How many samples to measure with.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="How often each variant runs.")] = 3,
    json_: Annotated[bool, typer.Option("--json", help="Print all that was measured as JSON.")] = False,
    set_: SetOption = None,
) -> None:
    """What exits, number type, backend and decoding each bring, on this machine and your media.

    Runs the configuration as it is, and once more without each thing that it does fast, in turns. Ratios above 1 say
    how much longer it takes without. "of bound": how near it comes to what decoding and computing alone would take.
    """
    with _reporting(as_json=json_):
        loaded = _load(config, set_)
        given = input is not None or loaded.input.folder is not None or loaded.input.manifest is not None
        listing = _samples(loaded, input) if given else None
        from mmpipe.bench import bench as measure
        from mmpipe.bench import plain, table

        samples = listing.samples[:limit] if listing else None
        measured, count = measure(config, samples, made_up=limit, overrides=set_ or [], rounds=rounds, say=_say)
        if json_:
            _print(json.dumps(plain(measured, count)))
            return
        for line in table(measured, count):
            _print(line)


@app.command()
def calibrate(
    config: ConfigArgument,
    input: InputOption = None,
    max_disagreement: Annotated[str, typer.Option(help="Share of items whose early answer may differ.")] = "1%",
    certainty: Annotated[str, typer.Option(help="How sure that is to be, over the draw of the items.")] = "95%",
    truth: Annotated[Path | None, typer.Option(help="Table of true labels: columns id and label.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write; default: calibration.json beside the configuration.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only N samples, drawn at random.")] = None,
    set_: SetOption = None,
) -> None:
    """Find thresholds and the best order of the modalities that keep a promise, on your own media.

    Runs every sample in full, once. Writes the file that fusion.calibration names, and a report beside it. Where
    nothing can be certified it says how many samples are needed, and ends with 0 too: the file has no exits then.
    A packaged configuration that brings held-out scores is calibrated on them, unless there is --input.
    """
    with _reporting():
        loaded = _load(config, [*(set_ or []), *_AFRESH])
        from mmpipe.calibrating.request import Request

        request = Request.of(loaded, max_disagreement, certainty, truth, output, limit)
        listing = None if request.packaged_scores(input) else _samples(loaded, input)
        from mmpipe.calibrating.run import run_calibrate
        from mmpipe.jobs.progress import for_stream

        for line in run_calibrate(request, listing, for_stream()):
            _print(line)


@app.command()
def fit(
    config: ConfigArgument,
    truth: Annotated[Path, typer.Option(help="Table of true labels: columns id and label.")],
    output: Annotated[Path, typer.Option(help="Folder to write into: new or empty.")],
    input: InputOption = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of the split and the training: the same seed, the same head.")
    ] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="At most; training stops when it no longer helps.")] = 60,
    limit: Annotated[int | None, typer.Option(min=1, help="Only N labelled samples, drawn at random.")] = None,
    set_: SetOption = None,
    json_: Annotated[bool, typer.Option("--json", help="Progress as JSON lines, the result as JSON.")] = False,
) -> None:
    """Train the head, and the exits' probes, on labelled media: head.safetensors, config.yaml, fit.html.

    Runs the encoders once over all samples, and trains on what they say. The configuration needs encoders; its head may
    have no checkpoint, and labels that are not there come from the truth file. config.yaml is ready to run.
    """
    with _reporting(as_json=json_):
        from mmpipe.fitting.request import Request

        request = Request.of(
            config, truth, output, overrides=set_ or [], input=input, seed=seed, epochs=epochs, limit=limit
        )
        listing = _samples(request.config, input)
        from mmpipe.fitting.run import run_fit
        from mmpipe.jobs.progress import for_stream

        for line in run_fit(request, listing, for_stream(as_json=json_), as_json=json_):
            _print(line)


@app.command()
def doctor(json_: Annotated[bool, typer.Option("--json", help="The findings as JSON.")] = False) -> None:
    """What this machine has for mmpipe, what it lacks, and what to do about that: ends with 1 where something is
    broken."""
    with _reporting(as_json=json_):
        from mmpipe.doctor import look, plain, table

        found = list(look())
        for line in [json.dumps(plain(found), ensure_ascii=False)] if json_ else table(found):
            _print(line)
        if any(one.state == "lacks" for one in found):
            raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a configuration, for editors."""
    with _reporting():
        from mmpipe.config import json_schema

        _print(json.dumps(json_schema(), indent=2))


def _load(config: str, overrides: list[str] | None) -> Config:
    from mmpipe.config import load

    return load(config, overrides=overrides or [])


def _samples(config: Config, input: Path | None) -> Listing:
    """What there is to read; refuses kept columns whose names the output needs."""
    from mmpipe.jobs import shards
    from mmpipe.listing import find_samples

    listing = find_samples(config, input)
    shards.schema(dict.fromkeys(config.modalities, 1), 1, listing.keep_types)
    return listing


def _job(config: Config, input: Path | None, output: Path | None, mode: str) -> tuple[Listing, Path]:
    """Input and output of a run: what would be refused is refused before models are loaded."""
    from mmpipe.jobs.output import refuse
    from mmpipe.listing import input_root

    folder = output if output is not None else config.output_folder
    if folder is None:
        raise config.error("output.folder", "no output folder", "set output.folder, or give --output DIR")
    refuse(folder, mode, inside=input_root(config, input))
    return _samples(config, input), folder


def _plain(prediction: Any) -> dict[str, Any]:
    """A prediction as JSON: without what is not there."""
    from dataclasses import asdict

    plain: dict[str, Any] = {}
    for name, value in asdict(prediction).items():
        if name in ("embedding", "embeddings"):
            if value is not None:
                plain[name] = {k: v.tolist() for k, v in value.items()} if isinstance(value, dict) else value.tolist()
        elif name == "top_k":
            plain[name] = [{"label": label, "probability": p} for label, p in value]
        elif value is not None and name != "keep":
            plain[name] = list(value) if isinstance(value, tuple) else value
    return plain


if __name__ == "__main__":
    main()
