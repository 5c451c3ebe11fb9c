"""Load tests of a server, over loopback: what is sent, what is counted, what a failure is."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("aiohttp")

from fake_server import FakeServer, fake_server
from helpers import environment

from moegen import cli
from moegen.errors import MeasureError
from moegen.serve_bench import Load, LoadRequest, Objective, ServerTarget, openai_api, serve_bench


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """One of the test's own: what other tests left hanging is not counted."""
    with fake_server() as running:
        yield running


def _measured(server: FakeServer, model: str | None = "good", load: Load | None = None, **fields: Any) -> dict[str, Any]:
    sent = load or Load(rate_per_s=200.0, requests=6, prompt="5", output="4")
    target = ServerTarget(server.url, model, **{"timeout_s": 60.0, **fields})
    return serve_bench(target, LoadRequest(sent, warmup=0, objective=Objective(e2e_s=1e6)))


def _summary(document: dict[str, Any]) -> dict[str, Any]:
    (entry,) = document["contenders"]
    assert entry["status"] == "measured"
    return entry["summary"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_what_is_sent_and_counted(server: FakeServer, endpoint: str) -> None:
    load = Load(rate_per_s=300.0, requests=20, prompt="3-9", output="2-5", seed=3)
    document = _measured(server, load=load, endpoint=endpoint, api_key="secret", extra_body={"ignore_eos": True})
    planned, asked = list(load.planned()), server.asked
    assert sorted(body["max_tokens"] for body in asked) == sorted(p.output_tokens for p in planned)
    assert all(body["ignore_eos"] and body["stream"] and body["key"] == "Bearer secret" for body in asked)
    assert {body["path"] for body in asked} == {"/v1/chat/completions" if endpoint == "chat" else "/v1/completions"}
    texts = [body["prompt"] if endpoint == "completions" else body["messages"][0]["content"] for body in asked]
    assert len(set(texts)) == 20, "every prompt is its own"
    summary = _summary(document)
    assert summary["succeeded"] == 20
    assert summary["success_rate"] == summary["goodput"]["share"] == 1.0
    assert summary["output_tokens"] == sum(p.output_tokens for p in planned)
    assert summary["prompt_tokens"] == sum(p.prompt_tokens + 3 for p in planned), "as the server counted them"
    assert summary["latency"]["itl"]["count"] == sum(p.output_tokens - 1 for p in planned)
    assert [r["due_s"] for r in document["contenders"][0]["turns"][0]["requests"]] == [p.at_s for p in planned]
    for found in document["contenders"][0]["turns"][0]["requests"]:
        assert found["due_s"] <= found["started_s"] < found["first_token_s"] <= found["ended_s"]
    assert "secret" not in json.dumps(document)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("failing", "HTTP 503"),
        ("html", "broken stream"),
        ("dead", "no connection"),
        ("empty", "no tokens"),
        ("broken", "broken stream"),
        ("truncated", "broken stream"),
        ("garbage", "malformed reply"),
        ("error", "error in the stream"),
    ],
)
def test_failures_are_counted_by_kind(server: FakeServer, model: str, kind: str) -> None:
    summary = _summary(_measured(server, model))
    assert (summary["failed"], summary["succeeded"], summary["success_rate"]) == (6, 0, 0.0)
    (found,) = summary["failures"]
    assert (found["kind"], found["count"]) == (kind, 6)
    assert found["example"]
    assert set(summary["latency"].values()) == {None}


def test_a_request_that_hangs_is_a_timeout(server: FakeServer) -> None:
    summary = _summary(_measured(server, "hanging", Load(concurrency=2, requests=2, output="3"), timeout_s=0.3))
    assert summary["failures"] == [{"kind": "timeout", "count": 2, "example": "no end within 0.3 s"}]


def test_no_server_at_all() -> None:
    target = ServerTarget("http://127.0.0.1:9/v1", "any")
    summary = _summary(serve_bench(target, LoadRequest(Load(rate_per_s=100.0, requests=3))))
    assert [(f["kind"], f["count"]) for f in summary["failures"]] == [("no connection", 3)]


def test_some_failures_leave_the_others(server: FakeServer) -> None:
    document = _measured(server, "flaky", Load(concurrency=1, requests=10, prompt="5", output="3"))
    summary = _summary(document)
    assert (summary["succeeded"], summary["failed"], summary["success_rate"]) == (5, 5, 0.5)
    assert summary["latency"]["e2e"]["count"] == 5
    assert any("the 5 requests that succeeded" in note for note in document["notes"])


def test_tokens_that_the_server_does_not_count(server: FakeServer) -> None:
    document = _measured(server, "silent")
    assert _summary(document)["output_tokens"] == 24
    assert any("did not count the tokens" in note for note in document["notes"])


def test_an_open_loop_does_not_wait_for_answers(server: FakeServer) -> None:
    """A server that takes half a second for an answer has all requests before it gave the first."""
    document = _measured(server, "slow", Load(rate_per_s=400.0, requests=12, prompt="2", output="3"))
    assert server.most_under_way > 6
    assert _summary(document)["succeeded"] == 12


