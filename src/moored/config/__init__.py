"""Recipes: strict YAML to a frozen Config, with all problems reported at once. No torch.

`schema` has every key with its unit and bounds, `config` the relations between sections, `recipe`
the reading of files and overrides, `validation` the collecting and `wording` the text of problems.
"""

from moored.config.config import Config, arm_names, load_config
from moored.config.schema import (
    AdapterConfig,
    Corpus,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Regularizer,
    Source,
)

__all__ = [
    "AdapterConfig",
    "Config",
    "Corpus",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "Regularizer",
    "Source",
    "arm_names",
    "load_config",
]
