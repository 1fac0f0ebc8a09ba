import asyncio

import pytest

from adaptermesh.core.errors import MeshError, Reason
from adaptermesh.gateway.gate import Gate


async def test_a_full_gate_refuses_and_a_free_place_is_taken_again() -> None:
    gate = Gate(1)
    with gate.enter(), pytest.raises(MeshError) as caught, gate.enter():
        pass
    assert caught.value.reason is Reason.OVERLOADED
    assert caught.value.retry_after
    with gate.enter():
        assert gate.inside == 1


async def test_a_closed_gate_refuses_and_empties() -> None:
    gate = Gate(2)
    with gate.enter():
        gate.close()
        with pytest.raises(MeshError) as caught, gate.enter():
            pass
        assert caught.value.reason is Reason.DRAINING
        waiting = asyncio.create_task(gate.wait_empty())
        await asyncio.sleep(0)
        assert not waiting.done()
    await waiting


async def test_a_place_is_given_back_when_the_request_fails() -> None:
    gate = Gate(1)
    with pytest.raises(ValueError, match="x"), gate.enter():
        raise ValueError("x")
    assert gate.inside == 0
