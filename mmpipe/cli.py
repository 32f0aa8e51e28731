"""The command line. Thin: each command parses, calls what Python users call, and prints.

Results go to standard output, progress and errors to standard error. Nothing here imports torch before a command that
needs it runs.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmpipe import __version__
from mmpipe.cli_measuring import autotune, bench, calibrate, explain, fit
from mmpipe.console import ConfigArgument, InputOption, SetOption, listing_of, load, reporting, results, say, show
from mmpipe.errors import ConfigError
from mmpipe.loading import end, heed_interrupts, keep_freed_memory, use_huge_pages

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


def command() -> None:
    """The entry point: `main` in a process that is its own, and ends with it."""
    try:
        main()
    except SystemExit as ended:
        if not isinstance(ended.code, int | None):
            raise
        end(ended.code or 0)


def main() -> None:
    """Errors become one message and an exit code, never a traceback. Raises SystemExit."""
    use_huge_pages()
    keep_freed_memory()
    heed_interrupts()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that can't show a character shows its number
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # of no file that a command reads or writes, which it tells of itself
        say(f"mmpipe: {error.filename or 'standard output'}: {error.strerror or error}")
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        show(f"mmpipe {__version__}")
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
    with reporting(as_json=json_):
        from mmpipe.jobs.output import check_mode

        check_mode(mode)
        loaded = load(config, set_)
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
        with results():
            if json_:
                show(json.dumps(summary.run, ensure_ascii=False))
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
    with reporting():
        if image is None and text is None and audio is None:
            raise ConfigError("nothing to predict", hint="give --image, --text or --audio")
        words: Any = Path(text[1:]) if text is not None and text.startswith("@") else text
        for option, given in (("--image", image), ("--text", words), ("--audio", audio)):
            if isinstance(given, Path) and not given.exists():
                raise ConfigError(f"{str(given)!r}: there is no such file", where=option)
        loaded = load(config, set_)
        from mmpipe import Pipeline

        with Pipeline(loaded) as pipeline:
            prediction = pipeline(image=image, text=words, audio=audio)
        show(json.dumps(_plain(prediction), ensure_ascii=False, indent=2))
        raise typer.Exit(1 if prediction.status == "failed" else 0)


@app.command()
def check(
    config: ConfigArgument,
    input: InputOption = None,
    set_: SetOption = None,
) -> None:
    """Validate a configuration, pair and count its input. Loads no model, opens no medium."""
    with reporting():
        from mmpipe.jobs.progress import visible
        from mmpipe.jobs.terminal import show_listing
        from mmpipe.starter import BLANK_LABELS

        loaded = load(config, set_)
        show(f"{visible(str(loaded.source.file or config))}: the configuration is valid")
        if loaded.all_labels == BLANK_LABELS:
            show(f"note: the labels are still those that init wrote ({', '.join(BLANK_LABELS)}): put in your own")
        if input is None and loaded.input.folder is None and loaded.input.manifest is None:
            show("no input is configured: give --input PATH to see what it holds")
            return
        show_listing(listing_of(loaded, input), loaded.modalities)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="A folder of media, as it is.")],
    output: Annotated[Path | None, typer.Option(help="The YAML to write; default: mmpipe.yaml in the folder.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Write a configuration for a folder: looks at how its files pair up."""
    with reporting():
        from mmpipe.jobs.progress import visible
        from mmpipe.jobs.terminal import show_listing
        from mmpipe.starter import write_starter

        starter = write_starter(folder, output, force=force)
        show_listing(starter.pairing.listing, starter.pairing.modalities)
        path = visible(str(starter.path))
        for note in starter.notes:
            show(f"note: {visible(note)}")
        show(f"\nwrote {path}")
        show(
            f"next: put your labels into it, then\n  mmpipe pull {shlex.quote(path)}\n  mmpipe run {shlex.quote(path)}"
        )


@app.command()
def pull(config: ConfigArgument, set_: SetOption = None) -> None:
    """Fetch the weights of a configuration's models ahead of time."""
    with reporting():
        loaded = load(config, set_)
        from mmpipe.build import pull_weights

        for modality, model, files in pull_weights(loaded, say=say):
            if not files:
                show(f"{modality}: {model}: nothing to fetch")
                continue
            size = sum(os.path.getsize(file) for file in files if os.path.exists(file))
            show(f"{modality}: {model}: {len(files)} files, {size / 1e6:.1f} MB, {files[0]}")


for _command in (explain, autotune, bench, calibrate, fit):
    app.command()(_command)


@app.command()
def doctor(json_: Annotated[bool, typer.Option("--json", help="The findings as JSON.")] = False) -> None:
    """What this machine has for mmpipe, what it lacks, and what to do about that: ends with 1 where something is
    broken."""
    with reporting(as_json=json_):
        from mmpipe.doctor import look, plain, table

        found = list(look())
        for line in [json.dumps(plain(found), ensure_ascii=False)] if json_ else table(found):
            show(line)
        if any(one.state == "lacks" for one in found):
            raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a configuration, for editors."""
    with reporting():
        from mmpipe.config import json_schema

        show(json.dumps(json_schema(), indent=2))


def _job(config: Config, input: Path | None, output: Path | None, mode: str) -> tuple[Listing, Path]:
    """Input and output of a run: what would be refused is refused before models are loaded."""
    from mmpipe.jobs.output import refuse
    from mmpipe.listing import input_root

    folder = output if output is not None else config.output_folder
    if folder is None:
        raise config.error("output.folder", "no output folder", "set output.folder, or give --output DIR")
    refuse(folder, mode, inside=input_root(config, input))
    return listing_of(config, input), folder


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
