"""Tiny real models and tokenizers, built in a second, for tests that need a whole run."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moored.distributed.mesh import Axis, Mesh

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = ["the quick brown fox jumps over the lazy dog", "user assistant count one two three four"]
ALONE = Mesh(
    world=Axis(name="world"),
    dp=Axis(name="dp"),
    tp=Axis(name="tp"),
    device=torch.device("cpu"),
)
ARCHITECTURES = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "mistral": transformers.MistralConfig,
    "gemma2": transformers.Gemma2Config,
}


SMALLEST = {  # that NF4's blocks let two tensor-parallel ranks share
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 300 tokens with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def tiny_model(folder: Path, architecture: str = "llama", **settings: object) -> Path:
    """Save a two-layer model (grouped-query attention, width 64) and its tokenizer in `folder`."""
    tokenizer = tiny_tokenizer()
    values: dict[str, object] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    torch.manual_seed(0)
    config = ARCHITECTURES[architecture](**(values | settings))
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_chats(path: Path, count: int = 24, start: int = 0) -> Path:
    """Write prompts and completions of varied length as JSON lines."""
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    with open(path, "w") as file:
        for i in range(start, start + count):
            number = " ".join(words[(i * k) % 7] for k in range(1, 2 + i % 4))
            line = {"prompt": f"count {i}", "completion": f"{number} fox {i % 5}"}
            file.write(json.dumps(line) + "\n")
    return path


def write_text(path: Path) -> Path:
    """Write a retention text of a few hundred tokens."""
    path.write_text("\n\n".join(f"{TEXT[i % 2]} number {i}" for i in range(40)))
    return path


def tiny_recipe(folder: Path, architecture: str = "llama", **model_settings: object) -> dict:
    """A complete recipe (as a dict) for a tiny model, with its files written below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(folder / "model", architecture, **model_settings)
    return {
        "name": "tiny",
        "model": {"name_or_path": str(model), "quantization": "nf4", "dtype": "float32"},
        "adapter": {"r": 4, "alpha": 8.0},
        "data": {
            "train": [{"path": str(write_chats(folder / "train.jsonl"))}],
            "eval": [{"path": str(write_chats(folder / "eval.jsonl", 6, start=100))}],
            "max_length": 64,
        },
        "regularizer": {"kind": "tmkl", "weight": 1.0},
        "retention": {"fox": {"path": str(write_text(folder / "fox.txt")), "window_tokens": 64}},
        # Adam's eps is far above the rounding of a gradient: else an entry that is nothing but
        # rounding would be moved by the whole learning rate, wherever the order of sums points.
        "optim": {"learning_rate": 5e-3, "warmup_steps": 1, "eps": 1e-3},
        "parallel": {"zero_stage": 0},
        "train": {
            "steps": 4,
            "global_batch_sequences": 6,
            "micro_batch_size": 2,
            "gradient_checkpointing": "none",
        },
        "evaluation": {"before": False},
        "track": {"mlflow": False},
        "output": {"dir": str(folder / "runs")},
    }


def write_recipe(folder: Path, recipe: dict, name: str = "tiny.yaml") -> Path:
    """Write a recipe dict as YAML (JSON is YAML)."""
    path = folder / name
    path.write_text(json.dumps(recipe, indent=1))
    return path
