"""Uploads that are wrong in some way: a good one of which hypothesis damages one thing or two.

What is damaged is the service's input as it comes over the wire: messages, header, and the files' bytes. Most
of it must be refused. Some damage leaves an upload that is legal after all, such as a key whose value is its
default; then it may be accepted, and must be kept as it was sent.
"""

import json
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.digests import digest_bytes
from tests.integration.malformed_json import hostile_json, with_json_damage
from tests.integration.malformed_weights import damaged_weights, not_finite, other_tensors
from tests.integration.sent_upload import CARD, CONFIG, GOOD, SETTINGS, WEIGHTS, Sent, dumped
from tests.integration.store_process import adapter_files

KINDS = (
    "IA3",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
    "LOHA",
    "LOKR",
    "VERA",
    "ADALORA",
    "OFT",
    "BOFT",
)
KNOWN: list[dict[str, Any]] = [
    {},
    {"use_dora": True},
    {"use_rslora": True},
    {"lora_bias": True},
    {"bias": "lora_only"},
    {"rank_pattern": {"q_proj": 1}},
    {"alpha_pattern": {"q_proj": 8}},
    {"layers_to_transform": [0]},
    {"modules_to_save": ["lm_head"]},
    {"target_parameters": ["x"]},
    {"trainable_token_indices": [1]},
    *({"peft_type": kind} for kind in (*KINDS, "BOFT", "XLORA", "HIRA", "HRA", "ROAD", "Lora")),
]


@st.composite
def damaged_configs(draw: st.DrawFn) -> Sent:
    if draw(st.integers(0, 4)) == 0:
        data = draw(hostile_json(SETTINGS, 256 * 1024))
        # A size beyond what a config may have is told before it is read.
        return Sent("config: hostile", {**GOOD, CONFIG: data}, "adapter_config|peft_type|config", data != b"")
    known = draw(st.sampled_from(KNOWN))
    settings = draw(with_json_damage({**SETTINGS, **known}))
    return Sent("config: values", {**GOOD, CONFIG: dumped(settings)}, ".")


@st.composite
def wrong_file_sets(draw: st.DrawFn) -> Sent:
    without = {path: {p: d for p, d in GOOD.items() if p != path} for path in GOOD}
    more: dict[str, bytes] = draw(
        st.sampled_from(
            [
                {"adapter_model.bin": b"\x80\x04"},
                {"pytorch_model.pt": b"PK\x03\x04"},
                {"notes.txt": b"\x80\x04]"},
                {"notes.txt": b"PK\x03\x04rest"},
                {"notes.txt": b"\xff\xfe\xfa"},
                {"run.py": b"print()"},
                {"x/adapter_model.safetensors": b""},
                {"adapter_model-00001-of-00002.safetensors": GOOD[WEIGHTS]},
                {"Adapter_Config.json": GOOD[CONFIG]},
                {"notes.md": b"x" * (2**20 + 1)},
                {"vocab.exe": b""},
                {f"n{n}.txt": b"%d" % n for n in range(63)},
                {f"n{n}.txt": b"%d" % n for n in range(500)},
            ]
        )
    )
    files = draw(st.sampled_from([without[CONFIG], without[WEIGHTS], {}, {**GOOD, **more}, {**GOOD, **more}]))
    return Sent("files: wrong set", files, "file|missing|adapter", True)


@st.composite
def odd_paths(draw: st.DrawFn) -> Sent:
    path = draw(
        st.sampled_from(
            ["../x.txt", "/etc/x.txt", "a//b.txt", "a/./b.txt", "a/../../b.txt", "a\\b.txt", "C:x.txt"]
        )
        | st.sampled_from(["", ".", "..", "a/", "\0.txt", "a\nb.txt", "\u202e.txt", "x" * 252 + ".txt"])
    )
    return Sent("files: path", {**GOOD, path: b"text"}, "file|path", True)


@st.composite
def wrong_facts(draw: st.DrawFn) -> Sent:
    """Sizes and digests that are not those of the bytes."""
    index = draw(st.integers(0, len(GOOD) - 1))
    size = draw(st.sampled_from([-1, 0, 1, 2**40, 2**62, 2**63 - 1, -(2**63)]) | st.integers(-100, 10**6))
    digest = draw(
        st.sampled_from(
            ["", "sha256:", "sha256:" + "0" * 64, digest_bytes(b"other"), digest_bytes(b"").upper()]
        )
        | st.text(max_size=10)
    )
    of_size = draw(st.booleans())

    def change(header: store_pb2.UploadHeader) -> None:
        file = header.files[index]
        if of_size:
            file.size_bytes = size if size != file.size_bytes else size + 1
        else:
            file.digest = digest

    return Sent("header: size" if of_size else "header: digest", GOOD, "file|bytes", True, change)


