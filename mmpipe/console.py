"""What every command shares: its voice, errors as one message and an exit code, a configuration and its samples.

Results go to standard output, progress and errors to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from mmpipe.errors import Interrupted, MmpipeError

if TYPE_CHECKING:
    from mmpipe.config import Config
    from mmpipe.media import Listing

ConfigArgument = Annotated[str, typer.Argument(help="A packaged name (quickstart, clip_clap, …) or a YAML file.")]
InputOption = Annotated[Path | None, typer.Option(help="Folder or manifest to read instead of the configuration's.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key: runtime.batch_size=8. May be repeated."),
]


@contextmanager
def reporting(*, as_json: bool = False) -> Iterator[None]:
    """MmpipeError → message on standard error and its exit code."""
    try:
        with results():
            yield
    except KeyboardInterrupt:
        _fail("interrupted", 130, as_json)
    except Interrupted as error:
        _fail(f"{error}: what was committed is complete", error.exit_code, as_json)
    except MmpipeError as error:
        _fail(str(error), error.exit_code, as_json)


@contextmanager
def results() -> Iterator[None]:
    """Printing of results: a reader that goes away (`| head`) is no error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int, as_json: bool) -> NoReturn:
    say(f"mmpipe: {message}", event="error" if as_json else None)
    raise typer.Exit(code)


def say(text: str, event: str | None = None) -> None:
    """A line on standard error: plain, or as JSON where `event` is given."""
    from mmpipe.jobs.progress import visible

    line = visible(text, "\n") if event is None else json.dumps({"event": event, "text": text})
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - the command line's own voice


def show(text: str = "") -> None:
    print(text)  # noqa: T201 - results


def load(config: str, overrides: list[str] | None) -> Config:
    from mmpipe.config import load as read

    return read(config, overrides=overrides or [])


def listing_of(config: Config, input: Path | None) -> Listing:
    """What there is to read; refuses kept columns whose names the output needs."""
    from mmpipe.jobs import shards
    from mmpipe.listing import find_samples

    listing = find_samples(config, input)
    shards.schema(dict.fromkeys(config.modalities, 1), 1, listing.keep_types)
    return listing
