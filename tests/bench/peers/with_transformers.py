"""transformers `generate` on a static batch: the bare base, or peft in one of its two ways."""

import importlib.metadata
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.bench.peers.serve import serve

_BASE = "__base__"


class TransformersPeer:
    """`way` is "base", "adapter_names" (one mixed batch) or "set_adapter" (one batch for each adapter)."""

    def __init__(self) -> None:
        self._model: Any = None
        self._way = ""
        self._folder = Path()

    def load(self, message: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._way = message["options"]["way"]
        self._folder = Path(message["adapters"])
        model: Any = AutoModelForCausalLM.from_pretrained(
            message["model"], dtype=torch.float32, local_files_only=True
        )
        # Nobody stops at the end-of-sequence token here, and nobody draws.
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        for sampled in ("temperature", "top_p", "top_k"):
            setattr(model.generation_config, sampled, None)
        self._model = model.eval()
        versions = {name: importlib.metadata.version(name) for name in ("transformers", "peft", "torch")}
        return {"versions": versions, "threads": torch.get_num_threads()}

    def run(self, message: dict[str, Any]) -> dict[str, Any]:
        items, count = message["workload"]["items"], message["workload"]["output_tokens"]
        for adapter in {item["adapter"] for item in items} - {None}:
            self._ensure(adapter)
        start = time.perf_counter()
        tokens = self._by_group(items, count) if self._way == "set_adapter" else self._at_once(items, count)
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    def _ensure(self, adapter: str) -> None:
        folder = self._folder / adapter / "peft"
        with warnings.catch_warnings():
            # peft still reads a property that transformers has renamed.
            warnings.simplefilter("ignore", FutureWarning)
            if not isinstance(self._model, PeftModel):
                self._model = PeftModel.from_pretrained(self._model, folder, adapter_name=adapter).eval()
            elif adapter not in self._model.peft_config:
                self._model.load_adapter(folder, adapter_name=adapter)

    def _at_once(self, items: list[dict[str, Any]], count: int) -> list[list[int]]:
        names = [item["adapter"] or _BASE for item in items]
        extra = {"adapter_names": names} if set(names) != {_BASE} else {}
        return self._generate([item["prompt"] for item in items], count, extra)

    def _by_group(self, items: list[dict[str, Any]], count: int) -> list[list[int]]:
        groups: dict[str, list[int]] = {}
        for index, item in enumerate(items):
            groups.setdefault(item["adapter"], []).append(index)
        tokens: list[list[int]] = [[] for _ in items]
        for adapter, indices in groups.items():
            self._model.set_adapter(adapter)
            answers = self._generate([items[index]["prompt"] for index in indices], count, {})
            for index, answer in zip(indices, answers, strict=True):
                tokens[index] = answer
        return tokens

    def _generate(self, prompts: list[list[int]], count: int, extra: dict[str, Any]) -> list[list[int]]:
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=count, **extra
            )
        answers: list[list[int]] = out[:, width:].tolist()
        return answers


if __name__ == "__main__":
    peer = TransformersPeer()
    serve({"load": peer.load, "run": peer.run})
