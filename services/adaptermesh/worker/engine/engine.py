"""The engine: takes requests, runs steps, tells the listeners. One thread computes; any thread may ask."""

import logging
import secrets
import threading
from collections.abc import Callable, Sequence

import torch

from adaptermesh.core.clock import Clock
from adaptermesh.core.errors import Code, MeshError, Reason, invalid_field, unavailable
from adaptermesh.core.tiers import Tier
from adaptermesh.worker.engine.admission import check_request, prompt_too_long
from adaptermesh.worker.engine.arrivals import CudaCopies
from adaptermesh.worker.engine.base import Base
from adaptermesh.worker.engine.bell import Bell
from adaptermesh.worker.engine.config import EngineConfig
from adaptermesh.worker.engine.deadlines import Deadlines, deadline_exceeded
from adaptermesh.worker.engine.forward.forward import find_kernels, make_forward
from adaptermesh.worker.engine.holders import Holder, OnDone
from adaptermesh.worker.engine.kv import BlockAllocator
from adaptermesh.worker.engine.ops.registry import fast_ops
from adaptermesh.worker.engine.pace import Pace
from adaptermesh.worker.engine.penalties import make_history
from adaptermesh.worker.engine.postprocess import Ending, StepResult, take_token
from adaptermesh.worker.engine.request import Admission, Listener, Request, Timeline
from adaptermesh.worker.engine.residency import Residency, Staging
from adaptermesh.worker.engine.runner import Runner
from adaptermesh.worker.engine.scheduler import Scheduler
from adaptermesh.worker.engine.sequence import Sequence as Row
from adaptermesh.worker.engine.sequence import SequenceState
from adaptermesh.worker.engine.slots import DeviceSlots
from adaptermesh.worker.engine.source import AdapterSource
from adaptermesh.worker.engine.status import EngineStatus, ResidencyView
from adaptermesh.worker.engine.step_plan import Advance, StepPlan
from adaptermesh.worker.engine.step_plan import Row as PlanRow
from adaptermesh.worker.engine.text import TextStream

log = logging.getLogger(__name__)

_IDLE_SECONDS = 0.5


