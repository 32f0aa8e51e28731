"""Predictions from Python: one sample, many, embeddings, and a look at the graph.

python examples/predict.py
"""

from __future__ import annotations

from collections import Counter

from mmpipe import Pipeline

with Pipeline.load("quickstart") as pipeline:
    # one sample; paths, bytes, PIL images, arrays and tensors all do
    prediction = pipeline(text="Lace-up leather boot, ankle height, EU 42")
    print(f"title alone: {prediction.label} ({prediction.confidence:.2f}), answered by {prediction.answered_by}")

    # many: list in, list out, in order
    samples = pipeline.find().samples
    predictions = pipeline.predict(samples)
    print("answered by:", dict(Counter(prediction.answered_by for prediction in predictions)))
    print("failed:", [(prediction.id, prediction.error) for prediction in predictions if prediction.status == "failed"])

    # embeddings: no exits, every modality, zeros where one is absent
    print("embeddings:", pipeline.embed(samples[:8]).shape)

    # one torch.fx graph, cut at its exits into segments
    print(f"graph: {len(pipeline.graph.graph.nodes)} nodes")
    for segment in pipeline.plan.segments:
        print(f"  stage {segment.stage}  {segment.branch:<6} {segment.nodes:>4} nodes")
