"""Recipes: strict YAML to a frozen Config, with all problems reported at once. No torch.

`inputs.py`, `running.py` and `regularizer.py` have every key with its unit and bounds, by sections;
`config.py` puts them together and has what must hold between them;
`recipe.py` is the reading of files and overrides, `validation.py` the collecting and the words of
problems.
"""

from moored.config.config import PROBE, Config, arm_names, load_config
from moored.config.inputs import Corpus, DataConfig, ModelConfig, Source
from moored.config.regularizer import Budget, Regularizer
from moored.config.running import AdapterConfig, EvaluationConfig, OptimConfig, ParallelConfig

__all__ = [
    "PROBE",
    "AdapterConfig",
    "Budget",
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