class Engine:
    """Serves one base model and many adapters on one device."""

    def __init__(
        self,
        config: EngineConfig,
        base: Base,
        source: AdapterSource,
        clock: Clock,
        draw_seed: Callable[[], int] = lambda: secrets.randbits(63),
    ) -> None:
        self._config = config
        self._base = base
        self._clock = clock
        self._draw_seed = draw_seed
        self._lock = Bell()
        self._max_context = min(config.max_context_tokens, base.max_context_tokens)
        blocks = config.kv_tokens // config.block_tokens
        self._blocks = BlockAllocator(blocks, config.block_tokens)
        kernels = find_kernels(base, config)
        forward = make_forward(base, config, kernels)
        ops = fast_ops(base.sites, base.dtype, base.device, kernels, forward.weights)
        copies = None
        if base.device.type == "cuda":
            copies = CudaCopies(base.device, base.dtype, base.sites.num_layers)
        self._slots = DeviceSlots(config.device_slots, base.sites.num_layers, ops, copies)
        self._residency = Residency(
            config, base, self._slots, source, clock, self._lock, self._on_adapter_failed
        )
        self._runner = Runner(config, base, self._slots, blocks, forward)
        self._scheduler = Scheduler(config, self._blocks, self._residency, self._runner.resumable_layers)
        self._rows: dict[str, Row] = {}
        self._deadlines = Deadlines()
        self._pace = Pace()
        self._endings: list[tuple[str, MeshError]] = []
        self._arrivals = 0
        self._failures = 0
        self._draining = False
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._on_change: Callable[[], None] = lambda: None

    # Asking: any thread.

    @property
    def healthy(self) -> bool:
        """False once several steps in a row have failed."""
        return self._failures < self._config.unhealthy_after

    @property
    def max_context_tokens(self) -> int:
        """Longest prompt and output together: the configured limit, the model's, or all of the KV cache."""
        return min(self._max_context, self._blocks.total * self._blocks.block_tokens)

    def submit(self, request: Request, listener: Listener) -> Admission:
        """Takes a request; the listener hears of it from the engine's thread.

        Raises:
            MeshError: INVALID_ARGUMENT (INVALID_FIELD, PROMPT_TOO_LONG); RESOURCE_EXHAUSTED (OVERLOADED) if
                the queue is full; UNAVAILABLE (DRAINING); DEADLINE_EXCEEDED.
        """
        check_request(request, self._base.facts.vocab_size, self.max_context_tokens)
        with self._lock:
            self._check_open(request)
            timeline = Timeline(submitted_ns=self._now_ns())
            row = self._make_row(request, listener, timeline)
            if request.digest is not None:
                traits = self._residency.traits(request.digest)
                if traits is not None:
                    row.learn(traits)
                    if not row.fits:
                        raise prompt_too_long(request, row.virtual, self.max_context_tokens)
                holder = Holder(request.request_id, request.digest, request.context, timeline)
                timeline.tier_at_admission = self._residency.want(holder)
            self._rows[request.request_id] = row
            self._scheduler.add(row)
            self._deadlines.add(row)
            self._lock.notify_all()
        self._on_change()
        return Admission(timeline.tier_at_admission, len(request.prompt_ids))

    def cancel(self, request_id: str) -> None:
        """Ends a request with CANCELLED before the next step; unknown or ended ones are ignored."""
        error = MeshError(
            Code.CANCELLED, Reason.CANCELLED, "the request was cancelled", metadata={"request_id": request_id}
        )
        self._end_later([request_id], error)

    def load(
        self, digest: str, tier: Tier, pin: bool, on_done: OnDone, context: object | None = None
    ) -> None:
        """Brings an adapter to a tier; `on_done` gets None or the error, once, on any thread.

        The errors are those of the source and RESOURCE_EXHAUSTED if every slot is in use.
        """
        with self._lock:
            self._residency.load(digest, tier, pin, on_done, context)
            self._lock.notify_all()

    def unpin(self, digest: str) -> ResidencyView:
        """Lets a pinned adapter go like any other; gives where it is now."""
        with self._lock:
            view = self._residency.unpin(digest)
            self._lock.notify_all()
        self._on_change()
        return view

    def evict(self, digest: str) -> None:
        """Drops an adapter from every tier; raises MeshError FAILED_PRECONDITION if it is in use."""
        with self._lock:
            self._residency.evict(digest)
            self._lock.notify_all()
        self._on_change()

    def status(self) -> EngineStatus:
        with self._lock:
            return EngineStatus(
                running=len(self._scheduler.running),
                waiting=len(self._scheduler.waiting),
                waiting_tokens=self._scheduler.waiting.tokens,
                kv_used_tokens=self._blocks.used * self._blocks.block_tokens,
                kv_total_tokens=self._blocks.total * self._blocks.block_tokens,
                residencies=self._residency.views(),
                kv_cached_tokens=self._blocks.reclaimable * self._blocks.block_tokens,
                kv_total_bytes=self._runner.kv_bytes,
                kv_used_bytes=self._blocks.used * self._runner.kv_block_bytes,
                kv_cached_bytes=self._blocks.reclaimable * self._runner.kv_block_bytes,
                prefix_query_tokens=self._scheduler.prefix_query_tokens,
                prefix_hit_tokens=self._scheduler.prefix_hit_tokens,
                tiers=self._residency.budgets(),
            )

    def set_change_callback(self, callback: Callable[[], None]) -> None:
        """Sets what is called, on any thread, after the status has changed."""
        self._on_change = callback

    # Living and dying.

    def start(self) -> None:
        """Starts the thread that computes."""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def drain(self, timeout: float) -> bool:
        """Takes nothing new and waits until all requests have ended; False if that took too long."""
        with self._lock:
            self._draining = True
            return self._lock.wait_for(lambda: not self._rows, timeout)

    def stop(self) -> None:
        """Stops the thread; requests that have not ended end with UNAVAILABLE."""
        with self._lock:
            self._draining = self._stopping = True
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error = unavailable(Reason.DRAINING, "the worker stops", 1.0)
        self._end_later(list(self._rows), error)
        self._end_rows()
        self._residency.close(error)

    # Computing: the engine's thread, or a test's.

    def step(self) -> bool:
        """Schedules, runs and postprocesses one batch; False if there was nothing to do."""
        started = self._clock.monotonic()
        ended = self._end_rows()
        with self._lock:
            plan = self._scheduler.plan()
            unloads, staging = self._residency.take_staging()
            misfits = self._scheduler.take_misfits()
        for misfit in misfits:
            self._end(misfit, prompt_too_long(misfit.request, misfit.virtual, self.max_context_tokens))
        staged = bool(unloads or staging)
        if staged:
            plan = self._stage(plan, unloads, staging)
        if plan.rows:
            self._run(plan)
        for advance in plan.advances:
            self._advance(advance)
        worked = bool(plan.rows or plan.advances)
        if worked:
            with self._lock:
                self._pace.note(plan.tokens, self._clock.monotonic() - started)
        if ended or staged or worked or misfits:
            self._on_change()
            return True
        return False

    def _loop(self) -> None:
        if self._base.device.index is not None:
            # A thread starts on the first card, and kernels go where the thread is.
            torch.cuda.set_device(self._base.device)
        while True:
            with self._lock:
                if self._stopping:
                    return
                heard = self._lock.rings
            try:
                worked = self.step()
            except Exception as error:  # noqa: BLE001 (the top of the thread: no request may be left hanging)
                self._fail_all(error)
                continue
            if worked:
                continue
            with self._lock:
                if self._lock.rings == heard and not (self._stopping or self._endings):
                    self._lock.wait(self._deadlines.seconds_left(self._now_ns(), _IDLE_SECONDS))

    def _stage(self, plan: StepPlan, unloads: Sequence[int], staging: Sequence[Staging]) -> StepPlan:
        """Fills the slots that the plan needs; rows whose adapter can't be staged fail and leave the plan."""
        failed = self._residency.stage(unloads, staging)
        for digest, error in failed:
            with self._lock:
                rows = [row for row in self._rows.values() if row.digest == digest]
            for row in rows:
                self._end(row, error)
            with self._lock:
                self._residency.stage_failed(digest, error)
        return plan.without_ended() if failed else plan

    def _run(self, plan: StepPlan) -> None:
        self._note_scheduled(plan.rows)
        try:
            result = self._runner.run(plan, self._blocks.take_dirty())
        except Exception as error:  # noqa: BLE001 (the top of the step: one bad batch must not end all others)
            self._fail_step(plan.rows, error)
            return
        self._failures = 0
        sampled = [row.sequence for row in plan.rows if row.samples]
        with self._lock:
            self._scheduler.book(plan.rows)
            self._residency.note_arrivals()
        self._hand_out(sampled, result)

    def _advance(self, advance: Advance) -> None:
        """Computes the layers that have come of an early prefill; the other rows of the step are done."""
        rows, started_ns = advance.early.rows, self._note_scheduled(advance.early.rows)
        try:
            result = self._runner.advance(advance, self._blocks.take_dirty())
        except Exception as error:  # noqa: BLE001 (as above)
            self._fail_step(rows, error)
            return
        self._failures = 0
        sampled = [row.sequence for row in rows if row.samples] if advance.finishes else []
        now = self._now_ns()
        with self._lock:
            for row in rows:
                row.sequence.timeline.note_overlap(started_ns, now)
            self._scheduler.book_advance(advance)
            self._residency.note_arrivals()
        self._hand_out(sampled, result)

    def _note_scheduled(self, rows: Sequence[PlanRow]) -> int:
        """Notes when the first tokens of these rows begin to be computed; gives the time."""
        now = self._now_ns()
        for row in rows:
            if row.sequence.timeline.scheduled_ns == 0:
                row.sequence.timeline.scheduled_ns = now
        return now

    def _hand_out(self, sampled: Sequence[Row], result: StepResult) -> None:
        """Tells the listeners what the step says of prompts, then the new tokens."""
        for scored in result.scored:
            scored.sequence.listener.on_prompt(scored.logprobs)
        now = self._now_ns()
        for sequence, one in zip(sampled, result.drawn, strict=True):
            if sequence.timeline.first_token_ns == 0:
                sequence.timeline.first_token_ns = now
            ending = take_token(sequence, one, self._base.eos_ids)
            if ending is not None:
                self._finish(sequence, ending)

    def _finish(self, row: Row, ending: Ending) -> None:
        row.timeline.finished_ns = self._now_ns()
        self._release(row)
        row.listener.on_finish(row.outcome(ending.reason))

    def _fail_step(self, rows: Sequence[PlanRow], error: Exception) -> None:
        self._failures += 1
        log.error("a step failed", exc_info=error, extra={"rows": len(rows), "failures": self._failures})
        reported = (
            error
            if isinstance(error, MeshError)
            else MeshError(Code.INTERNAL, Reason.INTERNAL, f"the step failed: {error}")
        )
        for row in rows:
            self._end(row.sequence, reported)

    def _fail_all(self, error: Exception) -> None:
        self._failures += 1
        log.error("the engine failed between steps", exc_info=error, extra={"failures": self._failures})
        for row in list(self._rows.values()):
            self._end(row, MeshError(Code.INTERNAL, Reason.INTERNAL, f"the engine failed: {error}"))

    # Ending requests.

    def _on_adapter_failed(self, request_ids: Sequence[str], error: MeshError) -> None:
        self._end_later(request_ids, error)

    def _end_later(self, request_ids: Sequence[str], error: MeshError) -> None:
        with self._lock:
            self._endings.extend((request_id, error) for request_id in request_ids)
            self._lock.notify_all()

    def _end_rows(self) -> bool:
        """Ends the requests that were cancelled, whose adapter failed or whose deadline passed."""
        with self._lock:
            endings, self._endings = self._endings, []
            for late in self._deadlines.take_expired(self._now_ns()):
                endings.append((late.request.request_id, deadline_exceeded(late.request)))
        for request_id, error in endings:
            row = self._rows.get(request_id)
            if row is not None:
                self._end(row, error)
        return bool(endings)

    def _end(self, row: Row, error: MeshError) -> None:
        if row.state is SequenceState.ENDED:
            return
        self._release(row)
        row.listener.on_error(error)

    def _release(self, row: Row) -> None:
        """Frees all that a request holds: its row, its blocks, its slot use, its wait."""
        with self._lock:
            self._scheduler.end(row)
            self._residency.drop(row.request.request_id)
            del self._rows[row.request.request_id]
            self._lock.notify_all()

    # Admission.

    def _check_open(self, request: Request) -> None:
        if self._draining:
            raise unavailable(Reason.DRAINING, "the worker takes no new requests", 1.0)
        if request.request_id in self._rows:
            raise invalid_field("request_id", f"{request.request_id!r} is already running")
        if 0 < request.deadline_ns <= self._now_ns():
            raise deadline_exceeded(request)
        waiting = len(self._scheduler.waiting)
        if waiting >= self._config.max_waiting:
            raise MeshError(
                Code.RESOURCE_EXHAUSTED,
                Reason.OVERLOADED,
                f"{waiting} requests are waiting",
                metadata={"waiting": str(waiting)},
                retry_after=self._pace.seconds_for(self._scheduler.waiting.tokens),
            )

    def _make_row(self, request: Request, listener: Listener, timeline: Timeline) -> Row:
        self._arrivals += 1
        sampling = request.sampling
        return Row(
            request=request,
            listener=listener,
            tokens=list(request.prompt_ids),
            limit=min(len(request.prompt_ids) + sampling.max_tokens, self.max_context_tokens),
            seed=self._draw_seed() if sampling.seed is None else sampling.seed,
            text=TextStream(self._base.decode, sampling.stop),
            timeline=timeline,
            arrival=self._arrivals,
            history=make_history(sampling, request.prompt_ids),
            context=self.max_context_tokens,
        )

    def _now_ns(self) -> int:
        return int(self._clock.wall() * 1e9)