@st.composite
def wrong_fields(draw: st.DrawFn) -> Sent:
    digests = [digest_bytes(b"%d" % n) for n in range(40)]
    name, value = draw(
        st.tuples(
            st.sampled_from(["namespace", "name"]),
            st.sampled_from(["", "A", "-a", "a/b", "a@b", "..", "a" * 64, "é", "a\n"]),
        )
        | st.tuples(
            st.sampled_from(["license", "author", "base_model"]), st.sampled_from(["a\nb", "\0", "x" * 257])
        )
        | st.tuples(st.just("task"), st.sampled_from(["A B", "x" * 64, "-"]))
        | st.tuples(st.just("description"), st.sampled_from(["x" * 4097, "é" * 2049, "x" * 10**6, "a\0b"]))
        | st.tuples(
            st.just("tags"),
            st.sampled_from([["a"] * 2, [str(n) for n in range(33)], ["x" * 65], [""], ["\n"]]),
        )
        | st.tuples(
            st.just("parents"),
            st.sampled_from([["x"], digests[:33], digests[:1] * 2, digests[:1], ["sha256:" + "A" * 64]]),
        )
        | st.tuples(st.just("base_model"), st.sampled_from(["", "other", digests[0]]))
        | st.tuples(st.just("merge_recipe_json"), recipes())
    )

    def change(header: store_pb2.UploadHeader) -> None:
        header.ClearField(name)  # type: ignore[arg-type]
        if isinstance(value, list):
            getattr(header, name).extend(value)
        else:
            setattr(header, name, value)

    about = {
        "parents": "parents|version|members",
        "base_model": "base",
        "tags": "tag",
        "merge_recipe_json": ".",
    }
    return Sent(f"header: {name}", GOOD, about.get(name, name), True, change)


@st.composite
def recipes(draw: st.DrawFn) -> str:
    member = {"digest": digest_bytes(b"0"), "weight": 1.0}
    good = {"method": "linear", "members": [member], "rank": None, "density": None, "seed": None}
    hostile = hostile_json(good, 100_000).map(lambda data: data.decode(errors="ignore").replace("\0", " "))
    # An empty text is none.
    damaged = with_json_damage(good).map(json.dumps)
    return draw((hostile | damaged).filter(bool))


Messages = list[store_pb2.UploadAdapterRequest]


@st.composite
def wrong_streams(draw: st.DrawFn) -> Sent:
    extra = store_pb2.UploadAdapterRequest(data=b"x")
    empty = store_pb2.UploadAdapterRequest(data=b"")
    nothing = store_pb2.UploadAdapterRequest()
    large = store_pb2.UploadAdapterRequest(data=b"x" * (2**20 + 1))
    at = draw(st.integers(1, 3))
    kinds = ("none", "early", "late", "empty", "nothing", "headers", "order", "swap", "join", "large")
    how = draw(st.sampled_from(kinds))

    def change(messages: Messages) -> Messages:
        return {
            "none": [],
            "early": messages[: min(at, len(messages) - 1)],
            "late": [*messages, extra],
            "empty": [*messages[:at], empty, *messages[at:]],
            "nothing": [*messages[:at], nothing, *messages[at:]],
            "headers": [*messages[:at], messages[0], *messages[at:]],
            "order": messages[1:],
            "swap": [messages[0], *reversed(messages[1:])],
            "join": [messages[0], store_pb2.UploadAdapterRequest(data=b"".join(m.data for m in messages))],
            "large": [*messages[:at], large, *messages[at:]],
        }[how]

    about = "first message|header|file|bytes|data only|end"
    return Sent(f"stream: {how}", GOOD, about, True, stream=change)


BOMB = [f"{name}: &{name} [{','.join(['*' + before] * 9)}]" for before, name in pairwise("abcdefghij")]
FRONTS = [
    "\n".join(["a: &a [x]", *BOMB]),
    "a: " + "[" * 20_000,
    "? " * 20_000,
    "- " * 30_000,
    "license: !!python/object/apply:os.system [x]",
    "license: [a, b]\ntags: {x: y}",
    "tags: [" + "a," * 30_000 + "b]",
    "x: |\n" + " y" * 20_000,
    "<<: *a",
    "license: 0x" + "f" * 60_000,
    "\t",
    "a: b: c",
    "language: no",
    "%YAML 9.9",
    "&a a: *a",
    "{" * 5000,
    '"' + "\\x41" * 9000 + '"',
    "a: 2001-99-99",
    "model-index: [{results: [{metrics: 7}]}]",
]


@st.composite
def cards(draw: st.DrawFn) -> Sent:
    """A card keeps no adapter out, but what is not text does."""
    front = draw(st.sampled_from(FRONTS) | st.text(max_size=200))
    text = f"---\n{front}\n---\n# Card\n"
    data = text.encode("utf-8", errors="replace")
    data = draw(st.sampled_from([data, data, data * 20, data + b"\xff"]))[: 2**20]
    return Sent("card", {**GOOD, CARD: data}, "README")


def malformed() -> st.SearchStrategy[Sent]:
    """Every kind."""
    return st.one_of(
        damaged_weights(),
        damaged_configs(),
        not_finite(),
        other_tensors(),
        wrong_file_sets(),
        odd_paths(),
        wrong_facts(),
        wrong_fields(),
        wrong_streams(),
        cards(),
    )


def good(seed: int) -> Sent:
    """Nothing is wrong with it."""
    return Sent("good", adapter_files(seed, rank=1))
