"""The folder job against what people write today, side by side in one run: same media, same weights, same outputs.

    python examples/full_size.py MODELS
    python examples/benchmark_media.py MEDIA --n 200
    python examples/benchmark.py MODELS MEDIA [--device cuda] [--output benchmark.json] [--plot benchmark.svg]

Every contender embeds every photo (CLIP ViT-B/32), text (MiniLM-L6) and sound (CLAP) of the folder, in a process of
its own, one at a time. Rounds are interleaved in random order; medians of items a second, and ratios to the plain
script of the same round with their spread. A contender whose embeddings are not those of the float32 script (cosine <
0.999) is marked.

    script …        the loop that one writes: PIL, open_clip's transform, transformers' tokenizer and feature extractor,
                    batches of 32, one modality after the other; with a DataLoader worker a core; with torch.compile
    pipelines, Ray  transformers' pipelines; Ray Data's workers before the same modules
    OpenVINO, ONNX  the same loop, the three modules converted; on a CPU
    mmpipe …        mmpipe, exits off: in float32, as `auto` has it, with fast decoding
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import benchmark_peers as peers
import numpy as np
import torch
from torch import Tensor, nn

from mmpipe import Pipeline
from mmpipe.explain.collect import machine
from mmpipe.loading import keep_freed_memory, use_huge_pages
from mmpipe.machine import bfloat16_gain

ROWS = 32
MIN_COSINE = 0.999
_PROCESSES_START_S = 15.0  # mmpipe's, which decode; until they are there, its threads do
_LONGER = 8  # times as long as what is measured: the folder that mmpipe makes ready for
Embeddings = dict[str, Tensor]  # modality → [N, D], L2-normalised
Arguments = tuple[Path, Path, Sequence[Path], str]  # models, media, items, device


@dataclass
class Contender:
    """What was measured of one. `ready_seconds`: to load, or to compile."""

    name: str
    ready_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    cosine: Mapping[str, float] = field(default_factory=dict)


class Process:
    """A contender in a process of its own, as people run it: what others leave in memory is not felt."""

    def __init__(self, name: str, arguments: Arguments) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=serve, args=(name, arguments, there))
        with patch.dict(os.environ):
            if name.startswith("mmpipe"):  # before torch is imported there, as `mmpipe run` does for itself
                use_huge_pages()
            self._process.start()
        there.close()

    @functools.cached_property
    def ready(self) -> float | str:
        """Waits until it is: the seconds that it took, or why it can't be loaded."""
        answer: float | str = self._pipe.recv()
        return answer

    def run(self) -> tuple[float, Embeddings]:
        """Seconds, and what it embedded."""
        self._pipe.send(True)
        seconds, found = self._pipe.recv()
        return seconds, {name: torch.from_numpy(rows) for name, rows in found.items()}

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


def serve(name: str, arguments: Arguments, pipe: Connection) -> None:
    """A contender's process: makes it, and runs it as often as it is asked to."""
    if name.startswith("mmpipe"):  # as `mmpipe run` does for itself; scripts run as they are written
        keep_freed_memory()
    began = time.perf_counter()
    try:
        run = makers(*arguments)[name]()
    except ImportError as error:
        pipe.send(str(error))
        return
    pipe.send(time.perf_counter() - began)
    with contextlib.suppress(EOFError):
        while pipe.recv():
            began = time.perf_counter()
            found = run()
            pipe.send((time.perf_counter() - began, {modality: rows.numpy() for modality, rows in found.items()}))


# --- the script -------------------------------------------------------------------------------------------------------


