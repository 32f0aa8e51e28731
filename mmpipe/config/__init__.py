"""The configuration: one YAML file → typed, checked, frozen.

keys.py       the keys, `load`, `json_schema`
source.py     YAML → plain data with lines
values.py     text → typed value (model ids, sizes, shares)
words.py      what pydantic found, in plain words
check.py      what one key alone can't tell; what is not implemented yet
reference.py  the keys → docs/configuration.md
"""

from mmpipe.config.keys import (
    AuditConfig,
    Config,
    DeliberateConfig,
    EncoderConfig,
    ExitConfig,
    FusionConfig,
    InputConfig,
    LimitsConfig,
    ModalityConfig,
    OutputConfig,
    RuntimeConfig,
    json_schema,
    load,
    packaged_names,
)
from mmpipe.config.values import ModelId, parse_model

__all__ = [
    "AuditConfig",
    "Config",
    "DeliberateConfig",
    "EncoderConfig",
    "ExitConfig",
    "FusionConfig",
    "InputConfig",
    "LimitsConfig",
    "ModalityConfig",
    "ModelId",
    "OutputConfig",
    "RuntimeConfig",
    "json_schema",
    "load",
    "packaged_names",
    "parse_model",
]
