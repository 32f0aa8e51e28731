"""Segments as TensorRT for RTX builds them, which takes no GPU; and what their ONNX computes, in the ONNX Runtime."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from support import hub
from support.lowering import ROWS, TOLERANCE, case_of, error, family, packaged, small
from torch import nn

from mmpipe.graphs.backends import Target, Unlowerable, lower, tensorrt
from mmpipe.graphs.backends.export import places_of

package = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed, and nothing else builds here")
onnx = pytest.importorskip("onnx", reason="what feeds TensorRT is ONNX")
onnxruntime = pytest.importorskip("onnxruntime", reason="runs what feeds TensorRT, without a GPU")

COSINE = 0.999  # of the shorter types' rows: the parity gate's


@pytest.fixture(autouse=True)
def _for_rtx(monkeypatch):
    """TensorRT itself comes first where it is installed, and can't build without a GPU."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return hub.Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def quickstart():
    return {name: ragged(case) for name, case in packaged("quickstart").items()}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Exports that several tests want."""
    return tmp_path_factory.mktemp("kept")


def ragged(case):
    """Its texts 1, 2, … tokens long, the last as long as they may be: one is all padding but for a token. Its sounds
    tones: of noise, little but the type's own is left in a log spectrum."""
    inputs = [tensor.clone() for tensor in case.inputs]
    for name, tensor in zip([*case.segment.inputs, *case.segment.reads], inputs, strict=True):
        if name == "audio.samples":
            turns = torch.outer(300.0 + 200 * torch.arange(ROWS), torch.arange(tensor.shape[1]) / 16000)
            tensor.copy_(0.3 * torch.sin(2 * torch.pi * turns))
        if "mask" in name:
            lengths = torch.arange(1, ROWS + 1)
            lengths[-1] = tensor.shape[1]
            tensor.copy_(torch.arange(tensor.shape[1]) < lengths[:, None])
    return replace(case, inputs=tuple(inputs))


def exported(case, dtype=torch.float32, folder=None):
    target = Target(len(case.inputs[0]), dtype, folder=folder)
    return tensorrt.typed_onnx(case.segment, case.module, target, case.inputs)


def run(content, inputs):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    places = places_of(given.name for given in session.get_inputs())
    return tuple(
        map(torch.from_numpy, session.run(None, {name: inputs[place].numpy() for name, place in places.items()}))
    )


def runnable(content):
    """bfloat16 as float32 with the same values: the ONNX Runtime has few operations in bfloat16 on a CPU."""
    model = onnx.load_from_string(content)
    del model.graph.value_info[:]
    tensors = [*model.graph.initializer]
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == onnx.TensorProto.BFLOAT16:
                attribute.i = onnx.TensorProto.FLOAT
            if attribute.HasField("t"):
                tensors.append(attribute.t)
    for tensor in tensors:
        if tensor.data_type == onnx.TensorProto.BFLOAT16:
            values = onnx.numpy_helper.to_array(tensor).astype("float32")
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return model.SerializeToString()


def types_of(content):
    """Number types of the weights."""
    return {tensor.data_type for tensor in onnx.load_from_string(content).graph.initializer}


def cosine(found, wanted):
    pairs = [(one.float().flatten(1), other.float().flatten(1)) for one, other in zip(found, wanted, strict=True)]
    return min(float(torch.cosine_similarity(one, other).min()) for one, other in pairs)


def is_built_and_at_parity(case, dtype=torch.float32, folder=None):
    content = exported(case, dtype, folder)
    assert len(tensorrt.build_engine(content, Target(ROWS, dtype))) > 1000
    if dtype == torch.float32:
        assert error(run(content, case.inputs), case.eager()) <= TOLERANCE
        return
    kind = {torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16}[dtype]
    assert kind in types_of(content)
    found, wanted = run(runnable(content), case.inputs), case.eager()
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in wanted]  # what comes out keeps its type
    assert cosine(found, wanted) > COSINE


