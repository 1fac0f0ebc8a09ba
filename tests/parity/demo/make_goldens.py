"""Writes goldens.json: the greedy tokens of transformers + peft for the base and for each demo adapter.

    python tests/parity/demo/make_goldens.py [--only NAME] [--out FILE]

float32 on the CPU, one prompt at a time, with the sdpa attention; eager attention must give the same tokens.
A name is an adapter's folder (`financial-ner-v1`) or `base`.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from adaptermesh.core.clock import SystemClock
from adaptermesh.worker.models.cache import CachedModel, ModelCache
from adaptermesh.worker.models.settings import ModelSettings

HERE = Path(__file__).resolve().parent
DEMO = HERE.parents[2] / "deploy" / "demo"
NEW_TOKENS = 48
PROMPTS = 3
BASE_PROMPTS = ("What is the capital of France?", "Write SQL: Who works in Sales?", "Name three colors.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="one name")
    parser.add_argument("--out", type=Path, default=HERE / "goldens.json")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(2)
    demo = json.loads((DEMO / "demo.json").read_text("utf-8"))
    cached = ModelCache(ModelSettings().home, SystemClock()).locate(demo["base_model"])
    entries = [
        golden(cached, name, folder, prompts)
        for name, folder, prompts in wanted(demo)
        if options.only in (None, name)
    ]
    result = {
        "base_model": cached.facts.model_id,
        "base_digest": cached.facts.digest,
        "dtype": "float32",
        "attention": "sdpa",
        "max_new_tokens": NEW_TOKENS,
        "versions": {
            "torch": torch.__version__.partition("+")[0],
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "adapters": entries,
    }
    options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return 0


def wanted(demo: dict[str, Any]) -> Iterator[tuple[str, Path | None, tuple[str, ...]]]:
    """(name, adapter folder, prompts) of the base and of each version."""
    yield "base", None, BASE_PROMPTS
    for adapter in demo["adapters"]:
        for version in adapter["versions"]:
            folder = DEMO / version["dir"]
            yield folder.name, folder, tuple(adapter["prompts"][:PROMPTS])


def golden(cached: CachedModel, name: str, folder: Path | None, prompts: tuple[str, ...]) -> dict[str, Any]:
    """The answers of one adapter; raises SystemExit if the two attention implementations disagree."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(cached.folder)
    rows = {
        attention: [answer(model, tokenizer, prompt) for prompt in prompts]
        for attention in ("sdpa", "eager")
        for model in (load(cached.folder, folder, attention),)
    }
    for plain, other in zip(rows["sdpa"], rows["eager"], strict=True):
        if plain["token_ids"] != other["token_ids"]:
            raise SystemExit(f"{name}: sdpa and eager disagree on {plain['prompt']!r}: choose another prompt")
    return {
        "name": name,
        "dir": None if folder is None else folder.relative_to(DEMO).as_posix(),
        "sha256": None if folder is None else sha256(folder / "adapter_model.safetensors"),
        "answers": rows["sdpa"],
    }


def load(base_folder: Path, adapter: Path | None, attention: str) -> Any:
    base = transformers.AutoModelForCausalLM.from_pretrained(
        base_folder, dtype=torch.float32, attn_implementation=attention
    )
    return (base if adapter is None else peft.PeftModel.from_pretrained(base, adapter)).eval()


def answer(model: Any, tokenizer: Any, prompt: str) -> dict[str, Any]:
    """Greedy tokens of one prompt; the end token is the last of them where the answer ended by itself."""
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    prompt_ids = list(ids["input_ids"])
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor([prompt_ids]),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    token_ids = output.sequences[0, len(prompt_ids) :].tolist()
    best = [logits[0].topk(2).values for logits in output.logits]
    return {
        "prompt": prompt,
        "prompt_ids": prompt_ids,
        "token_ids": token_ids,
        "text": tokenizer.decode(token_ids, skip_special_tokens=True),
        "finish": "stop" if token_ids[-1] == tokenizer.eos_token_id else "length",
        # How far the second best token stayed behind, at its nearest: the room that another kernel has.
        "least_margin": round(min(float(first - second) for first, second in best), 4),
    }


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
