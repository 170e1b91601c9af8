"""What a checkpoint's own files say; that a run goes on from one is test_resume.py's."""

from __future__ import annotations

import json

import pytest

from moored.training.checkpoint import read_state
from moored.utils.errors import UserError


def test_a_checkpoint_on_another_base_is_refused(tmp_path):
    state = {"format": 1, "step": 3}
    for scales in ({}, {"scales": "whole tensors"}):
        (tmp_path / "state.json").write_text(json.dumps(state | scales))
        assert read_state(tmp_path)["step"] == 3
    sliced = state | {"scales": "slices at tensor_parallel_degree 2"}
    (tmp_path / "state.json").write_text(json.dumps(sliced))
    with pytest.raises(UserError, match=r"NF4 scales of slices at .* 2, not of whole tensors: res"):
        read_state(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps(state | {"format": 2}))
    with pytest.raises(UserError, match="checkpoint format 2, this version reads 1: resume"):
        read_state(tmp_path)
