"""A server that speaks as much of SGLang's HTTP interface as benchmarks need, with made-up answers.

A tiered one (``--psa-device-pool-bytes``) has counters; with ``--psa-placement even`` it answers
wrongly, with ``--psa-placement lru`` it does not start, with ``--psa-host-path`` it refuses every
second streamed request.
"""

import asyncio
import json
import sys

from aiohttp import web

FRAME = 1000


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else ""


class Fake:
    def __init__(self) -> None:
        self.asked = self.steps = 0
        self.running: dict[str, bool] = {}
        self.wrong = option("--psa-placement") == "even"

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked += 1
        if option("--psa-host-path") and "rid" in body and self.asked % 2:
            return web.json_response({"error": {"message": "no room"}}, status=503)
        rid = body.get("rid", str(self.asked))
        self.running[rid] = True
        ids, new = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        answer = [(sum(ids) + n) % 97 + self.wrong for n in range(new)]
        meta = {"cached_tokens": 16, "num_retractions": 0}
        try:
            if not body.get("stream"):
                return web.json_response({"output_ids": answer, "meta_info": meta})
            response = web.StreamResponse()
            await response.prepare(request)
            for count in range(1, new + 1):
                await asyncio.sleep(0.002)
                self.steps += 1
                if not self.running[rid]:
                    break
                event = {"output_ids": answer[:count], "meta_info": meta}
                await response.write(f"data: {json.dumps(event)}\n\n".encode())
            await response.write(b"data: [DONE]\n\n")
            return response
        except ConnectionResetError:
            return response
        finally:
            del self.running[rid]

    async def abort(self, request: web.Request) -> web.Response:
        rid = (await request.json())["rid"]
        if rid in self.running:
            self.running[rid] = False
        return web.Response()

    async def loads(self, request: web.Request) -> web.Response:
        load = {"num_running_reqs": len(self.running), "num_waiting_reqs": 0, "num_used_tokens": 0}
        return web.json_response({"loads": [load]})

    async def stats(self, request: web.Request) -> web.Response:
        if not option("--psa-device-pool-bytes"):
            return web.json_response({"memory": None})
        memory = {
            "frame_bytes": FRAME,
            "record_bytes": FRAME,
            "num_frames": 8,
            "hits": 9 * self.steps,
            "misses": self.steps,
            "loads": 2 * self.steps,
            "bytes_loaded": 2 * FRAME * self.steps,
            "bytes_saved": 0,
            "bytes_in_vain": FRAME * self.steps,
            "evictions": 0,
            "frames_by_layer": [5, 3],
            "history": {"steps": [4, 8], "frames": [[4, 4], [5, 3]]},
        }
        return web.json_response({"memory": memory})

    async def check(self, request: web.Request) -> web.Response:
        found = ["frame 3: no owner"] if self.wrong else []
        return web.json_response({"problems": found})


async def good(request: web.Request) -> web.Response:
    return web.Response()


def main() -> None:
    if option("--psa-placement") == "lru":
        sys.exit("no such placement")
    fake, app = Fake(), web.Application()
    app.router.add_post("/generate", fake.generate)
    app.router.add_post("/abort_request", fake.abort)
    app.router.add_post("/flush_cache", good)
    app.router.add_get("/health", good)
    app.router.add_get("/v1/loads", fake.loads)
    app.router.add_get("/psa/stats", fake.stats)
    app.router.add_get("/psa/memory/check", fake.check)
    web.run_app(app, host="127.0.0.1", port=int(option("--port")), print=None)


if __name__ == "__main__":
    main()
