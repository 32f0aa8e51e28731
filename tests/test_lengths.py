"""Texts at lengths of their own: the same answers, the same bits wherever a row is, and only where it is safe."""

from __future__ import annotations

import gc
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support import hub

from mmpipe import Pipeline, lowering
from mmpipe.fitting.embedding import embed
from mmpipe.graphs.backends import packed
from mmpipe.graphs.backends.packed import available
from mmpipe.graphs.lengths import ByLength, lengths_of, rows_at
from mmpipe.jobs.progress import Silent

LONGEST = 64


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return hub.Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(lowering, "TOKENS_FOR_LENGTHS", 1)


def test_lengths_are_halves_and_short_ones_go_side_by_side():
    assert lengths_of(512) == (32, 64, 128, 256, 512)
    assert lengths_of(64) == (16, 32, 64)
    assert lengths_of(77) == (77,)
    assert lengths_of(24) == (24,)
    assert [rows_at(length, 32) for length in (16, 64, 128, 512)] == [8, 8, 4, 2]
    assert rows_at(16, 1) == 1


def test_each_row_goes_to_the_least_length_that_holds_it():
    seen = []

    def part(length):
        def run(ids, mask, other):
            seen.append((length, ids.shape, sorted(set(other[:, 0].tolist()))))
            return (ids.sum(1, keepdim=True) * 1.0, other)

        return run

    used = [0, 1, 4, 5, 8, 16, 3, 4, 4]
    mask = torch.stack([(torch.arange(16) < count).long() for count in used])
    mask[3, 1] = 0  # a hole is no end
    ids, other = mask * 7, torch.arange(9)[:, None]
    sums, others = ByLength({16: part(16), 4: part(4), 8: part(8)}, 1, [0, 1])(ids, mask, other)
    assert torch.equal(sums, ids.sum(1, keepdim=True) * 1.0)
    assert torch.equal(others, other)
    assert seen == [(4, (8, 4), [0, 1, 2, 6, 7, 8]), (8, (8, 8), [3, 4]), (16, (8, 16), [5])]


def config(models, name, folder, **runtime):
    section = {**hub.section(models, name), "max_tokens": LONGEST}
    return {
        "task": "embed",
        "encoders": {"text": section},
        "runtime": {"cache": "off", "batch_size": 8, **runtime},
        "input": {"folder": str(folder)},
    }


def run(made, out):
    with Pipeline.load(made) as pipeline:
        pipeline.run_folder(output=out)
        table = pq.read_table(out / "predictions")
        found = dict(zip(table["id"].to_pylist(), np.stack(table["embedding_text"].to_pylist()), strict=True))
        return found, pipeline.resolved.segments, pipeline.fingerprints([])["numerics"]


def written(folder, texts):
    folder.mkdir()
    for number, text in texts:
        (folder / f"{number:02d}.txt").write_text(text or "x", encoding="utf-8")
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["bert", "minilm", "mpnet"])
def test_a_folder_of_texts_has_the_same_embeddings(models, tmp_path, monkeypatch, name, dtype):
    """And each row has its bytes, whatever rows are beside it."""
    texts = list(enumerate(hub.texts(19)))
    one, other = written(tmp_path / "one", texts), written(tmp_path / "other", texts[5:8] + texts[12:])
    whole, segments, before = run(config(models, name, one, dtype=dtype), tmp_path / "a")
    assert all(not choice.lengths for choice in segments.values())
    monkeypatch.setattr(lowering, "TOKENS_FOR_LENGTHS", 1)
    short, segments, after = run(config(models, name, one, dtype=dtype), tmp_path / "b")
    assert segments["text@0"].lengths == (16, 32, 64)
    assert before != after  # a job is not resumed, nor an embedding taken, across the two
    for key, wanted in whole.items():
        assert wanted @ short[key] > (0.99999 if dtype == "float32" else 0.999), key
    fewer, _, _ = run(config(models, name, other, dtype=dtype), tmp_path / "c")
    assert len(fewer) == 10
    assert all(np.array_equal(fewer[key], short[key]) for key in fewer)


def test_what_fit_has_embedded_is_known_to_a_run_over_as_many(models, tmp_path, always, monkeypatch):
    monkeypatch.setenv("MMPIPE_CACHE", str(tmp_path / "cache"))
    folder = written(tmp_path / "texts", enumerate(hub.texts(9)))
    with Pipeline.load(config(models, "bert", folder, cache="on")) as pipeline:
        samples = pipeline.find().samples
        embed(pipeline.config, samples, torch.zeros(len(samples), dtype=torch.long), Silent())
        pipeline.run_folder(output=tmp_path / "out")
    assert pipeline.resolved.segments["text@0"].lengths == (16, 32, 64)
    about = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (about["cache"]["hits"]["text"], about["cache"]["misses"]["text"]) == (9, 0)


