"""A run on a tensor-parallel mesh, merged by the command: an ordinary model comes of it."""

from __future__ import annotations

import json

import pytest
import transformers

from forking import finished, moored, moored_ranks
from tiny import tiny_recipe, write_recipe


@pytest.mark.long
def test_a_run_on_a_mesh_is_exported_as_any_other(tmp_path):
    # Heads that two ranks can share in whole blocks of 64.
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    recipe = tiny_recipe(tmp_path, **heads)
    path = str(write_recipe(tmp_path, recipe))
    finished(*moored_ranks(2, "train", path, "parallel.tensor_parallel_degree=2"))
    to = tmp_path / "merged"
    finished(moored("export", str(tmp_path / "runs/tiny"), "--to", str(to), "--merge"))
    facts = json.loads((to / "export.json").read_text())
    assert facts["merged_into"] == "w16"
    figures = facts["verified"]["relative_rms_of_logits"]
    assert figures["difference"] <= figures["tolerance"] < 1e-5
    # The base of 16 bits is another than that of 4 bits; the adapter is the same.
    kl, moved = (facts[f"kl_trained_{n}_nats_per_token"] for n in ("merged", "base"))
    assert 1e-6 < kl < moved
    transformers.AutoModelForCausalLM.from_pretrained(to)
