"""Samples the quickstart's base model: plain chat answers to general questions, with a seed.

Run once; what it writes is kept with the recipe as `base-samples.jsonl` because sampling is slow
on a CPU. It is text that the untouched base itself produces, so its perplexity under an adapted
model says how far that model has left its own base. Never imported; trains nothing.

    python benchmarks/quickstart/sample_base.py recipes/quickstart/slurm-headers.yaml
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moored.config import load_config
from moored.data.base_samples import QUESTIONS
from moored.models.hub import resolve_model


def main() -> None:
    """Sample every question once and write one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, help="default: base-samples.jsonl beside the recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    out = arguments.out or arguments.recipe.parent / "base-samples.jsonl"

    folder = resolve_model(load_config(arguments.recipe).model).path
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(arguments.seed)

    rows, total = [], 0
    for start in range(0, len(QUESTIONS), arguments.batch):
        questions = QUESTIONS[start : start + arguments.batch]
        prompts = tokenizer.apply_chat_template(
            [[{"role": "user", "content": question}] for question in questions],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            output = model.generate(
                **prompts,
                do_sample=True,
                temperature=arguments.temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=arguments.max_new_tokens,
            )
        answers = output[:, prompts["input_ids"].shape[1] :]
        for question, answer in zip(questions, answers, strict=True):
            text = tokenizer.decode(answer, skip_special_tokens=True).strip()
            rows.append({"question": question, "text": text})
            total += len(tokenizer(text).input_ids)
        print(f"{len(rows)} of {len(QUESTIONS)} samples, {total} tokens", flush=True)
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    main()
