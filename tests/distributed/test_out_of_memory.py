"""Memory that is not to be had: found out before anything is trained, and said with a remedy.

A limit of the process's address space stands for a GPU's memory: torch then says of the CPU what it
says of a GPU.
"""

from __future__ import annotations

import json
import os
import re
import resource
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from distributed.runner import run_distributed
from moored.cli import _run
from moored.config import load_config
from moored.distributed.mesh import alone
from moored.models.base_files import resolve_base
from moored.models.loading import _failures_named, load_base
from moored.models.weights import is_out_of_address_space
from moored.tracking import journal
from moored.training import train
from moored.utils.errors import UserError
from tiny import tiny_recipe, write_recipe

GIB = 2**30


def limit_memory(more: int) -> None:
    """Let this process have so many bytes more than it has."""
    kilobytes = re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())
    assert kilobytes is not None
    resource.setrlimit(resource.RLIMIT_AS, (1024 * int(kilobytes[1]) + more, -1))


def rehearsing(rank: int, world_size: int, folder: Path, rehearse: str) -> tuple[str, list[str]]:
    torch.distributed.destroy_process_group()  # a run makes and leaves its own
    recipe = tiny_recipe(folder)
    short = [{"prompt": f"count {i}", "completion": "one two"} for i in range(40)]
    long = {"prompt": "count", "completion": "one two three four five " * 1000}
    lines = [json.dumps(line) for line in (*short, long)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    recipe["data"] |= {"max_length": 40000}
    del recipe["data"]["eval"]
    recipe["retention"] = {}
    recipe["model"]["attention"] = "eager"  # whose scores are the square of a row's length
    recipe["train"] |= {"steps": 2, "rehearse": rehearse, "global_batch_sequences": 2}
    limit_memory(5 * GIB)
    try:
        run = train.run(load_config(write_recipe(folder, recipe)))
    except UserError as error:
        run = next((folder / "runs").iterdir())
        return str(error), [*journal.metrics(run)]
    return "", [*journal.metrics(run)]


def test_the_largest_micro_batch_is_tried_before_the_first_update(tmp_path):
    [(said, metrics)] = run_distributed(rehearsing, 1, tmp_path / "always", "always")
    found = re.search(r"the largest micro-batch, 2 x (\d+) tokens, does not fit, and nothing", said)
    assert found is not None, said
    assert int(found[1]) > 5000
    remedies = ("micro_batch_size", "tensor_parallel_degree", "sequence_parallel", "zero_stage")
    for remedy in (*remedies, "context_parallel_degree"):
        assert remedy in said
    assert "\n" not in said
    assert metrics == []


def test_by_default_a_cpu_rehearses_nothing(tmp_path):
    [(said, metrics)] = run_distributed(rehearsing, 1, tmp_path, "auto")
    assert said == ""
    assert metrics


def mapping(rank: int, world_size: int, folder: Path) -> tuple[list[str], str]:
    """A file of 8 TiB, most of it a hole, that is whole but larger than what may be mapped.

    Returns:
        The names of the weights that are not those of the file without the hole; and what is said
        where a file must be mapped.
    """
    recipe = tiny_recipe(folder)
    config = load_config(write_recipe(folder, recipe))
    path = resolve_base(config.model, alone()).source.path
    expected, _ = load_base(path, config.model, alone(), config.parallel)
    weights = folder / "model/model.safetensors"
    with weights.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = file.read()
    size = 2**43
    header["surplus"] = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    for name, entry in header.items():
        if name not in ("surplus", "__metadata__"):
            first, last = entry["data_offsets"]
            entry["data_offsets"] = [first + size, last + size]
    text = json.dumps(header).encode()
    with weights.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(size, 1)
        file.write(data)
    end = weights.stat().st_size
    limit_memory(20 * GIB)
    with pytest.raises(Exception, match="Cannot allocate memory") as refused:
        safe_open(weights, framework="pt")
    assert is_out_of_address_space(refused.value)
    found, _ = load_base(path, config.model, alone(), config.parallel)
    others = dict(found.named_parameters())
    odd = [n for n, p in expected.named_parameters() if not torch.equal(p, others[n])]
    with pytest.raises(UserError) as caught, _failures_named(config.model, torch.device("cpu")):
        torch.UntypedStorage.from_file(str(weights), False, end)  # as transformers may
    return odd, str(caught.value)


def test_a_file_that_cannot_be_mapped_is_read(tmp_path):
    [(odd, said)] = run_distributed(mapping, 1, tmp_path)
    assert odd == []
    assert "does not map a file of that size" in said
    assert "max_shard_size" in said
    assert "broken" not in said


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None),
    ],
)
def test_a_gpus_memory_does_not_fall_into_pieces(given, expected, monkeypatch):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    others = {name: value for name, value in os.environ.items() if name not in names}
    monkeypatch.setattr(os, "environ", others | given)
    assert _run(["--version"], debug=False) == 0
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected
