"""Trains the demo adapters with peft on the CPU, in float32, from fixed seeds.

    python deploy/demo/train.py [NAME ...] [--steps N] [--threads N] [--out FOLDER] [--model FOLDER]

One after the other; all four take about half an hour on two cores. `score.py` measures what came out.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from data import TASKS
from example import Example
from peft import LoraConfig, PeftModel, get_peft_model
from recipes import BASE_MODEL, RECIPES, Recipe
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(RECIPES), help="which adapters (default: all)")
    parser.add_argument("--steps", type=int, default=0, help="steps of each training instead of the recipe's")
    parser.add_argument("--out", type=Path, default=HERE / "adapters")
    parser.add_argument("--model", type=Path, default=default_model())
    parser.add_argument("--threads", type=int, default=2, help="fewer are faster on a busy machine")
    options = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    for name in options.names:
        recipe = RECIPES[name]
        started = time.monotonic()
        loss = train(recipe, options.model, options.out, options.steps or recipe.steps)
        print(f"{name}: loss {loss:.4f} after {time.monotonic() - started:.0f} s", flush=True)
    return 0


def default_model() -> Path:
    home = Path(os.environ.get("ADAPTERMESH_HOME", "~/.adaptermesh")).expanduser()
    return home / "models" / BASE_MODEL


def train(recipe: Recipe, model_folder: Path, out: Path, steps: int) -> float:
    """Trains one adapter and saves it; returns the mean loss of the last tenth of the steps."""
    torch.manual_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = load_trainable(recipe, model_folder, out)
    examples = TASKS[recipe.name].train(Random(recipe.seed), steps * recipe.batch)
    encoded = [encode(tokenizer, example) for example in examples]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    losses: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate(step, steps, recipe.warmup)
        batch = encoded[step * recipe.batch : (step + 1) * recipe.batch]
        loss = loss_of(model.base_model.model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 9:
            print(f"{recipe.name}: step {step + 1}/{steps} loss {sum(losses[-10:]) / 10:.4f}", flush=True)
    save(model, recipe, out / recipe.name)
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def load_trainable(recipe: Recipe, model_folder: Path, out: Path) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    if recipe.start_from:
        return PeftModel.from_pretrained(base, out / recipe.start_from, is_trainable=True)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)


def rate(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))


def encode(tokenizer: Any, example: Example) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids): the chat format that serving uses for one user message, then the answer."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": example.prompt}], add_generation_prompt=True, tokenize=False
    )
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
    return prompt, [*answer, tokenizer.eos_token_id]


def loss_of(model: Any, batch: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Cross-entropy of the answers.

    The beginning that all prompts share runs once for the whole batch, and the head runs on answers alone.
    Rows are padded on the right, where causal attention keeps the padding from everything that counts.
    """
    shared = shared_length([prompt for prompt, _ in batch])
    rows = [[*prompt[shared:], *answer] for prompt, answer in batch]
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    labels = torch.full_like(ids, -100)
    for index, (prompt, answer) in enumerate(batch):
        begin = len(prompt) - shared
        labels[index, begin : begin + len(answer)] = torch.tensor(answer)
    cache = DynamicCache()
    model.model(input_ids=torch.tensor([batch[0][0][:shared]]), past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(batch))
    hidden = model.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
    target = labels[:, 1:]
    wanted = target != -100
    return functional.cross_entropy(model.lm_head(hidden[:, :-1][wanted]), target[wanted])


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many leading ids are the same in all prompts; the last id of a prompt never counts."""
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    return next((index for index, ids in enumerate(columns) if len(set(ids)) > 1), min(map(len, prompts)) - 1)


def save(model: PeftModel, recipe: Recipe, folder: Path) -> None:
    """Saves what peft saves, with the base by its name and a model card of our own."""
    model.peft_config["default"].base_model_name_or_path = BASE_MODEL
    model.save_pretrained(str(folder), save_embedding_layers=False)
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text("utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    (folder / "README.md").write_text(card(recipe), "utf-8")
    (folder / "adapter_model.safetensors").chmod(0o644)


def card(recipe: Recipe) -> str:
    tags = "".join(f"- {tag}\n" for tag in ("lora", *recipe.tags))
    start = f", continued from `{recipe.start_from}`" if recipe.start_from else ""
    front = (
        f"---\nbase_model: {BASE_MODEL}\nlibrary_name: peft\nlicense: apache-2.0\n"
        f"pipeline_tag: text-generation\ntags:\n{tags}---\n"
    )
    targets = ", ".join(recipe.targets)
    adapter = f"A LoRA of rank {recipe.rank} (alpha {recipe.alpha}) on {targets} of `{BASE_MODEL}`{start}"
    training = f"{recipe.steps} steps of {recipe.batch}, loss on the answers only, seed {recipe.seed}"
    return (
        f"{front}\n# {recipe.name}\n\n{recipe.description}\n\n"
        f"{adapter}, trained on synthetic examples: {training}. Made by `deploy/demo/train.py`; "
        "its scores on prompts that training has not seen are in `deploy/demo/scores.json`.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
