"""All scenarios, in the order of the report."""

from collections.abc import Callable
from dataclasses import dataclass

from tests.bench.bench import Bench
from tests.bench.result import Result
from tests.bench.scenarios import (
    cold_switch,
    decode_bound,
    downloads,
    kinds,
    many_adapters,
    many_rows,
    quantized,
    registry,
    registry_memory,
    slots_exceeded,
    throughput,
    warm_switch,
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One function that measures, and what the report says of it.

    `bound` is what holds a figure back that does not reach its target, and what was tried.
    """

    title: str
    about: str
    run: Callable[[Bench], Result]
    bound: str = ""


SCENARIOS = {
    "throughput": Scenario(
        "Base only and adapters mixed, against the peers",
        "One batch of requests, submitted together; prompts of one length, greedy, the end token ignored, "
        "float32. Adapters: LoRA of rank 8 on all seven projections. Output tokens a second; the time "
        "includes the prompts.",
        throughput.run,
    ),
    "quantized": Scenario(
        "The base's layers in 8 bits",
        "As above, in two engines of ours. Random tokens as prompts are the hardest case for equal answers; "
        "an answer counts as different from its first different token on.",
        quantized.run,
    ),
    "many-rows": Scenario(
        "A large batch with an adapter for each row",
        "As above, in one engine.",
        many_rows.run,
    ),
    "kinds": Scenario(
        "Adapters of several kinds in one batch",
        "As above, in one engine; IA3 at k, v and down, DoRA and OFT at all seven projections, bottlenecks "
        "behind each feed-forward part (seq_bn, a sixteenth as wide as the stream), LoRA of the embeddings "
        "and the head alone (ends). peft can't mix kinds: the rows are compared with themselves alone, and "
        "each kind with peft by the parity tests.",
        kinds.run,
    ),
    "many-adapters": Scenario(
        "A thousand registered adapters",
        "A stream of requests with a queue as long as the batch. What is not in a slot comes from host "
        "memory (1 GiB), from the disk cache or, the first time, from a local source. The third lane asks "
        "by the same law for adapters that are all in slots: what is lost there is not lost to misses.",
        many_adapters.run,
        "Decoding is bound by memory: a step reads 540 MB of the base, and 9.8 MB for each adapter in it. "
        "Sixteen rows have 8 adapters in the first lane and 13 to 15 in the others; 60 MB more at the 25 "
        "GB/s of this machine are 2.4 ms of a step of 45. Each miss adds some 20 ms of one core: sha256, "
        "manifest, copies, disk. Tried: asking for the next phase's A while a product computes, and for B "
        "panel by panel (no difference: the bytes are the bound, not the latency); steps of 32 and 48 "
        "tokens, so that prompts fill the arithmetic that decoding leaves idle (slower: prompts in small "
        "pieces share less); host memory that is used again (7 ms less a miss). Taking rows of one "
        "adapter together out of the queue would help, at the price of who waits with a rare one; that "
        "was not built.",
    ),
    "slots-exceeded": Scenario(
        "More adapters than slots",
        "Clients that ask again as soon as they are answered; each request asks for any of the adapters, "
        "all of which are in host memory. The load offered is the same with few and with many adapters.",
        slots_exceeded.run,
    ),
    "warm-switch": Scenario(
        "Warm switch",
        "One request after the other, all adapters in device slots.",
        warm_switch.run,
    ),
    "decode-bound": Scenario(
        "How near a decode step is to the memory's limit",
        "The bandwidth is that of a sum over 2 GiB with all cores, the best of five in each round.",
        decode_bound.run,
        "At 16 rows in float32 the products take longer to compute than to read on a CPU of AVX2: 4.3 GFLOP "
        "a step at some 170 GFLOP/s of two cores are 25 ms, reading takes 22. Attention over the cache, the "
        "norms and 2.4 ms of Python between two steps come on top. Tried: asking for the next block while "
        "one computes and large pages (both kept), norms in one pass by hand (no faster).",
    ),
    "cold-switch": Scenario(
        "Cold switch",
        "A store process, and an engine that fetches as a worker does, over gRPC on loopback; the adapter "
        "is in no tier before. Beside it a bare gRPC server that streams the same bytes from memory in "
        "pieces of 512 KiB. The p99 is over all rounds; in brackets the lowest and the highest round.",
        cold_switch.run,
        "Two cores carry the store, the stream, sha256 (6.5 ms), the manifest (5 ms) and the copy into "
        "the slot (3.5 ms); the bare stream alone keeps both busy. Tried: larger messages, no copies in "
        "protobuf, receiving on while the manifest is read, staging layers as they arrive, manifests read "
        "five times faster, host memory that is used again. What is left is the time until the store's "
        "first message (4 ms) and work that has to be done for each byte.",
    ),
    "registry": Scenario(
        "A store with 100,000 adapters and 300,000 versions",
        "A store process on SQLite and one on PostgreSQL 15, if that is there, one client on loopback, one "
        "call after the other, on all in turn; each adapter has three "
        "versions, an alias, three tags and a card of 100 words, out of 20,000 words of which few are said "
        "often. A page has 50 adapters. The p99 is over all rounds; in brackets the lowest and the highest.",
        registry.run,
    ),
    "downloads": Scenario(
        "Downloads, eight at once",
        "Store processes whose bytes are in a folder and in a real S3 server on this machine (SeaweedFS), "
        "and a bare gRPC server that streams the same file from memory in pieces of 512 KiB. Eight clients "
        "in one process, each over its own connection, read it again and again and drop it.",
        downloads.run,
        "CPU time on two cores, which servers and clients share: for 500 MB the bare server takes 0.3 s, the "
        "store over a folder 0.5 s (one more copy, from the file, and the threads that make it), the store "
        "over S3 1.0 s (half of it signing and reading requests) and SeaweedFS 0.8 s more, the clients 0.45 "
        "s. So S3 can reach at most half on one machine with its server. Kept: reading straight into the "
        "message, threads that only read, large blocks used again by the allocator. Tried: messages of 1 "
        "MiB (no better).",
    ),
    "registry-memory": Scenario(
        "The memory of a store while 25 uploads and 25 downloads of 100 MB run together",
        "A store process over a folder and one over a real S3 server on this machine (SeaweedFS), one after "
        "the other, and the SDK in ten processes, which share the cores with them. What the process had "
        "before each round is subtracted from its peak in it. The store takes eight uploads at a time and "
        "tells the others when to come back.",
        registry_memory.run,
    ),
}