class Script:
    """What one writes: each library's own preprocessing, each model's own module."""

    def __init__(self, models: Path, dtype: torch.dtype, device: str = "cpu") -> None:
        import open_clip
        from transformers import AutoModel, AutoTokenizer, ClapFeatureExtractor, ClapModel

        self.dtype, self.device = dtype, device
        self.clip, _, self.transform = open_clip.create_model_and_transforms(f"local-dir:{models / 'clip'}")
        self.clip.eval().to(device, dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(models / "minilm")
        self.minilm = AutoModel.from_pretrained(models / "minilm").eval().to(device, dtype)
        self.extractor = ClapFeatureExtractor.from_pretrained(models / "clap")
        self.clap = ClapModel.from_pretrained(models / "clap").eval().to(device, dtype)
        self.modules: dict[str, Callable[..., Tensor]] = {
            "image": lambda pixels: self.clip.encode_image(pixels.to(self.dtype)),
            "text": self._text,
            "audio": lambda mel: _features(self.clap.get_audio_features(input_features=mel.to(self.dtype))),
        }

    def _text(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.minilm(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)

    def load(self, item: Path) -> dict[str, tuple[Tensor, ...]]:
        """One item, decoded and prepared."""
        from PIL import Image

        pixels = self.transform(Image.open(item.with_suffix(".jpg")).convert("RGB"))
        tokens = self.tokenizer(
            item.with_suffix(".txt").read_text(), max_length=64, padding="max_length", truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        text = tokens["input_ids"][0], tokens["attention_mask"][0]
        return {"image": (pixels,), "text": text, "audio": self.load_sound(item)}

    def load_sound(self, item: Path) -> tuple[Tensor, ...]:
        import soundfile
        import soxr

        sound, rate_hz = soundfile.read(item.with_suffix(".wav"), dtype="float32", always_2d=True)
        mono = soxr.resample(sound.mean(1), rate_hz, 48_000, quality="HQ")[: 10 * 48_000]
        return (self.extractor(mono, sampling_rate=48_000, return_tensors="pt")["input_features"][0],)

    def embed(self, batches: Iterator[dict[str, tuple[Tensor, ...]]]) -> Embeddings:
        found: dict[str, list[Tensor]] = {name: [] for name in self.modules}
        with torch.inference_mode():
            for batch in batches:
                for name, inputs in batch.items():
                    inputs = [tensor.to(self.device, non_blocking=True) for tensor in inputs]
                    found[name].append(nn.functional.normalize(self.modules[name](*inputs).float(), dim=-1))
        return {name: torch.cat(parts).cpu() for name, parts in found.items() if parts}

    def batches(self, items: Sequence[Path]) -> Iterator[dict[str, tuple[Tensor, ...]]]:
        for start in range(0, len(items), ROWS):
            yield collate([self.load(item) for item in items[start : start + ROWS]])

    def workers(self, items: Sequence[Path], count: int) -> Iterator[dict[str, tuple[Tensor, ...]]]:
        from torch.utils.data import DataLoader

        class Items(torch.utils.data.Dataset[Any]):
            def __len__(inner) -> int:
                return len(items)

            def __getitem__(inner, number: int) -> dict[str, tuple[Tensor, ...]]:
                return self.load(items[number])

        how = {"collate_fn": collate, "multiprocessing_context": "fork", "pin_memory": self.device != "cpu"}
        return iter(DataLoader(Items(), ROWS, num_workers=count, **how))


def collate(rows: Sequence[dict[str, tuple[Tensor, ...]]]) -> dict[str, tuple[Tensor, ...]]:
    return {name: tuple(map(torch.stack, zip(*(row[name] for row in rows), strict=True))) for name in rows[0]}


def _features(result: Any) -> Tensor:
    """transformers 5 wraps it."""
    return result if isinstance(result, Tensor) else result.pooler_output


# --- contenders -------------------------------------------------------------------------------------------------------


def makers(
    models: Path, media: Path, items: Sequence[Path], device: str
) -> Mapping[str, Callable[[], Callable[[], Embeddings]]]:
    """Name → what loads a contender and returns its run. In bfloat16 where the device multiplies it."""
    cpu, workers = device == "cpu", len(os.sched_getaffinity(0))
    short = torch.bfloat16 if (bfloat16_gain() if cpu else torch.cuda.is_bf16_supported()) else torch.float32
    word, hint = str(short).removeprefix("torch."), "bf16" if short == torch.bfloat16 else "f32"
    found = {
        "script, float32": lambda: script(models, items, torch.float32, device),
        f"script, {word}": lambda: script(models, items, short, device),
        f"script, {word}, {workers} workers": lambda: script(models, items, short, device, workers=workers),
        f"script, {word}, torch.compile": lambda: script(models, items, short, device, compiled=True),
        f"pipelines, {word}": lambda: peers.pipelines(Script(models, short, device), items, ROWS),
        f"Ray Data, {word}": lambda: peers.ray_data(Script, (models, short, device), items, ROWS),
    }
    if cpu:
        found |= {
            f"script, OpenVINO {word}": lambda: openvino_script(models, items, hint),
            "script, ONNX Runtime float32": lambda: onnx_script(models, items),
        }
    # as `mmpipe run` decides for a folder that is longer than what is measured here
    on = [] if cpu else [f"runtime.device={device}", f"runtime.decoding={'processes' if workers > 5 else 'threads'}"]
    return found | {
        "mmpipe, float32": lambda: mmpipe(models, media, items, [*on, "runtime.dtype=float32"]),
        "mmpipe": lambda: mmpipe(models, media, items, on),
        "mmpipe, fast decoding": lambda: mmpipe(models, media, items, [*on, "input.decode=fast"]),
    }


def start(processes: dict[str, Process], arguments: Arguments, skip: Sequence[str], *, together: bool) -> None:
    """One after the other, as some take all cores to compile; or all at once."""
    for name in makers(*arguments):
        if any(word in name for word in skip):
            continue
        processes[name] = Process(name, arguments)
        if not together:
            _ = processes[name].ready
    for name, process in list(processes.items()):
        if isinstance(process.ready, str):
            print(f"{name}: left out, {process.ready}")
            process.close()
            del processes[name]


def script(
    models: Path,
    items: Sequence[Path],
    dtype: torch.dtype,
    device: str,
    *,
    workers: int = 0,
    compiled: bool = False,
) -> Callable[[], Embeddings]:
    made = Script(models, dtype, device)
    if compiled:
        made.clip.visual = torch.compile(made.clip.visual, dynamic=False)
        made.minilm = torch.compile(made.minilm, dynamic=False)
        made.clap.audio_model = torch.compile(made.clap.audio_model, dynamic=False)
    made.embed(made.batches(items[:ROWS]))  # as mmpipe below: what is slow only once
    return lambda: made.embed(made.workers(items, workers) if workers else made.batches(items))


class _Tower(nn.Module):
    def __init__(self, module: nn.Module, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module, self.run = module, run

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(*inputs)


def openvino_script(models: Path, items: Sequence[Path], hint: str) -> Callable[[], Embeddings]:
    import openvino

    made, core = Script(models, torch.float32), openvino.Core()
    for name, content in exported(made, items).items():
        compiled = core.compile_model(core.read_model(content), "CPU", {"INFERENCE_PRECISION_HINT": hint})
        made.modules[name] = lambda *inputs, run=compiled: torch.from_numpy(run([i.numpy() for i in inputs])[0])
    return lambda: made.embed(made.batches(items))


def onnx_script(models: Path, items: Sequence[Path]) -> Callable[[], Embeddings]:
    import onnxruntime

    made = Script(models, torch.float32)
    for name, content in exported(made, items).items():
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]
        made.modules[name] = lambda *inputs, run=session, names=names: torch.from_numpy(
            run.run(None, {n: i.numpy() for n, i in zip(names, inputs, strict=True)})[0]
        )
    return lambda: made.embed(made.batches(items))


def exported(made: Script, items: Sequence[Path]) -> dict[str, bytes]:
    """Each module as an ONNX file, for any number of rows."""
    example = collate([made.load(items[0])] * 2)
    batch = torch.export.Dim("batch", min=1, max=512)
    torch.backends.mha.set_fastpath_enabled(False)  # its kernels have no form in ONNX
    found = {}
    for name, tower in _towers(made).items():
        shapes = (tuple({0: batch} for _ in example[name]),)
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            program = torch.onnx.export(tower, example[name], dynamo=True, verbose=False, dynamic_shapes=shapes)
        assert program is not None
        found[name] = program.model_proto.SerializeToString()
    torch.backends.mha.set_fastpath_enabled(True)
    return found


def _towers(made: Script) -> dict[str, nn.Module]:
    held = {"image": made.clip, "text": made.minilm, "audio": made.clap}
    return {name: _Tower(held[name], made.modules[name]).eval() for name in held}


def mmpipe(models: Path, media: Path, items: Sequence[Path], overrides: Sequence[str]) -> Callable[[], Embeddings]:
    pipeline = Pipeline.load(str(models / "clip_clap.yaml"), overrides=["runtime.cache=off", *overrides])
    samples = pipeline.find(media).samples[: len(items)]
    dims = {name: preparation.dim for name, preparation in pipeline.built.preparations.items()}
    ready = time.monotonic() + (_PROCESSES_START_S if pipeline.resolved.decoding == "processes" else 0.0)
    pipeline.settle(list(samples) * _LONGER)  # what only many win back is compiled, and processes start
    pipeline.predict(samples[:ROWS])
    while time.monotonic() < ready:
        pipeline.predict(samples[:ROWS])

    def run() -> Embeddings:
        rows = torch.from_numpy(np.ascontiguousarray(pipeline.embed(samples)))
        return dict(zip(dims, rows.split(list(dims.values()), dim=1), strict=True))

    return run


# --- the run ----------------------------------------------------------------------------------------------------------


def measure(processes: Mapping[str, Process], rounds: int) -> list[Contender]:
    found = {name: Contender(name, float(process.ready)) for name, process in processes.items()}
    wanted: Embeddings = {}
    shuffled = random.Random(0)
    for number in range(rounds):
        for name in shuffled.sample(list(found), len(found)) if number else list(found):
            one = found[name]
            try:
                seconds, embeddings = processes[name].run()
            except (EOFError, OSError):  # what the others measured stands
                print(f"{name}: left out, its process has died (was there memory for all of them?)", flush=True)
                del found[name]
                if not wanted or not found:
                    raise SystemExit("nothing to compare the others with") from None
                continue
            one.seconds.append(seconds)
            print(f"  round {number + 1}: {name:<34} {seconds:8.2f} s", flush=True)
            wanted = wanted or embeddings
            one.cosine = {name: float((wanted[name] * embeddings[name]).sum(1).min()) for name in wanted}
    return list(found.values())


def table(found: Sequence[Contender], count: int) -> Iterator[str]:
    base = next((one for one in found if one.name == "script, bfloat16"), found[0])
    yield f"| | items/s | × the {base.name} | least cosine to float32 | ready after |"
    yield "|---|---|---|---|---|"
    for one in found:
        ratios = sorted(b / a for a, b in zip(one.seconds, base.seconds, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"
        least = min(one.cosine.values())
        flag = "" if least >= MIN_COSINE else " **not at parity**"
        rate = count / statistics.median(one.seconds)
        yield f"| {one.name} | {rate:.1f} | {spread} | {least:.5f}{flag} | {one.ready_seconds:.0f} s |"


def plot(found: Sequence[Contender], count: int, where: str) -> str:
    """Items a second as bars, an SVG: medians, and thin lines from the slowest round to the fastest."""
    height, left, right = 26, 250, 420
    rates = [sorted(count / seconds for seconds in one.seconds) for one in found]
    scale = right / max(rate[-1] for rate in rates)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + right + 70} {height * len(found) + 34}" '
        f'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="#fff"/>'
    ]
    for number, (one, rate) in enumerate(zip(found, rates, strict=True)):
        top, middle = 8 + height * number, statistics.median(rate)
        colour = "#0f766e" if one.name.startswith("mmpipe") else "#94a3b8"
        parts.append(
            f'<text x="{left - 8}" y="{top + 14}" text-anchor="end">{one.name}</text>'
            f'<rect x="{left}" y="{top}" width="{middle * scale:.1f}" height="18" fill="{colour}"/>'
            f'<path d="M{left + rate[0] * scale:.1f} {top + 9}H{left + rate[-1] * scale:.1f}" stroke="#111"/>'
            f'<text x="{left + rate[-1] * scale + 6:.1f}" y="{top + 14}">{middle:.1f}</text>'
        )
    about = f"items a second; {count} items, medians of {len(found[0].seconds)} rounds; {where}"
    parts.append(f'<text x="60" y="{height * len(found) + 24}" fill="#475569" font-size="11">{about}</text></svg>')
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("media", type=Path)
    parser.add_argument("--n", type=int, help="only so many items")
    parser.add_argument("--device", default="cpu", help="cpu or cuda: where the models run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--together", action="store_true", help="load all at once: what is ready after how long is moot"
    )
    parser.add_argument("--skip", nargs="*", default=[], help="contenders whose name has one of these words")
    parser.add_argument("--output", type=Path, help="all that was measured, as JSON")
    parser.add_argument("--plot", type=Path, help="items a second, as an SVG")
    options = parser.parse_args()
    items = sorted(path.with_suffix("") for path in options.media.glob("*.jpg"))[: options.n]
    where = machine(options.device)
    print(f"{len(items)} items; {where}", flush=True)
    processes: dict[str, Process] = {}
    try:
        start(
            processes, (options.models, options.media, items, options.device), options.skip, together=options.together
        )
        found = measure(processes, options.rounds)
    finally:
        for process in processes.values():
            process.close()
    print("\n".join(["", *table(found, len(items))]))
    if options.plot:
        options.plot.write_text(plot(found, len(items), where), encoding="utf-8")
    if options.output:
        plain = [asdict(one) for one in found]
        options.output.write_text(json.dumps({"machine": where, "items": len(items), "contenders": plain}, indent=1))


if __name__ == "__main__":
    main()
