"""Imported once, by the process that the ranks of tests are forked from; it computes nothing."""

from __future__ import annotations

import contextlib

import moored.evaluation.evaluate_command
import moored.training.compare
import moored.training.train  # noqa: F401

with contextlib.suppress(ImportError):  # what Llama's own module needs, which is imported late
    import transformers.models.llama.modeling_llama  # noqa: F401
