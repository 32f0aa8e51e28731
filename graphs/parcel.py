"""A segment's module → bytes for another process of ours, and back: operations, tensors and marks as they are."""

from __future__ import annotations

import io
from operator import attrgetter

import torch
from torch import fx

from mmpipe.graphs import plain


def wrap(module: fx.GraphModule) -> bytes:
    """Raises what pickle raises, or plain.Unwritable, where a part is nothing that another process could import."""
    nodes = module.graph.nodes
    tensors = {str(n.target): attrgetter(n.target)(module) for n in nodes if n.op == "get_attr"}
    modules = {str(n.target): module.get_submodule(n.target) for n in nodes if n.op == "call_module"}
    content = io.BytesIO()
    torch.save((plain.written(module.graph), tensors, modules), content)
    return content.getvalue()


def unwrap(content: bytes) -> fx.GraphModule:
    """What `wrap` made. It is a pickle: only for what this program wrote itself."""
    entries, tensors, modules = torch.load(io.BytesIO(content), weights_only=False)
    return fx.GraphModule({**tensors, **modules}, plain.read(entries)).eval()
