"""`adaptermesh generate`."""

import sys
from typing import Annotated

import typer
from rich.table import Table

from adaptermesh.cli.connections import mesh_client
from adaptermesh.cli.execute import execute
from adaptermesh.cli.options import GatewayOption, JsonOption
from adaptermesh.cli.output import Output
from adaptermesh.cli.tables import facts, milliseconds, short_digest, size
from adaptermesh.client import (
    Ask,
    ChoiceFinished,
    Delta,
    Event,
    Finished,
    Generation,
    Prompt,
    PromptLogprobs,
    SamplingParams,
    Started,
)

_EVENTS: dict[type[Event], str] = {
    Started: "started",
    PromptLogprobs: "prompt_logprobs",
    Delta: "delta",
    ChoiceFinished: "choice_finished",
    Finished: "finished",
}


def generate(
    text: Annotated[str, typer.Argument(help="What to say; '-' reads standard input.")],
    task: Annotated[str, typer.Option(help="The task, which selects a route.")] = "",
    adapter: Annotated[
        str,
        typer.Option(
            metavar="REF",
            help="An adapter, 'base', or several: 'stack(a/b:v1, 0.5*a/c@prod)', 'average(...)', "
            "'fuse(a/fusion, a/b:v1, a/c:v1)'; overrides the task.",
        ),
    ] = "",
    chat: Annotated[bool, typer.Option("--chat/--raw", help="With the chat template, or as it is.")] = True,
    system: Annotated[str, typer.Option(help="A system message before the text.")] = "",
    base: Annotated[str, typer.Option(help="Refuse any other base model than this name or digest.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Upper bound on generated tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus, (0, 1].")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed draws the same tokens.")] = None,
    min_p: Annotated[
        float, typer.Option(help="Keep tokens of this share of the likeliest one's probability; 0 keeps all.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 discourages tokens of the prompt and the output.")
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option(help="Above 0 discourages tokens of the output, [-2, 2].")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(help="Above 0 discourages frequent tokens of the output, [-2, 2].")
    ] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(help="End with this token; may be repeated.")
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(help="With --json: log probabilities of each token and of this many likeliest ones."),
    ] = None,
    prompt_logprobs: Annotated[
        int | None,
        typer.Option(help="With --json: the same for each token of the prompt but the first."),
    ] = None,
    n: Annotated[int, typer.Option(help="Answers to the same text, [1, 8].")] = 1,
    priority: Annotated[int, typer.Option(help="Higher goes first, [-100, 100].")] = 0,
    tenant: Annotated[str, typer.Option(help="Whose request it is, where no keys are configured.")] = "",
    cohort_key: Annotated[str, typer.Option(help="Keeps a user or session on one share of a route.")] = "",
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds until all of it must be there.")] = 300.0,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what served the request.")] = False,
    gateway: GatewayOption = "",
    as_json: JsonOption = False,
) -> None:
    """Generates text and prints it as it comes.

    Name a task, an adapter, or neither for the bare base model. With --json each event is one line.

    Examples:
    adaptermesh generate --task financial-ner 'ACME buys Initech for $2bn.'

    adaptermesh generate --adapter acme/ner:v2 -v 'ACME buys Initech.'

    adaptermesh generate --adapter 'average(acme/ner:v2, 0.5*acme/ner:v1)' 'ACME buys Initech.'
    """
    if system and not chat:
        raise typer.BadParameter("--system needs --chat")
    if (logprobs is not None or prompt_logprobs is not None) and not as_json:
        raise typer.BadParameter("--logprobs and --prompt-logprobs need --json")
    content = sys.stdin.read() if text == "-" else text
    prompt = Prompt.chat(content, system=system) if chat else Prompt.raw(content)
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop_token_ids=tuple(stop_token_id or ()),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )

    async def work(output: Output) -> None:
        asked = Ask(tenant or output.settings.tenant, cohort_key, base, priority=priority)
        async with mesh_client(output, gateway) as client:
            stream = client.generate(
                prompt, task=task, adapter=adapter, sampling=sampling, n=n, ask=asked, timeout=timeout
            )
            async with stream:
                show = output.as_json or n == 1
                answer = await stream.collect(lambda event: print_event(output, event) if show else None)
        if not output.as_json:
            output.text("\n" if n == 1 else numbered(answer))
        if verbose:
            output.note(served_by(answer))

    execute(as_json, work)


def print_event(output: Output, event: Event) -> None:
    """Text as it comes, or each event as one line of JSON."""
    if not output.as_json:
        if isinstance(event, Delta):
            output.text(event.text)
        return
    output.line({"event": _EVENTS[type(event)], **event_fields(event)})


def numbered(answer: Generation) -> str:
    """Several answers, one after the other: they come all at once and can't be shown as they come."""
    return "".join(f"[{index}] {choice.text}\n" for index, choice in enumerate(answer.choices))


def event_fields(event: Event) -> dict[str, object]:
    """An event's fields, by name."""
    return {name: getattr(event, name) for name in event.__dataclass_fields__}


def served_by(answer: Generation) -> Table:
    """What served a request and what the switch took."""
    started, timings = answer.started, answer.finished.timings
    fetched = f"fetch {milliseconds(timings.fetch)} ({size(timings.fetched_bytes)})"
    shared = ", shared with another request" if timings.shared_fetch else ""
    steps = [f"queue {milliseconds(timings.queue)}"]
    if timings.fetch:
        steps.append(f"{fetched}, of it verify {milliseconds(timings.verify)}{shared}")
    if timings.h2d:
        steps.append(f"h2d {milliseconds(timings.h2d)}")
    overlap = f", of it {milliseconds(timings.overlap)} during the fetch" if timings.overlap else ""
    steps += [f"prefill {milliseconds(timings.prefill)}{overlap}", f"decode {milliseconds(timings.decode)}"]
    reused = answer.finished.cached_tokens
    cached = f" ({reused} of them from the prefix cache)" if reused else ""
    route = f"{started.cohort or started.ref} (route change {started.route_generation})"
    return facts(
        served_by=f"{started.adapter_version} {short_digest(started.adapter_digest)}".strip(),
        warning="\n".join(started.warnings),
        ref=started.ref,
        route=route if started.route_generation else "",
        switch=f"{started.switch_kind.value}, from {started.tier}" if started.tier else "none",
        worker=started.worker_id,
        tokens=f"{answer.finished.prompt_tokens} in{cached}, {answer.finished.output_tokens} out, "
        f"ended by {answer.finished.finish_reason}",
        time_to_first_token=milliseconds(answer.ttft),
        total=milliseconds(answer.duration),
        steps=", ".join(steps),
        request=answer.request_id,
        trace=f"{answer.trace_id}  (adaptermesh trace show {answer.trace_id[:8]})" if answer.trace_id else "",
    )
