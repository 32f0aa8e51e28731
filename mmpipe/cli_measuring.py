"""The commands that measure a pipeline, or find out on a user's own media how it had better be: explain, autotune,
bench, calibrate, fit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mmpipe.console import ConfigArgument, InputOption, SetOption, listing_of, load, reporting, say, show

_AFRESH = ("fusion.calibration=null",)  # what was certified before


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
    with reporting(as_json=json_):
        loaded = load(config, set_)
        given = input is not None or loaded.input.folder is not None or loaded.input.manifest is not None
        listing = listing_of(loaded, input) if given else None
        from mmpipe import Pipeline
        from mmpipe.explain import collect, writing

        with Pipeline(loaded, say=say) as pipeline:
            if listing:
                pipeline.settle(listing.samples)  # as a run over all of them would be
            samples = listing.samples[:limit] if listing else collect.made_up(pipeline, limit)
            explained = collect.explain(pipeline, samples, say=say)
        if trace is not None:
            writing.write_trace(trace, explained)
        if json_:
            show(json.dumps(explained, ensure_ascii=False))
            return
        writing.write_page(output, explained)
        show(writing.summary(explained))
        show(f"\npage   {output}" + (f"\ntrace  {trace}: open it at https://ui.perfetto.dev" if trace else ""))


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
    with reporting(as_json=json_):
        loaded = load(config, [*(set_ or []), "runtime.backend=eager"])
        given = input is not None or loaded.input.folder is not None or loaded.input.manifest is not None
        listing = listing_of(loaded, input) if given else None
        from mmpipe import Pipeline
        from mmpipe.autotune import autotune as measure
        from mmpipe.parity import TRIED

        with Pipeline(loaded, say=say) as pipeline:
            names = [name.strip() for name in backends.split(",") if name.strip()]
            tuning = measure(pipeline, listing.samples[:TRIED] if listing else [], backends=names, say=say)
        if json_:
            show(json.dumps(tuning.plain()))
            return
        for (segment, rows, _), best in tuning.best.items():
            show(f"{segment:<10} {rows:>3} rows  {best.told}")


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
    with reporting(as_json=json_):
        loaded = load(config, set_)
        given = input is not None or loaded.input.folder is not None or loaded.input.manifest is not None
        listing = listing_of(loaded, input) if given else None
        from mmpipe.bench import bench as measure
        from mmpipe.bench import plain, table

        samples = listing.samples[:limit] if listing else None
        measured, count = measure(config, samples, made_up=limit, overrides=set_ or [], rounds=rounds, say=say)
        if json_:
            show(json.dumps(plain(measured, count)))
            return
        for line in table(measured, count):
            show(line)


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
    with reporting():
        loaded = load(config, [*(set_ or []), *_AFRESH])
        from mmpipe.calibrating.request import Request

        request = Request.of(loaded, max_disagreement, certainty, truth, output, limit)
        listing = None if request.packaged_scores(input) else listing_of(loaded, input)
        from mmpipe.calibrating.run import run_calibrate
        from mmpipe.jobs.progress import for_stream

        for line in run_calibrate(request, listing, for_stream()):
            show(line)


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
    with reporting(as_json=json_):
        from mmpipe.fitting.request import Request

        request = Request.of(
            config, truth, output, overrides=set_ or [], input=input, seed=seed, epochs=epochs, limit=limit
        )
        listing = listing_of(request.config, input)
        from mmpipe.fitting.run import run_fit
        from mmpipe.jobs.progress import for_stream

        for line in run_fit(request, listing, for_stream(as_json=json_), as_json=json_):
            show(line)