def test_waiting_for_room_counts(server: FakeServer) -> None:
    load = Load(rate_per_s=1000.0, concurrency=1, requests=4, prompt="2", output="2")
    document = _measured(server, "slow", load)
    assert server.most_under_way == 1
    requests = document["contenders"][0]["turns"][0]["requests"]
    assert all(later["started_s"] >= earlier["ended_s"] for earlier, later in itertools.pairwise(requests))
    assert [r["due_s"] for r in requests] == [p.at_s for p in load.planned()]
    assert _summary(document)["latency"]["e2e"]["max"] > 4 * 2 * 0.2 - 0.1, "the last one waited for all others"


def test_a_closed_loop_has_so_many_clients(server: FakeServer) -> None:
    server.together = 3
    document = _measured(server, load=Load(concurrency=3, requests=15, prompt="2", output="2"))
    assert server.most_under_way == 3
    assert _summary(document)["succeeded"] == 15
    assert _summary(document)["most_in_flight"] == 3


def test_the_warm_up_is_not_counted(server: FakeServer) -> None:
    load = Load(concurrency=1, requests=3, prompt="2", output="2")
    document = serve_bench(ServerTarget(server.url, "good"), LoadRequest(load, warmup=2, rounds=2))
    assert len(server.asked) == 2 + 2 * 3
    assert _summary(document)["requests"] == 6
    assert len(document["contenders"][0]["turns"]) == 2


def test_the_only_model_is_found(server: FakeServer) -> None:
    assert _measured(server, None)["target"]["model"] == "good"
    server.models = ["one", "two"]
    with pytest.raises(MeasureError, match=r"has 2 models \(one, two\): name one"):
        _measured(server, None)
    with pytest.raises(MeasureError, match=r"^http://127.0.0.1:9/v1 does not say which models"):
        serve_bench(ServerTarget("http://me:hush@127.0.0.1:9/v1"), LoadRequest(Load(concurrency=1, requests=1)))


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://x/v1", "http://", "http://[::1"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(MeasureError, match="url="):
        serve_bench(ServerTarget(url, "any"), LoadRequest(Load(concurrency=1, requests=1)))


def test_a_password_in_the_address_is_not_kept(server: FakeServer) -> None:
    target = ServerTarget(server.url.replace("http://", "http://me:hush@"), "good")
    document = serve_bench(target, LoadRequest(Load(concurrency=1, requests=1, output="2"), warmup=0))
    assert _summary(document)["succeeded"] == 1
    assert "hush" not in json.dumps(document)
    assert server.asked[0]["key"] == f"Basic {base64.b64encode(b'me:hush').decode()}"
    with pytest.raises(MeasureError, match="give an api_key, or a user in url, not both"):
        serve_bench(dataclasses.replace(target, api_key="secret"), LoadRequest(Load(concurrency=1, requests=1)))


def test_what_stands_behind_the_address_is_sent_with_each_request(server: FakeServer) -> None:
    target = ServerTarget(f"{server.url}/?version=3", "good")
    document = serve_bench(target, LoadRequest(Load(concurrency=1, requests=1, output="2"), warmup=0))
    assert server.asked[0]["path"] == "/v1/chat/completions?version=3"
    assert document["target"]["url"] == f"{server.url}/"


def test_connections_are_kept(server: FakeServer) -> None:
    assert _summary(_measured(server, load=Load(concurrency=2, requests=20, output="2")))["succeeded"] == 20
    assert server.connections <= 2


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_in_any_parts(end: bytes, size: int) -> None:
    lines = ['data: {"a": 1}', "", ": a comment", "event: x", "data:two", "data:  lines", "", "", "data: \u00e9", ""]
    lines.append("data: never ended")
    sent, events = end.join(line.encode() for line in lines), openai_api.Events()
    found = [event for at in range(0, len(sent), size) for event in events.take(sent[at : at + size])]
    assert found == ['{"a": 1}', "two\n lines", "\u00e9"]


def test_the_command(server: FakeServer, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    files = ["--json", str(tmp_path / "a.json"), "--picture", str(tmp_path / "a.png")]
    sent = ["serve-bench", "--url", server.url, "--model", "failing", "--rate", "200", "--requests", "8", "--warmup", "0"]
    done = CliRunner().invoke(cli.main, [*sent, *files])
    assert done.exit_code == 1
    assert "none of 8 requests succeeded: 8 x HTTP 503" in done.output
    assert json.loads((tmp_path / "a.json").read_text())["contenders"][0]["summary"]["failed"] == 8
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupt_keeps_what_was_measured(server: FakeServer, tmp_path: pathlib.Path) -> None:
    """Those that are under way then, the last of which takes 0.6 s, have not failed."""
    sent = ["--model", "slow", "--rate", "50", "--duration", "3600", "--output", "3", "--json", str(tmp_path / "a.json")]
    command = [sys.executable, "-m", "moegen.cli", "serve-bench", "--url", server.url, *sent]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while len(server.asked) < 60 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        try:
            said, complained = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, complained
    assert "Interrupted." in complained
    assert "Traceback" not in complained
    document = json.loads((tmp_path / "a.json").read_text())
    assert document["interrupted"]
    summary = document["contenders"][0]["summary"]
    assert summary["failed"] == 0
    assert summary["succeeded"] > 10
    assert summary["requests"] > summary["succeeded"]
    assert re.search(r"note: interrupted", said)
