"""mmpipe: multimodal inference pipelines in one fused torch.fx graph."""

__version__ = "0.1.0"
