"""Instructions followed by base and policy, against plain transformers, one prompt at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from distributed.runner import run_distributed
from distributed.test_zero import build, recipe_config
from moored.config import Config, load_config
from moored.evaluation.instructions import TASKS
from moored.evaluation.instructions.tasks import instruction_prompts
from moored.models import partition
from moored.tracking.journal import metrics
from moored.training import train
from moored.utils.errors import UserError
from tiny import tiny_recipe, tiny_tokenizer, write_recipe

TOKENS = 4


def share_followed(model: torch.nn.Module) -> float:
    """Of the constraints: no batch, no padding, no cache, the most likely token one by one."""
    tokenizer, met = tiny_tokenizer(), list[bool]()
    for task in TASKS.values():
        text = f"<|im_start|>user\n{task.prompt}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        answer: list[int] = []
        for _ in range(TOKENS):
            with torch.no_grad():
                token = int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            answer.append(token)
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        words = tokenizer.decode(answer, skip_special_tokens=True)
        met += [check.met_by(words) for check in task.checks]
    return sum(met) / len(met)


def following(rank: int, world_size: int, folder: Path) -> None:
    torch.distributed.destroy_process_group()  # a run makes and leaves its own
    recipe = tiny_recipe(folder, tie_word_embeddings=False, initializer_range=0.2)
    recipe["model"]["quantization"] = "none"
    recipe["optim"] = {"learning_rate": 0.01, "warmup_steps": 1}
    recipe["train"]["steps"] = 30
    recipe["regularizer"] = {"kind": "none"}
    recipe["adapter"] = {"r": 16, "alpha": 64.0}
    recipe["evaluation"] = {"before": True, "instructions": True, "instruction_tokens": TOKENS}
    run = train.run(load_config(write_recipe(folder, recipe)))
    report = json.loads((run / "report/report.json").read_text())
    base, arm = report["base"], report["arms"]["none"]
    assert (base["num_instructions"], base["num_instruction_prompts"]) == (67, 50)

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    expected = share_followed(model)
    policy = PeftModel.from_pretrained(model, str(run / "adapter")).eval()
    learned = share_followed(policy)
    assert expected != learned, "not a test"
    assert 0 < expected < 1
    # Padding changes sums by rounding, so that a near tie may turn one answer.
    assert base["instruction_following"] == pytest.approx(expected, abs=1.1 / 67)
    assert arm["instruction_following"] == pytest.approx(learned, abs=1.1 / 67)
    for figures in (base, arm):
        tally = figures["instruction_tally"]
        assert (len(tally["num"]), sum(tally["num"])) == (50, 67)
        assert sum(tally["hits"]) / 67 == pytest.approx(figures["instruction_following"])
    curve = metrics(run)["eval/instruction_following_fraction"]
    assert curve == [(0, base["instruction_following"]), (30, arm["instruction_following"])]
    assert "Kept: instructions followed" in (run / "report/report.html").read_text()


def test_instructions_are_judged_before_and_after(tmp_path):
    run_distributed(following, 1, tmp_path)


def test_a_base_without_a_template_cannot_be_asked(tmp_path):
    recipe = tiny_recipe(tmp_path)
    recipe["evaluation"] = {"instructions": True}
    config = load_config(write_recipe(tmp_path, recipe))
    tokenizer = tiny_tokenizer()
    prompts = instruction_prompts(config, tokenizer)
    assert [prompt.sample_id for prompt in prompts] == list(TASKS)
    assert {prompt.stop_token_ids for prompt in prompts} == {(tokenizer.eos_token_id,)}
    first = tokenizer.decode(prompts[0].input_ids)
    task = TASKS[prompts[0].sample_id].prompt
    assert first == f"<|im_start|>user\n{task}<|im_end|>\n<|im_start|>assistant\n"
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"evaluation\.instructions: .*/model has no chat template"):
        instruction_prompts(config, tokenizer)


# ---------------------------------------------------------------- over ZeRO-3's parts


PROMPTS = ([[5, 9, 4], [7, 3, 8]], [[11, 6, 2], [4, 4, 9]])


def generating(rank: int, world_size: int, configs: dict[str, Config]) -> dict[str, Any]:
    """Token ids of two generations of unequal length per rank, and how often was gathered."""
    found: dict[str, Any] = {}
    gather = torch.distributed.all_gather_into_tensor
    for name, config in configs.items():
        partition._SHARE_FOR_GENERATION = 0.0 if name == "by layers" else 0.5
        _, engine = build(config)
        gathers: list[int] = []

        def counted(whole: Any, part: Any, *args: Any, to: Any = gathers, **options: Any) -> Any:
            to.append(whole.nbytes)
            return gather(whole, part, *args, **options)

        torch.distributed.all_gather_into_tensor = counted
        tokens = []
        try:
            with engine.generating():
                for length in (3 + 4 * rank, 6):
                    ids = torch.tensor(PROMPTS[rank])
                    mask = torch.ones_like(ids)
                    new = engine.generate(
                        input_ids=ids,
                        attention_mask=mask,
                        min_new_tokens=length,
                        max_new_tokens=length,
                        do_sample=False,
                    )
                    tokens.append(new.tolist())
        finally:
            torch.distributed.all_gather_into_tensor = gather
        cut = engine.policy.partition
        found[name] = {
            "tokens": tokens,
            "gathers": len(gathers),
            "buffers": len(cut.buffers) if cut else 0,
            "left whole": sum(w.is_contiguous() for b in cut.buffers for w in b.weights)
            if cut
            else 0,
        }
        engine.close()
    return found


def test_a_generation_gathers_the_base_once_where_it_fits(tmp_path):
    """And by layers for every token where not: the same words, also if ranks say unequally many."""
    configs = {
        name: recipe_config(tmp_path, f"parallel.zero_stage={stage}")
        for name, stage in {"zero-2": 2, "once": 3, "by layers": 3}.items()
    }
    for rank, found in enumerate(run_distributed(generating, 2, configs)):
        expected = found["zero-2"]["tokens"]
        assert [len(row) for row in expected[0]] == [6 + 4 * rank] * 2
        assert expected[0][0] != expected[0][1], "not a test"
        for name in ("once", "by layers"):
            assert found[name]["tokens"] == expected, name
            assert found[name]["left whole"] == (name == "by layers")  # the last one at work
        assert found["zero-2"]["gathers"] == 0
        once, by_layers = found["once"], found["by layers"]
        assert once["gathers"] == once["buffers"] == 3  # two layers and the table of words
        forwards = 7 + 6  # the rank that has less to say walks along
        assert by_layers["gathers"] >= forwards * 3
