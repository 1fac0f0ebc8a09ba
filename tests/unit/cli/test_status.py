from tests.unit.cli.conftest import FakeMesh, Invoke, document


def test_status_shows_every_service_and_what_the_workers_hold(fakes: FakeMesh, invoke: Invoke) -> None:
    result = invoke("status")
    assert result.exit_code == 0, result.output
    for name in ("gateway", "router", "store", "worker"):
        assert fakes.addresses[name] in result.stdout
    assert "store: change feed at 30, kept from 11 on (2025-06-15" in result.stdout
    assert "4 versions, 3 routes, up to date" in result.stdout
    assert "1/0/0 of 4 slots, 100 B, 1 pinned" in " ".join(result.stdout.split())


def test_status_shows_what_each_budget_holds(fakes: FakeMesh, invoke: Invoke) -> None:
    shown = invoke("status").stdout
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    first = rows.index("worker holds used of share")
    assert rows[first + 1 : first + 5] == [
        "w-0 device 3.0 MiB 1 of 4 slots",
        "host 256.0 MiB 1.0 GiB 25%",
        "disk 5.0 MiB 10.0 MiB 50%",
        "kv cache 1.0 MiB 8.0 MiB 12% + 2.0 MiB cached",
    ]
    printed = document(invoke("status", "--json"))
    assert printed["workers"][0]["load"]["budgets"]["disk_budget_bytes"] == 10 * 2**20
    fakes.router.budgets = None
    assert "kv cache" not in invoke("status").stdout
    assert document(invoke("status", "--json"))["workers"][0]["load"]["budgets"] is None


def test_status_lists_adapters_with_what_they_take_beside_the_base(fakes: FakeMesh, invoke: Invoke) -> None:
    rows = [" ".join(line.split()) for line in invoke("status", "--adapters").stdout.splitlines()]
    first = rows.index("worker adapter tier requests memory of the base")
    assert rows[first + 1] == "w-0 aaaaaaaaaaaa device, pinned 0 250 B 2.50%"
    assert "of the base" not in invoke("status").stdout


def test_status_as_json_is_one_document(fakes: FakeMesh, invoke: Invoke) -> None:
    printed = document(invoke("status", "--json"))
    assert [service["serving"] for service in printed["services"]] == [True] * 4
    assert printed["workers"][0]["load"]["running_requests"] == 2
    assert printed["router"]["feed_connected"] is True
    assert (printed["feed"]["head_position"], printed["feed"]["trimmed_position"]) == (30, 10)


def test_a_service_that_does_not_answer_fails_the_status(fakes: FakeMesh, invoke: Invoke) -> None:
    result = invoke("status", "--store", "127.0.0.1:1")
    assert result.exit_code == 1
    assert "nothing answers at 127.0.0.1:1" in result.stdout


def test_without_a_mesh_the_status_says_how_to_start_one(invoke: Invoke) -> None:
    nowhere = ("--gateway", "127.0.0.1:1", "--router", "127.0.0.1:1", "--store", "127.0.0.1:1")
    result = invoke("status", *nowhere)
    assert result.exit_code == 1
    assert "start one with `adaptermesh up`" in result.stdout