@pytest.mark.parametrize("name", ["open_clip", "bert", "clap", "vit"])
def test_architectures_are_built_and_their_onnx_is_what_eager_computes(models, kept, name):
    case = ragged(family(models, name))
    is_built_and_at_parity(case, folder=kept)
    is_built_and_at_parity(case, torch.bfloat16 if name in ("open_clip", "clap") else torch.float16, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_encoder_of_the_quickstart(quickstart, dtype):
    encoders = [case for name, case in quickstart.items() if not name.startswith("head")]
    assert len(encoders) == 3
    for case in encoders:
        is_built_and_at_parity(case, dtype)


def test_the_encoder_of_ones_own():
    (case,) = (case for name, case in packaged("custom").items() if name.startswith("image"))
    is_built_and_at_parity(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_masked_changes_nothing(models, kept, dtype):
    case = ragged(family(models, "bert"))
    ids, mask = case.inputs
    other = torch.where(mask.bool(), ids, ids + 1 + torch.arange(ids.shape[1]) % 7)
    content = exported(case, dtype, kept)
    plain, masked, seen = (run(content, one) for one in ((ids, mask), (other, mask), (other, torch.ones_like(mask))))
    assert not torch.equal(ids, other)
    assert error(masked, plain) <= TOLERANCE
    assert error(seen, plain) > 1e-2


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.fixture
def builds(monkeypatch):
    """How often an engine was built."""
    counted = []
    plain = tensorrt._build
    monkeypatch.setattr(tensorrt, "_build", lambda *args: counted.append(1) or plain(*args))
    return counted


@pytest.fixture(scope="module")
def content():
    return exported(small())


def test_an_engine_is_built_once(tmp_path, builds, content):
    target = Target(4, folder=tmp_path)
    first, again = tensorrt.build_engine(content, target), tensorrt.build_engine(content, target)
    assert (first == again, len(builds)) == (True, 1)
    tensorrt.build_engine(exported(small(1)), target)
    assert len(builds) == 2
    assert len(list(tmp_path.glob("*.engine"))) == 2
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir())


def test_an_engine_that_was_built_with_other_settings_is_not_found(tmp_path, builds, content, monkeypatch):
    target = Target(4, folder=tmp_path)
    tensorrt.build_engine(content, target)
    monkeypatch.setattr(tensorrt, "_SETTINGS", "others")
    tensorrt.build_engine(content, target)
    assert len(builds) == 2


def test_an_engine_keeps_to_the_memory_that_is_left_for_it(tmp_path, builds, content, monkeypatch):
    """The builder is told of it, and of no more than there is; limits that are nearly alike share an engine."""
    limits, create = [], package.Builder.create_builder_config

    class Config:
        def __init__(self, plain):
            object.__setattr__(self, "plain", plain)

        def set_memory_pool_limit(self, kind, size):
            limits.append((kind, size))
            self.plain.set_memory_pool_limit(kind, size)

        def __getattr__(self, name):
            return getattr(self.plain, name)

        def __setattr__(self, name, value):
            setattr(self.plain, name, value)

    class Builder(package.Builder):
        def create_builder_config(self):
            return Config(create(self))

        def build_serialized_network(self, network, config):
            return super().build_serialized_network(network, config.plain)

    monkeypatch.setattr(package, "Builder", Builder)
    for memory in (None, 1 << 28, (1 << 28) + 12345, 1 << 27):
        assert len(tensorrt.build_engine(content, Target(4, folder=tmp_path, memory=memory))) > 1000
    assert len(builds) == 3
    assert limits == [(package.MemoryPoolType.WORKSPACE, size) for size in (1 << 28, 1 << 27)]
    with pytest.raises(Unlowerable, match=r"can't build an engine: .*workspace limit"):
        tensorrt.build_engine(content, Target(4, folder=tmp_path, memory=1000))


@pytest.mark.parametrize("place", [0, 40, -1])  # in its hash, at the engine's begin, at its end
def test_an_engine_that_was_tampered_with_is_not_used(tmp_path, builds, content, place):
    target = Target(4, folder=tmp_path)
    tensorrt.build_engine(content, target)
    (path,) = tmp_path.iterdir()
    tampered = bytearray(path.read_bytes())
    tampered[place] ^= 1
    path.write_bytes(tampered)
    tensorrt.build_engine(content, target)
    assert len(builds) == 2
    assert path.read_bytes() != tampered


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path, builds, content):
    target = Target(4, folder=tmp_path)
    tensorrt.build_engine(content, target)
    tmp_path.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="is open to others"):
        tensorrt.build_engine(content, target)
    assert len(builds) == 2


# --- what it can't do -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_running_needs_a_gpu():
    case = small()
    with pytest.raises(Unlowerable, match="image@0: TensorRT runs on an NVIDIA GPU, and torch sees none"):
        lower("tensorrt", case.segment, case.module, Target(4), case.inputs)


def test_a_missing_package_is_named_with_its_extras(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    case = small()
    said = r'tensorrt or tensorrt_rtx is not installed: pip install "mmpipe\[tensorrt\]" or "mmpipe\[tensorrt_rtx\]"'
    with pytest.raises(Unlowerable, match=said):
        lower("tensorrt", case.segment, case.module, Target(4), case.inputs)


def test_another_type_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    case = small()
    with pytest.raises(Unlowerable, match=r"float32, float16 or bfloat16, not in torch\.float64"):
        lower("tensorrt", case.segment, case.module, Target(4, torch.float64), case.inputs)


class Norm(nn.Module):
    def forward(self, x):
        return (torch.det(x),)


def test_an_operation_that_tensorrt_has_not_is_named():
    case = case_of(Norm(), torch.randn(4, 3, 3))
    with pytest.raises(Unlowerable, match=r"TensorRT can't take the graph: .*Det"):
        tensorrt.build_engine(exported(case), Target(4))
