"""Imported once, by the process that the ranks of tests are forked from; it computes nothing."""

from __future__ import annotations

import contextlib

import moored.compare
import moored.remeasure
import moored.train  # noqa: F401

with contextlib.suppress(ImportError):  # what Llama's own module needs, which is imported late
    import transformers.models.llama.modeling_llama  # noqa: F401
