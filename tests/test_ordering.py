"""Device work is ordered, and memory for it taken, in four modules of the runtime and nowhere else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("mmpipe", "graphs", "encoders", "fusion")
RUNTIME = {f"mmpipe/runtime/{name}.py" for name in ("streams", "cuda", "device", "pool")}
ALLOWED = {
    ("mmpipe/runtime/executor.py", ".synchronize"): "asks each stream to end, through streams.Stream",
    ("mmpipe/media/ahead.py", "concurrent.futures"): "decoders: files and the host's memory, no device",
    ("mmpipe/media/ahead.py", "threading"): "decoders' turns: how many may take a core",
    ("mmpipe/decoders.py", "threading"): "a lock: decoding threads share the processes",
    ("mmpipe/decoders.py", "multiprocessing.connection"): "messages to processes that decode: files, no device",
    ("mmpipe/parts.py", "threading"): "a lock: who talks to other processes, and who computes here, share the work",
    ("mmpipe/workers.py", "threading"): "one talks to each process; in a process one waits for its parent's end",
    ("mmpipe/workers.py", "multiprocessing.connection"): "messages to forked processes: rows and numbers, no device",
    ("mmpipe/engine.py", "threading"): "asks for the main thread: another's forks would find locks taken",
    ("mmpipe/runners.py", "threading"): "asks for the main thread, as the engine does",
    ("mmpipe/media/room.py", "threading"): "decoders wait for the host's memory",
    ("mmpipe/feed.py", "threading"): "a lock around what decoders count; who has the same medium waits for its decoder",
    ("mmpipe/cache/store.py", "threading"): "a lock: decoders look up at once",
    ("mmpipe/cache/disk.py", "threading"): "a lock: decoders share one connection",
    ("graphs/backends/kernels.py", "threading"): "a lock: one thread compiles and loads, others wait for it",
    ("mmpipe/resizing.py", "threading"): "a lock, for the same",
    ("graphs/backends/openvino.py", "threading"): "a request for each thread that calls: they must not share memory",
    ("graphs/backends/tensorrt.py", "torch.cuda"): "asks whether there is a GPU; runs in the stream that is current",
    ("graphs/backends/tensorrt.py", "device="): "a context's own workspace and results, as a library's are its own",
    ("mmpipe/trying.py", "multiprocessing"): "compilers, tried where they may crash: no device, and nothing shared",
    ("mmpipe/trying.py", "multiprocessing.connection"): "its pipe",
    ("graphs/digest.py", "concurrent.futures"): "hashes of the host's memory, no device",
    ("mmpipe/calibrated.py", "concurrent.futures"): "the weights' hash, while the graph is captured; no device",
    ("mmpipe/build.py", "concurrent.futures"): "the type of that hash",
    ("mmpipe/pipeline.py", "threading"): "a lock: one run of a pipeline at a time",
    ("mmpipe/loading.py", "threading"): "gives a Ctrl-C again that a finaliser has swallowed",
    ("mmpipe/loading.py", "_thread"): "as above: to the main thread",
    ("mmpipe/doctor.py", "torch.cuda"): "asks for the GPU's name",
    ("mmpipe/jobs/job.py", "threading"): "asks for the main thread: only there may signals be handled",
}
MODULES = ("threading", "queue", "_thread", "multiprocessing", "concurrent", "asyncio")
METHODS = {"record_stream", "synchronize", "pin_memory", "cuda", "wait_event", "wait_stream"}


def found(source: str) -> set[str]:
    """What a module does that orders device work, or takes memory of a device."""
    seen: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                imported = [name.name for name in names]
            case ast.ImportFrom(module=module, names=names, level=0):
                imported = [module, *(f"{module}.{name.name}" for name in names)]
            case _:
                imported = []
        seen |= {name for name in imported if name.split(".")[0] in MODULES and name.count(".") < 2}
        seen |= {"torch.cuda" for name in imported if name.startswith("torch.cuda")}
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.cuda"):
            seen.add("torch.cuda")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, method = ast.unparse(node.func), node.func.attr
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            if method in METHODS:
                seen.add(f".{method}")
            if "pin_memory" in given:
                seen.add("pin_memory=")
            makes = name.startswith("torch.") or method.startswith(("new_", "to"))
            if (makes and "device" in given and not _follows(given["device"])) or (
                method == "to" and any(map(_names_cuda, node.args))
            ):
                seen.add("device=")
    return seen


def _follows(value: ast.expr) -> bool:
    """`device=x.device`: where another tensor is; that allocates for nobody else's stream."""
    return isinstance(value, ast.Attribute) and value.attr == "device"


def _names_cuda(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and str(value.value).startswith("cuda")


def modules() -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))


def test_nothing_else_orders_device_work_or_allocates_for_it():
    done = {(name, what) for name in modules() if name not in RUNTIME for what in found((ROOT / name).read_text())}
    assert {pair for pair in done if not _allowed(*pair)} == set()
    unused = {pair for pair in ALLOWED if not any(_covers(pair, other) for other in done)}
    assert unused == set()  # an exception that nobody needs any more


def _covers(exception: tuple[str, str], pair: tuple[str, str]) -> bool:
    return exception[0] == pair[0] and (pair[1] == exception[1] or pair[1].startswith(f"{exception[1]}."))


def _allowed(name: str, what: str) -> bool:
    return any(_covers(exception, (name, what)) for exception in ALLOWED)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import torch\ntorch.cuda.synchronize()", "torch.cuda"),
        ("from torch.cuda import Stream", "torch.cuda"),
        ("import torch.cuda as c", "torch.cuda"),
        ("x.record_stream(s)", ".record_stream"),
        ("event.synchronize()", ".synchronize"),
        ("y = x.pin_memory()", ".pin_memory"),
        ("y = torch.empty(3, pin_memory=True)", "pin_memory="),
        ("y = torch.empty(3, device='cuda')", "device="),
        ("y = torch.zeros(3, device=device)", "device="),
        ("y = x.new_zeros(3, device=device)", "device="),
        ("y = x.to(device=device)", "device="),
        ("y = x.cuda()", ".cuda"),
        ("y = x.to('cuda:0')", "device="),
        ("import threading", "threading"),
        ("from threading import Lock", "threading"),
        ("from queue import Queue", "queue"),
        ("from concurrent.futures import ThreadPoolExecutor", "concurrent.futures"),
    ],
)
def test_it_is_seen(source, what):
    assert what in found(source)
    assert not _allowed("mmpipe/answers.py", what)


@pytest.mark.parametrize("source", ["y = torch.arange(3, device=x.device)", "run = Executor(plan, device=device)"])
def test_it_is_no_allocation(source):
    assert found(source) == set()
