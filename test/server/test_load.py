"""Many requests at once."""

import asyncio
import time
from collections import Counter

import aiohttp
import pytest

from test.server.compare import assert_same
from test.server.process import Engine, Server, request
from test.server.prompts import Prompts

pytestmark = pytest.mark.server


def test_eight_long_requests_at_once(server: Server, uncached: Engine, prompts: Prompts) -> None:
    asked = [prompts.recall(2300 + 13 * n, seed=4000 + 10 * n).ids for n in range(8)]
    got = server.together(asked, max_new_tokens=12)
    assert_same(got, uncached.generate(asked, max_new_tokens=12))
    server.assert_no_leak()


def test_two_thousand_tiny_requests_at_once(server: Server) -> None:
    """Every one is answered, in bounded time, and the server goes on."""
    count, bound = 2000, 400.0

    async def one(session: aiohttp.ClientSession, number: int) -> tuple[int, int]:
        ids = [100 + number // 50, 100 + number % 50, 7]
        body = request(ids, max_new_tokens=1)
        async with session.post(server.url + "/generate", json=body) as response:
            answer = await response.json()
            if response.status != 200:
                assert answer["error"]["message"], answer
                return response.status, 0
            return response.status, len(answer["output_ids"])

    async def run() -> list[tuple[int, int]]:
        timeout = aiohttp.ClientTimeout(total=bound)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            return await asyncio.gather(*(one(session, number) for number in range(count)))

    begin = time.monotonic()
    answers = Counter(asyncio.run(run()))
    assert answers == {(200, 1): count}, f"after {time.monotonic() - begin:.0f} s"
    server.assert_no_leak()
