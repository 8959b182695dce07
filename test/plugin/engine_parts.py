"""SGLang's parts as far as the psa backend touches them: real pool and backend, stand-in runner."""

from types import SimpleNamespace

import torch
from sglang_psa import attention_backend, hooks, layers, state
from sglang_psa.kv_pool import PSAKVPool
from sglang_psa.tiered_pool import PSATieredKVPool

from sgl_psa.config import PSAConfig

LAYERS, QUERY_HEADS, KV_HEADS, DIM, PAGE = 2, 4, 2, 32, 8
SLOTS, CONTEXT, REQUESTS = 512, 256, 4


def make_pool(config=None, **changes):
    sizes = dict(
        dtype=torch.float32, head_num=KV_HEADS, head_dim=DIM, layer_num=LAYERS, page_size=PAGE
    )
    config = config or PSAConfig(backend="reference")
    kind = PSATieredKVPool if config.tiered else PSAKVPool
    return kind(
        SLOTS,
        **{**sizes, **changes},
        device="cpu",
        enable_memory_saver=False,
        psa_config=config,
    )


def make_layer(index=0, **changes):
    from sglang.srt.layers.radix_attention import RadixAttention

    arguments = dict(
        num_heads=QUERY_HEADS,
        head_dim=DIM,
        scaling=DIM**-0.5,
        num_kv_heads=KV_HEADS,
        layer_id=index,
    )
    return RadixAttention(**{**arguments, **changes})


def make_backend(monkeypatch, **settings):
    """A backend over a real pool; ``settings`` are fields of ``PSAConfig``."""
    config = PSAConfig(**{"backend": "reference", **settings})
    monkeypatch.setattr(hooks, "verify", lambda: None)
    monkeypatch.setattr(state, "_backend", None)
    args = SimpleNamespace(**{f"psa_{k}": v for k, v in config.as_dict().items()})
    runner = SimpleNamespace(
        token_to_kv_pool=make_pool(config),
        req_to_token_pool=SimpleNamespace(
            req_to_token=torch.zeros(REQUESTS, CONTEXT, dtype=torch.int32)
        ),
        model=torch.nn.ModuleList(make_layer(i) for i in range(LAYERS)),
        server_args=args,
    )
    return attention_backend.PSAAttentionBackend(runner)


class Mode:
    """The questions that the backend asks a forward mode."""

    def __init__(self, name):
        self.name = name

    def is_decode(self):
        return self.name == "decode"

    def is_idle(self):
        return self.name == "idle"


class Driver:
    """Feeds a backend like SGLang's scheduler: pages at random places, prefill and decode steps.

    It keeps each request's keys and values itself, so that :meth:`exact` is independent.
    """

    def __init__(self, backend, seed=0):
        self.backend = backend
        self.random = torch.Generator().manual_seed(seed)
        order = torch.randperm(SLOTS // PAGE, generator=self.random) + 1
        self.free_pages = order.tolist()
        self.kv = {}

    def rand(self, *shape):
        return torch.randn(*shape, generator=self.random)

    def _slots(self, request, start, stop):
        row = self.backend.req_to_token[request]
        for position in range(start, stop):
            if position % PAGE == 0:
                row[position] = self.free_pages.pop() * PAGE
            else:
                row[position] = row[position - 1] + 1
        return row[start:stop].long()

    def step(self, mode, news):
        """One forward pass; ``news`` is {request: new tokens}. Returns (out, exact) per layer."""
        old = {r: self.kv[r][0].shape[1] if r in self.kv else 0 for r in news}
        slots = torch.cat([self._slots(r, old[r], old[r] + n) for r, n in news.items()])
        batch = SimpleNamespace(
            forward_mode=Mode(mode),
            req_pool_indices=torch.tensor(list(news)),
            seq_lens=torch.tensor([old[r] + n for r, n in news.items()]),
            extend_prefix_lens_cpu=list(old.values()),
            extend_seq_lens_cpu=list(news.values()),
            out_cache_loc=slots,
        )
        total = sum(news.values())
        k, v = self.rand(LAYERS, total, KV_HEADS, DIM), self.rand(LAYERS, total, KV_HEADS, DIM)
        start = 0
        for r, n in news.items():
            new = k[:, start : start + n], v[:, start : start + n]
            past = self.kv.get(r, (new[0][:, :0], new[1][:, :0]))
            self.kv[r] = tuple(torch.cat(pair, 1) for pair in zip(past, new, strict=True))
            start += n
        self.backend.init_forward_metadata(batch)
        forward = self.backend.forward_decode if mode == "decode" else self.backend.forward_extend
        results = []
        for i in range(LAYERS):
            q = self.rand(total, QUERY_HEADS * DIM)
            out = forward(q, k[i].clone(), v[i].clone(), make_layer(i), batch)
            results.append((out, self.exact(i, q.view(total, QUERY_HEADS, DIM), news)))
        return results

    def exact(self, layer, q, news):
        """Plain causal softmax over everything each request has."""
        rows, start = [], 0
        for r, n in news.items():
            keys, values = (t[layer].repeat_interleave(2, 1) for t in self.kv[r])
            logits = torch.einsum("shd,lhd->hsl", q[start : start + n], keys) * DIM**-0.5
            hidden = torch.ones(n, keys.shape[0], dtype=torch.bool)
            hidden = hidden.triu(keys.shape[0] - n + 1)
            weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
            rows.append(torch.einsum("hsl,lhd->shd", weights, values).flatten(1))
            start += n
        return torch.cat(rows)


__all__ = ["Driver", "layers", "make_backend", "make_layer", "make_pool"]
