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
from moored.sources import resolve_model

QUESTIONS = """\
Why is the sky blue during the day and red at sunset?
How do I cook rice so that it does not stick to the pot?
What is the difference between a lake and a pond?
Give me three tips for falling asleep faster.
Describe how a bicycle stays upright while it is moving.
What should I pack for a weekend of hiking in the mountains?
Explain what inflation means to someone who is ten years old.
Write a short poem about the sea in winter.
How does a refrigerator keep food cold?
What makes a good paragraph in an essay?
What is the difference between butter and margarine?
Suggest a simple dinner with lentils and carrots.
How did people tell the time before there were clocks?
What is photosynthesis and why does it matter?
Give some advice to a person who starts a new job on Monday.
How can I learn to touch type quickly?
Tell me about the history of bread.
What does a librarian do all day?
Why do cats purr?
Explain the water cycle in a few sentences.
How can I keep a house cool in summer?
What are the main differences between jazz and classical music?
Write a polite letter asking a neighbour to keep the noise down.
How do I fold a shirt neatly?
What is a good way to remember people's names?
Describe a market square on a busy Saturday morning.
Why is it important to drink enough water?
How do bees make honey?
What is the purpose of a comma?
Explain the difference between weather and climate.
How would you plan a birthday party for a shy child?
What can I do with old newspapers?
Why do ships made of steel float?
Summarise the story of the tortoise and the hare.
What are some hobbies that need little money?
How does the moon cause the tides?
Give me ideas for a vegetable garden on a balcony.
What is the role of a goalkeeper in football?
How do I write a good introduction for a talk?
Explain how a candle burns.
What are the advantages of living in a small village?
What is a library card good for?
How can I take better photographs with a simple camera?
What is a metaphor? Give an example.
Describe the taste of an orange to someone who never had one.
How do mountains form?
What should I consider before I adopt a dog?
Why is sleep important for learning?
""".splitlines()


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
