"""transformers and peft on the same card, by `generate` on a static batch."""

import time
import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from adaptermesh.artifact.base_facts import BaseFacts
from tests.bench.gpu.adapter import lora_config
from tests.bench.gpu.shape import Shape


class PeftLanes:
    """A model of the shape, bare and with all adapters attached."""

    def __init__(self, shape: Shape, folder: str, device: str, dtype: torch.dtype) -> None:
        self._shape = shape
        self._folder = folder
        self._device = device
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device(device):
            torch.manual_seed(0)
            self._model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self._facts = BaseFacts.from_config(shape.name, shape.config, "sha256:" + "0" * 64)

    def attach(self) -> None:
        """Adds the adapters, one after the other, as peft makes them."""
        fields = lora_config(self._facts, self._shape.rank)
        config = LoraConfig(**{**fields, "init_lora_weights": False, "base_model_name_or_path": self._folder})
        with warnings.catch_warnings(), torch.device(self._device):
            # peft still reads a property that transformers has renamed.
            warnings.simplefilter("ignore", FutureWarning)
            self._model = get_peft_model(self._model, config, adapter_name="a0").eval()
            for index in range(1, self._shape.adapters):
                self._model.add_adapter(f"a{index}", config)
        self._model.to(self._device)

    def decode(self, *, mixed: bool) -> float:
        """Output tokens a second: a long answer less a short one, so that the prompts' time is not in it."""
        shape = self._shape
        names = {"adapter_names": [f"a{row % shape.adapters}" for row in range(shape.rows)]} if mixed else {}
        short = self._generate(1, names)
        return (
            shape.rows * shape.peft_tokens / max(1e-9, self._generate(1 + shape.peft_tokens, names) - short)
        )

    def _generate(self, count: int, names: dict[str, list[str]]) -> float:
        shape = self._shape
        ids = torch.randint(
            3, shape.config["vocab_size"], (shape.rows, shape.prompt_tokens), device=self._device
        )
        if self._device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=count,
                max_new_tokens=count,
                pad_token_id=0,
                **names,
            )
        out.cpu()
        return time.perf_counter() - start
