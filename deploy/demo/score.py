"""Measures base and adapters on held-out prompts, greedily, and writes scores.json.

    python deploy/demo/score.py [NAME ...] [--adapters FOLDER] [--model FOLDER]

Named adapters replace their entries; the others keep theirs.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from data import TASKS
from peft import PeftModel
from recipes import BASE_MODEL, RECIPES
from train import HERE, default_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

HELD_OUT = 40
SEED = 4242
BATCH = 10
MAX_NEW_TOKENS = 64
SAMPLES = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(RECIPES), help="which adapters (default: all)")
    parser.add_argument("--adapters", type=Path, default=HERE / "adapters")
    parser.add_argument("--model", type=Path, default=default_model())
    parser.add_argument("--out", type=Path, default=HERE / "scores.json")
    options = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(2)
    scores = {} if not options.out.is_file() else json.loads(options.out.read_text("utf-8"))["adapters"]
    for name in options.names:
        scores[name] = measure(name, options.adapters / name, options.model)
        entry = scores[name]
        print(
            f"{name}: {entry['metric']} base {entry['base']:.3f} adapter {entry['adapter']:.3f}", flush=True
        )
    result = {
        "base_model": BASE_MODEL,
        "adapters": {name: scores[name] for name in RECIPES if name in scores},
    }
    options.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return 0


def measure(name: str, adapter: Path, model_folder: Path) -> dict[str, Any]:
    """Scores of base and adapter on the same prompts, with a few answers to look at."""
    task = TASKS[name]
    examples = task.held_out(Random(SEED), HELD_OUT)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    prompts = [example.prompt for example in examples]
    answers = generate(model, tokenizer, prompts)
    with model.disable_adapter():
        base_answers = generate(model, tokenizer, prompts)

    def mean(texts: Sequence[str]) -> float:
        total: float = sum(task.score(text, example) for text, example in zip(texts, examples, strict=True))
        return round(total / len(examples), 4)

    shown = zip(examples[:SAMPLES], base_answers, answers, strict=False)
    return {
        "metric": task.metric,
        "held_out_prompts": len(examples),
        "base": mean(base_answers),
        "adapter": mean(answers),
        "samples": [
            {"prompt": example.prompt, "wanted": example.answer or None, "base": plain, "adapter": adapted}
            for example, plain, adapted in shown
        ],
    }


def generate(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Greedy answers, in batches of prompts of about the same length."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        for prompt in prompts
    ]
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    answers = [""] * len(texts)
    for begin in range(0, len(order), BATCH):
        rows = order[begin : begin + BATCH]
        inputs = tokenizer(
            [texts[row] for row in rows], add_special_tokens=False, padding=True, return_tensors="pt"
        )
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        decoded = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(rows, decoded, strict=True):
            answers[row] = text.strip()
    return answers


if __name__ == "__main__":
    sys.exit(main())
