"""GGUF to a Hugging Face folder: `python -m moored.models.hub.gguf SOURCE.gguf FOLDER`.

Where GGUF files come from and where the results are kept is `resolve.py`'s matter.

It is a process of its own because transformers first unpacks every weight: that memory is given
back before training starts, and no launcher's environment or initialisation hook gets in between.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def storage_dtype(source: Path) -> torch.dtype:
    """The 16-bit type that keeps the file's matrices, or float32 where they are float32.

    GGUF's block formats multiply small integers by fp16 scales, so fp16 (11 bits of significand)
    keeps what they unpack to better than bf16 (8 bits) at the same size. Measured on
    SmolLM2-135M-Instruct Q4_1, 2,048 tokens of WikiText-2, against float32: KL 2.3e-6 nats per
    token and logits off by 0.005 (rms) in fp16; 5.7e-5 and 0.028 in bf16; float32 is twice the
    size for nothing that the following 4-bit quantisation would keep.
    """
    kinds = gguf.GGMLQuantizationType
    matrices = {
        tensor.tensor_type for tensor in gguf.GGUFReader(source).tensors if len(tensor.shape) > 1
    }
    if matrices & {kinds.F32, kinds.F64}:
        return torch.float32
    return torch.bfloat16 if kinds.BF16 in matrices else torch.float16


def convert(source: Path, folder: Path) -> None:
    """Write config, safetensors, tokenizer and chat template of a GGUF file into `folder`.

    Raises:
        ValueError: transformers does not know the file's architecture.
    """
    dtype = storage_dtype(source)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=dtype)
    if any(not bool(weight.isfinite().all()) for weight in model.parameters()):
        # Larger than fp16 holds: keep everything as it is.
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
    # The weights are plain now; with these left in place, saving and loading look for GGUF again.
    vars(model).pop("hf_quantizer", None)
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def main() -> None:
    """The command line; the last line of stderr says what went wrong."""
    parser = argparse.ArgumentParser(prog="python -m moored.models.hub.gguf", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    try:
        convert(arguments.source, arguments.folder)
    except Exception as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
