"""What the `adapters` library wrote, in the engine: its own numbers alone, and all of it in one batch."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from adaptermesh.artifact.composing import Member, compose
from adaptermesh.core.clock import SystemClock
from adaptermesh.core.composition import composition_digest, parse_resolved
from adaptermesh.core.sampling import SamplingParams
from adaptermesh.worker.engine.base import load_base
from adaptermesh.worker.engine.engine import Engine
from adaptermesh.worker.engine.request import Request
from tests.parity.adapters.goldens import TOLERANCE, Goldens, ingest_folder, load_goldens
from tests.parity.engine.test_families import Memory, make_config, step_to_the_end
from tests.parity.engine.test_kinds import HeardLogprobs

FORWARDS = [("llama", "native"), ("llama", "lean"), ("llama", "plain"), ("gpt2", "plain")]


class World:
    """The goldens' base in an engine that is stepped by hand, with every adapter that is served."""

    def __init__(self, folder: Path, base: str, forward: str) -> None:
        self.goldens: Goldens = load_goldens(base)
        shutil.copytree(self.goldens.base_folder, folder / "base")
        config = json.loads((folder / "base" / "config.json").read_text())
        words = {f"w{index}": index for index in range(config["vocab_size"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "base")
        (folder / "base" / "base_model.json").write_text(json.dumps(self.goldens.facts.to_json()))
        self.source = source = Memory()
        self.digests: dict[str, str | None] = {"base": None}
        for method in self.goldens.logits:
            if method != "base":
                out = folder / f"{method}.safetensors"
                manifest = ingest_folder(self.goldens.folder(method), self.goldens.facts, out)
                source.adapters[manifest.digest] = (manifest, out.read_bytes())
                self.digests[method] = manifest.digest
        rows = len(self.digests)
        engine_config = make_config(
            folder, forward=forward, block_tokens=8, device_slots=rows, max_batch_rows=rows, step_tokens=64
        )
        self.engine = Engine(engine_config, load_base(folder / "base", engine_config), source, SystemClock())
        self.count = 0

    def answer(self, method: str, tokens: list[int], *, reuse_prefix: bool = True) -> HeardLogprobs:
        """To a prompt of the test's own, alone."""
        heard, self.count = HeardLogprobs(), self.count + 1
        params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True, logprobs=8)
        tenant = "t" if reuse_prefix else "other"
        request = Request(
            f"r{self.count}", tenant, self.digests[method], tuple(tokens), params, reuse_prefix=reuse_prefix
        )
        self.engine.submit(request, heard)
        while not heard.ended.is_set():
            self.engine.step()
        assert heard.error is None
        return heard

    def ask(self, asked: list[tuple[str, int]], count: int = 1) -> list[HeardLogprobs]:
        """All at once: methods, each with one of the goldens' prompts."""
        answers = []
        params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, logprobs=8)
        for method, prompt in asked:
            heard, self.count = HeardLogprobs(), self.count + 1
            tokens = tuple(self.goldens.prompts[prompt])
            request = Request(f"r{self.count}", "t", self.digests[method], tokens, params)
            self.engine.submit(request, heard)
            answers.append(heard)
        step_to_the_end(self.engine, answers)
        return answers


@pytest.fixture(params=FORWARDS, ids=lambda param: f"{param[0]}-{param[1]}")
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    world = World(tmp_path, *request.param)
    yield world
    world.engine.stop()


def test_each_method_alone_has_the_librarys_probabilities(world: World) -> None:
    for method, logits in world.goldens.logits.items():
        for prompt, expected in enumerate(logits):
            [heard] = world.ask([(method, prompt)])
            likeliest = torch.tensor(expected).log_softmax(-1).topk(8)
            [found] = heard.logprobs
            assert [token for token, _ in found.top] == likeliest.indices.tolist(), method
            torch.testing.assert_close(
                torch.tensor([logprob for _, logprob in found.top]),
                likeliest.values,
                rtol=0.0,
                atol=TOLERANCE,
            )


def test_a_set_up_in_a_request_answers_as_the_set_up(world: World, tmp_path: Path) -> None:
    for method, expression in (
        ("fuse_dynamic", "fuse({a,b,c},{a},{b},{c})"),
        ("fuse_static", "fuse({a,b},{a},{b})"),
        ("stack_double_seq_bn", "stack({a},{b})"),
        ("stack_on_fuse", "stack({c},fuse({a,b},{a},{b}))"),
    ):
        folder, members, digests = world.goldens.folder(method), dict[str, Member](), dict[str, str]()
        for path in sorted(one for one in folder.iterdir() if one.is_dir()):
            manifest = ingest_folder(path, world.goldens.facts, tmp_path / "member")
            digests[path.name] = manifest.digest
            members[manifest.digest] = Member(manifest, (tmp_path / "member").read_bytes())
        tree = parse_resolved(expression.format(**digests))
        composed = compose(tree, members)
        world.digests["request"] = digest = composition_digest(tree)
        world.source.adapters[digest] = (composed.manifest, composed.data.tobytes())
        for prompt in range(len(world.goldens.prompts)):
            [expected], [found] = (world.ask([(name, prompt)], count=4) for name in (method, "request"))
            assert found.tokens == expected.tokens, method
            assert torch.equal(found.values(), expected.values())


def test_a_prompt_that_goes_on_where_another_ended_finds_nothing_wrong_in_the_cache(world: World) -> None:
    tokens = [3 + place * 5 % 17 for place in range(30)]
    for method in world.digests:
        # The first two whole blocks of the second are all of the first.
        for prompt in (tokens[:16], tokens, tokens[:20]):
            expected = world.answer(method, prompt, reuse_prefix=False)
            found = world.answer(method, prompt)
            assert found.tokens == expected.tokens, method
            torch.testing.assert_close(found.values(), expected.values(), rtol=1e-4, atol=1e-4)


def test_all_methods_in_one_batch_answer_as_each_of_them_alone(world: World) -> None:
    asked = [(method, index % len(world.goldens.prompts)) for index, method in enumerate(world.digests)]
    alone = [heard for one in asked for heard in world.ask([one], count=6)]
    assert len(asked) >= 9
    for order in (asked, asked[::-1]):
        for one, heard in zip(order, world.ask(order, count=6), strict=True):
            expected = alone[asked.index(one)]
            assert heard.tokens == expected.tokens, one
            torch.testing.assert_close(heard.values(), expected.values(), rtol=1e-5, atol=1e-5)
