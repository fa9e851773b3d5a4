"""The load generator against a scripted server: what is counted, what is bounded, what is printed."""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lmdserve.clients import bench
from lmdserve.clients.bench_run import LevelResult, Outcome, Record, calibrate, run_level, warm_up
from lmdserve.clients.bench_workload import BenchOptions, Calibration, PlannedRequest, calibration_prompts
from lmdserve.clients.http import AsyncClient
from lmdserve.clients.wire import ClientError, Usage

PAYLOAD = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def client(fake_server: Any) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(fake_server.url) as connected:
        yield connected


async def run(client: AsyncClient, requests: list[PlannedRequest], concurrency: int, **changes: Any) -> LevelResult:
    return await run_level(client, BenchOptions(model="demo", **changes), requests, concurrency=concurrency)


def content(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}]}


def test_a_record_takes_time_from_tokens_and_counts_from_the_server() -> None:
    record = Record(started_s=1.0)
    record.add({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}, 1.5)
    assert record.first_token_s is None
    record.add(content("a"), 2.0)
    record.add({"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0}]}}]}, 2.25)
    record.add({"choices": [{"index": 0, "text": "b", "finish_reason": None}]}, 3.0)
    record.add(content("", "stop"), 3.5)
    record.add({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 9}}, 4.0)
    assert (record.first_token_s, record.last_token_s, record.ended_s) == (2.0, 3.0, 3.5)
    assert record.gaps_s == [0.25, 0.75]
    assert record.num_chunks == 3
    assert record.usage == Usage(5, 9)


def test_tokens_without_text_leave_the_first_token_unknown() -> None:
    record = Record(started_s=1.0)
    record.add(content(""), 2.0)
    record.add(content("", "stop"), 3.0)
    assert (record.first_token_s, record.ended_s, record.gaps_s, record.num_chunks) == (None, 3.0, [], 0)


async def test_successes_and_failures_are_told_apart(client: AsyncClient, fake_server: Any) -> None:
    fake_server.refuse(429, {"message": "queue full"})
    fake_server.stream([content("a")], ends="break")
    fake_server.stream([content("a"), content("", "stop")])  # no counts
    fake_server.stream([content("a"), {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}])  # no end
    fake_server.stream([{"nonsense": 1}])
    fake_server.say("a", "b", num_tokens=5)
    result = await run(client, [PlannedRequest(PAYLOAD)] * 7, 1)
    assert [record.outcome for record in result.records] == [Outcome.FAILURE] * 5 + [Outcome.SUCCESS] * 2
    errors = [str(record.error) for record in result.records[:5]]
    for error, expected in zip(
        errors,
        ["queue full", "before it was complete", "no token counts", "no finish_reason", "no `choices`"],
        strict=True,
    ):
        assert expected in error
    assert result.records[5].usage == Usage(11, 5, 4)
    assert len(result.records[5].gaps_s) == 1
    assert result.num_not_sent == 0


async def test_no_more_requests_run_at_once_than_wanted(client: AsyncClient, fake_server: Any) -> None:
    fake_server.stream([content("a"), content("b", "stop"), usage()], pause_s=0.02)
    result = await run(client, [PlannedRequest(PAYLOAD)] * 12, 4)
    assert [record.outcome for record in result.records] == [Outcome.SUCCESS] * 12
    assert fake_server.most_running == 4


def usage() -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}


async def test_clients_leave_when_planned_and_the_server_knows(client: AsyncClient, fake_server: Any) -> None:
    fake_server.stream([content("a")] * 3, ends="hang")
    result = await run(client, [PlannedRequest(PAYLOAD, leave_after_chunks=2)] * 5, 5)
    assert [(record.outcome, record.num_chunks) for record in result.records] == [(Outcome.LEFT, 2)] * 5
    async with asyncio.timeout(5):
        while fake_server.num_disconnects < 5:
            await asyncio.sleep(0.01)


async def test_a_client_that_was_to_leave_after_the_end_is_a_success(client: AsyncClient, fake_server: Any) -> None:
    fake_server.say("a")
    result = await run(client, [PlannedRequest(PAYLOAD, leave_after_chunks=9)], 1)
    assert [record.outcome for record in result.records] == [Outcome.SUCCESS]


async def test_requests_wait_for_their_arrival(client: AsyncClient, fake_server: Any) -> None:
    fake_server.say("a")
    requests = [PlannedRequest(PAYLOAD, arrival_s=arrival_s) for arrival_s in (0.0, 0.15, 0.3)]
    result = await run(client, requests, 3)
    starts = sorted(record.started_s for record in result.records)
    assert starts[1] - starts[0] >= 0.14
    assert starts[2] - starts[0] >= 0.29


async def test_a_level_ends_in_time(client: AsyncClient, fake_server: Any) -> None:
    fake_server.stream([content("a")], ends="hang")
    started_s = time.perf_counter()
    late = PlannedRequest(PAYLOAD, arrival_s=1000.0)
    result = await run(client, [*[PlannedRequest(PAYLOAD)] * 5, late], 2, max_duration_s=0.3)
    assert time.perf_counter() - started_s < 10
    assert [str(record.error)[:12] for record in result.records] == ["not finished"] * 2
    assert result.num_not_sent == 4