def test_a_list_of_samples_is_a_job_of_as_many(models, tmp_path, always):
    folder = written(tmp_path / "texts", enumerate(hub.texts(9)))
    with Pipeline.load(config(models, "bert", folder)) as pipeline:
        samples = pipeline.find().samples
        wanted, _, _ = run(config(models, "bert", folder), tmp_path / "out")
        found = pipeline.embed(samples)
        assert pipeline.resolved.segments["text@0"].lengths == (16, 32, 64)
    assert all(np.array_equal(row, wanted[sample.id]) for row, sample in zip(found, samples, strict=True))


def test_weights_are_held_once(models, tmp_path, always):
    folder = written(tmp_path / "texts", enumerate(hub.texts(9)))
    with Pipeline.load(config(models, "bert", folder)) as pipeline:
        pipeline.run_folder(output=tmp_path / "out")
        own = {tensor.data_ptr() for tensor in pipeline.modules["text@0"].buffers()}
        (found,) = pipeline.runners.lowering._lengths.values()
        own_size = [t for made in found.values() for m in made.modules.values() for t in m.buffers() if t.ndim == 2]
        matrices = [tensor for tensor in own_size if tensor.is_floating_point()]
        assert len(matrices) > 10
        assert all(tensor.data_ptr() in own for tensor in matrices)


def test_what_weights_are_shortened_to_is_held_once(models, tmp_path, always):
    folder = written(tmp_path / "texts", enumerate(hub.texts(9)))
    before = set(shortened_matrices())
    with Pipeline.load(config(models, "bert", folder, dtype="bfloat16")) as pipeline:
        pipeline.run_folder(output=tmp_path / "out")
        assert pipeline.resolved.segments["text@0"].lengths == (16, 32, 64)
        found = [matrix for place, matrix in shortened_matrices().items() if place not in before]
    assert len(found) >= 2  # positions, and what the packed layout does not take
    assert len({(matrix.shape, matrix.view(torch.int16).numpy().tobytes()) for matrix in found}) == len(found)


def shortened_matrices():
    tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor]
    mine = [each for each in tensors if each.dtype == torch.bfloat16 and each.ndim == 2 and not each.is_mkldnn]
    return {each.data_ptr(): each for each in mine}


@pytest.mark.skipif(not available(), reason="this processor has no bfloat16 products, or torch no oneDNN")
def test_packed_copies_are_made_once(models, tmp_path, always, monkeypatch):
    packs, pack = [], packed._laid_out
    monkeypatch.setattr(packed, "_laid_out", lambda matrix: packs.append(matrix) or pack(matrix))
    folder = written(tmp_path / "texts", enumerate(hub.texts(9)))
    with Pipeline.load(config(models, "minilm", folder, dtype="bfloat16")) as pipeline:
        pipeline.run_folder(output=tmp_path / "out")
        assert pipeline.resolved.segments["text@0"].lengths
        matrices = {(matrix.data_ptr(), matrix.shape) for matrix in packs}
        assert len(packs) == len(matrices)


def test_short_jobs_edited_graphs_and_watched_segments_keep_one_length(models, tmp_path, monkeypatch):
    folder = written(tmp_path / "texts", enumerate(hub.texts(9)))
    made = config(models, "bert", folder)
    assert run(made, tmp_path / "a")[1] == {}
    monkeypatch.setattr(lowering, "TOKENS_FOR_LENGTHS", 1)
    with Pipeline.load(made) as pipeline:
        pipeline.graph.recompile()  # as after an edit
        pipeline.run_folder(output=tmp_path / "b")
        assert pipeline.resolved.segments == {}
    seen = []
    with Pipeline.load(made) as pipeline, pipeline.observe("text@0", lambda one: seen.extend(one.ids)):
        pipeline.run_folder(output=tmp_path / "c")
    assert len(seen) == 9


def test_a_model_that_knows_one_length_keeps_it(models, tmp_path, always, monkeypatch):
    from mmpipe.capturing import Shorter
    from mmpipe.graphs.plan import GraphError

    def fails(self, length):
        raise GraphError("one length alone")

    monkeypatch.setattr(Shorter, "captured", fails)
    folder = written(tmp_path / "texts", enumerate(hub.texts(9)))
    assert run(config(models, "bert", folder), tmp_path / "a")[1] == {}
