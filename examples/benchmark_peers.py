"""Contenders of `benchmark.py` that are tools of their own; each is left out where it is not installed.

Ray Data      loads on worker processes, the script's modules compute in this one: pip install "ray[data]"
pipelines     transformers' own, for pictures and texts; none embeds sounds, which go as in the script
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

Loaded = dict[str, tuple[Tensor, ...]]  # modality → what its module takes


_made: list[Any] = []  # in a worker process: its script


class Loader:
    """`load` of a script, made once in each process that calls it: a worker gets a copy of this with every task."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if not _made:
            from benchmark import Script  # by its name: in a worker `__main__` is Ray's

            _made.append(Script(*self.arguments))
        loaded = _made[0].load(Path(row["item"]))
        return {f"{name} {n}": part.numpy() for name, parts in loaded.items() for n, part in enumerate(parts)}


def ray_data(
    make: Callable[..., Any], arguments: Sequence[Any], items: Sequence[Path], rows: int
) -> Callable[[], dict[str, Tensor]]:
    """`make(*arguments)` is the script: this process's, and each worker's. Raises ImportError where there is no Ray."""
    import ray

    found = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    how = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": found}}, **how)
    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    script, load = make(*arguments), Loader(*arguments)

    def batches(items: Sequence[Path]) -> Iterator[Loaded]:
        found = ray.data.from_items([{"item": str(item)} for item in items]).map(load)
        for batch in found.iter_torch_batches(batch_size=rows, prefetch_batches=2):
            names = dict.fromkeys(key.partition(" ")[0] for key in batch)
            yield {name: tuple(batch[key] for key in sorted(batch) if key.partition(" ")[0] == name) for name in names}

    script.embed(batches(items[:rows]))  # starts the workers
    return lambda: cast(dict[str, Tensor], script.embed(batches(items)))


def pipelines(script: Any, items: Sequence[Path], rows: int) -> Callable[[], dict[str, Tensor]]:
    """`script`: whose weights these are, and whose way with sounds."""
    from PIL import Image
    from transformers import CLIPImageProcessor, pipeline

    about = {"device": script.device, "dtype": script.dtype}
    vision = _vision(script.clip.visual).to(script.dtype)
    pictures = pipeline("image-feature-extraction", model=vision, image_processor=CLIPImageProcessor(), **about)
    texts = pipeline("feature-extraction", model=script.minilm, tokenizer=script.tokenizer, **about)

    def run() -> dict[str, Tensor]:
        opened = [Image.open(item.with_suffix(".jpg")).convert("RGB") for item in items]
        image = torch.tensor(pictures(opened, batch_size=rows)).reshape(len(items), -1)
        written = [item.with_suffix(".txt").read_text() for item in items]
        how = {"truncation": True, "max_length": 64}
        told = texts(written, batch_size=rows, tokenize_kwargs=how)
        # a batch comes back as long as its longest text
        counts = [len(ids) for ids in script.tokenizer(written, **how)["input_ids"]]
        text = torch.stack([torch.tensor(one[0])[:count].mean(0) for one, count in zip(told, counts, strict=True)])
        sounds = ({"audio": script.load_sound(item)} for item in items)
        batches = ({"audio": (torch.stack([one["audio"][0] for one in batch]),)} for batch in _batched(sounds, rows))
        unit = functools.partial(nn.functional.normalize, dim=-1)
        return {"image": unit(image), "text": unit(text), "audio": script.embed(batches)["audio"]}

    return run


def _batched(found: Iterator[Any], count: int) -> Iterator[list[Any]]:
    while batch := list(itertools.islice(found, count)):
        yield batch


def _vision(tower: Any) -> nn.Module:
    """open_clip's image tower as transformers' CLIPVisionModelWithProjection."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    width, heads = tower.conv1.out_channels, tower.transformer.resblocks[0].attn.num_heads
    made = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=len(tower.transformer.resblocks),
            num_attention_heads=heads,
            patch_size=tower.conv1.kernel_size[0],
            hidden_act="gelu",
            projection_dim=tower.proj.shape[1],
        )
    ).eval()
    weights = {
        "embeddings.class_embedding": tower.class_embedding,
        "embeddings.patch_embedding.weight": tower.conv1.weight,
        "embeddings.position_embedding.weight": tower.positional_embedding,
    }
    norms = {"pre_layrnorm": tower.ln_pre, "post_layernorm": tower.ln_post}
    for number, block in enumerate(tower.transformer.resblocks):
        at = f"encoder.layers.{number}"
        norms |= {f"{at}.layer_norm1": block.ln_1, f"{at}.layer_norm2": block.ln_2}
        norms |= {f"{at}.mlp.fc1": block.mlp.c_fc, f"{at}.mlp.fc2": block.mlp.c_proj}
        norms[f"{at}.self_attn.out_proj"] = block.attn.out_proj
        for kind in ("weight", "bias"):
            parts = getattr(block.attn, f"in_proj_{kind}").chunk(3)
            weights |= {f"{at}.self_attn.{n}_proj.{kind}": part for n, part in zip("qkv", parts, strict=True)}
    for name, module in norms.items():
        weights |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    made.load_state_dict({f"vision_model.{name}": value for name, value in weights.items()}
                         | {"visual_projection.weight": tower.proj.T}, strict=False)  # fmt: skip
    return made