async def test_a_request_ends_in_time(client: AsyncClient, fake_server: Any) -> None:
    fake_server.stream([content("a")], ends="hang")
    fake_server.say("a")
    result = await run(client, [PlannedRequest(PAYLOAD)] * 2, 1, request_timeout_s=0.5)
    assert [record.error for record in result.records] == ["not finished after 0.5 s", None]


async def test_calibration_asks_for_two_prompts_of_one_token(client: AsyncClient, fake_server: Any) -> None:
    num_words = len(calibration_prompts()[0][1].split())
    for num_tokens in (10 + 1.5 * num_words, 10 + 3 * num_words):
        counts = {"prompt_tokens": num_tokens, "completion_tokens": 1}
        fake_server.stream([content("a", "length"), {"choices": [], "usage": counts}])
    assert await calibrate(client, BenchOptions(model="demo")) == Calibration(10.0, 1.5)
    assert [body["max_tokens"] for body in fake_server.bodies] == [1, 1]
    texts = [body["messages"][0]["content"] for body in fake_server.bodies]
    assert texts[1] == f"{texts[0]} {texts[0]}"
    assert len(set(texts[0].split())) == num_words > 90


async def test_a_warm_up_that_fails_ends_the_benchmark(client: AsyncClient, fake_server: Any) -> None:
    fake_server.refuse(500, {"message": "out of order"})
    with pytest.raises(ClientError, match="warm-up request failed: HTTP 500: out of order"):
        await warm_up(client, BenchOptions(model="demo"), [PlannedRequest(PAYLOAD)])


async def in_a_process(*arguments: str) -> tuple[int, str, str]:
    """Run the command beside the scripted server's event loop."""
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "lmdserve.clients.bench", *arguments],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, out.decode(), errors.decode()


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt": "two", "max_tokens": 3}\n')
    return path


async def test_the_command_prints_a_table_for_each_level_and_a_comparison(fake_server: Any, dataset: Path) -> None:
    fake_server.say("a", "b", "c")
    status, out, errors = await in_a_process(
        fake_server.url, "--dataset", str(dataset), "--concurrency", "1,3", "--num-prompts", "6"
    )
    assert status == 0
    assert out.count("Serving Benchmark Result") == 2
    assert out.count("Total generated tokens:                  18") == 2
    assert out.count("Successful requests:                     6") == 2
    assert [line.split()[:3] for line in out.splitlines()[-2:]] == [["1", "6", "0"], ["3", "6", "0"]]
    assert errors == "bench: 6 requests, 1 at once ...\nbench: 6 requests, 3 at once ...\n"
    assert len(fake_server.bodies) == 13  # with one to warm up


async def test_json_goes_where_it_was_sent(fake_server: Any, dataset: Path, tmp_path: Path) -> None:
    fake_server.say("a", "b", "c")
    arguments = [fake_server.url, "--dataset", str(dataset), "--num-prompts", "2", "--num-warmups", "0", "--json"]
    status, out, _ = await in_a_process(*arguments, "-")
    assert status == 0
    printed = json.loads(out)
    assert printed["settings"]["model"] == "demo"
    assert [level["successful_requests"] for level in printed["levels"]] == [2]
    status, out, _ = await in_a_process(*arguments, str(tmp_path / "result.json"))
    assert "Serving Benchmark Result" in out
    assert json.loads((tmp_path / "result.json").read_text())["levels"][0]["total_generated_tokens"] == 6
    status, _, errors = await in_a_process(*arguments, str(tmp_path / "missing" / "x"))
    assert (status, "cannot write" in errors) == (1, True)


async def test_a_failed_request_is_status_1_with_its_reason(fake_server: Any, dataset: Path) -> None:
    fake_server.say("a")
    fake_server.refuse(429, {"message": "queue full"})
    status, out, errors = await in_a_process(fake_server.url, "--dataset", str(dataset), "--num-prompts", "3")
    assert status == 1
    assert "Failed requests:                         3" in out
    assert "bench: 3 failed: HTTP 429: queue full" in errors


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--concurrency", "1,0"], "'0' is not a whole number from 1 to 10000"),
        (["--concurrency", "20000"], "'20000' is not a whole number"),
        (["--num-prompts", "x"], "'x' is not a whole number from 1 to 1000000"),
        (["--disconnect-share", "1.5"], "'1.5' is not a number from 0 to 1"),
        (["--request-rate", "nan"], "'nan' is not a number"),
        (["--temperature", "-1"], "'-1' is not a number from 0 to 2"),
        (["--endpoint", "embeddings"], "invalid choice: 'embeddings'"),
    ],
)
def test_a_wrong_option_is_explained(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        bench.main(arguments)
    assert left.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["127.0.0.1:1"], "cannot connect to http://127.0.0.1:1"), (["ftp://x"], "is not the address of an HTTP server")],
)
def test_nobody_there_is_one_sentence_and_status_1(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bench: error: ")
    assert expected in captured.err
