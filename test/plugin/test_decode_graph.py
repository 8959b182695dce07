"""The backend's side of SGLang's decode graphs, called in SGLang's order; no graph is captured."""

from types import SimpleNamespace

import pytest
import torch
from sglang_psa.decode_graph import LateSteps, LateTable

from sgl_psa import static_plan
from sgl_psa.config import ConfigError
from sgl_psa.stats import StepStats
from test.plugin.engine_parts import (
    DIM,
    KV_HEADS,
    LAYERS,
    QUERY_HEADS,
    Driver,
    Mode,
    make_backend,
    make_layer,
)

SETTINGS = {"min_context": 0, "recent_pages": 1, "group_pages": 1, "delta": 0.5, "backend": "torch"}


@pytest.fixture(autouse=True)
def any_backend(monkeypatch):
    monkeypatch.setattr(static_plan, "NEVER_WAITING", ("torch",))


class GraphDriver(Driver):
    """Decodes as SGLang's graph runner does: batches padded to 3 rows, their metadata replayed."""

    SIZE = 3

    def __init__(self, backend):
        super().__init__(backend)
        backend.init_cuda_graph_state(self.SIZE, self.SIZE)
        fill = backend.get_cuda_graph_seq_len_fill_value()
        zeros = torch.zeros(self.SIZE, dtype=torch.int64)
        batch = SimpleNamespace(
            forward_mode=Mode("decode"),
            req_pool_indices=zeros,
            seq_lens=zeros + fill,
            out_cache_loc=zeros,
        )
        backend.init_forward_metadata_out_graph(batch, in_capture=True)
        for _ in range(2):
            backend.init_forward_metadata_in_graph(batch)
            for i in range(LAYERS):
                kv = torch.zeros(self.SIZE, KV_HEADS, DIM)
                backend.forward_decode(
                    torch.zeros(self.SIZE, QUERY_HEADS * DIM), kv, kv, make_layer(i), batch
                )
        assert backend.take_step() is None and backend.wrapper.stats.decode_steps == 0

    def step(self, mode, news):
        if mode != "decode":
            return super().step(mode, news)
        padding = self.SIZE - len(news)
        real, eager = self.backend, self.backend.init_forward_metadata

        def plan(batch):
            pad = torch.nn.functional.pad
            view = SimpleNamespace(
                **vars(batch)
                | {
                    "req_pool_indices": pad(batch.req_pool_indices, (0, padding)),
                    "seq_lens": pad(batch.seq_lens, (0, padding), value=1),
                },
                num_padding=padding,
            )
            real.init_forward_metadata_out_graph(view)

        def forward(q, k, v, layer, batch):
            rows = slice(0, len(q))
            pad = torch.nn.functional.pad
            batch = SimpleNamespace(out_cache_loc=pad(batch.out_cache_loc, (0, padding)))
            q, k, v = (pad(t, (*[0] * (2 * t.ndim - 1), padding)) for t in (q, k, v))
            return type(real).forward_decode(real, q, k, v, layer, batch)[rows]

        real.init_forward_metadata, real.forward_decode = plan, forward
        try:
            return super().step(mode, news)
        finally:
            real.init_forward_metadata = eager
            del real.forward_decode


@pytest.mark.parametrize("settings", [{}, {"predict": True, "stop": "coverage", "coverage": 0.7}])
def test_replayed_steps_are_the_eager_ones(monkeypatch, settings):
    captured = GraphDriver(make_backend(monkeypatch, **SETTINGS, **settings))
    plain = Driver(make_backend(monkeypatch, **SETTINGS, **settings))
    for mode, news in (
        ("extend", {1: 130, 2: 60}),
        ("decode", {1: 1, 2: 1}),
        ("decode", {2: 1}),
        ("extend", {3: 90}),
        ("decode", {3: 1, 1: 1, 2: 1}),
    ):
        got, want = captured.step(mode, news), plain.step(mode, news)
        for (a, _), (b, _) in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        step, wanted = captured.backend.take_step(), plain.backend.take_step()
        assert (step is None) == (wanted is None) == (mode == "extend")
        if step is not None:
            rows = wanted.table.shape[1]
            torch.testing.assert_close(step.table[:, :rows], wanted.table, rtol=1e-5, atol=1e-5)
            assert (step.table[:, rows:] == 0).all() and captured.backend.take_step() is None
    assert captured.backend.wrapper.stats.decode_steps == 3


def test_settings_that_cannot_be_captured_stop_the_start(monkeypatch):
    backend = make_backend(monkeypatch, **{**SETTINGS, "policy": "window"})
    with pytest.raises(ConfigError, match="policy='window'"):
        backend.init_cuda_graph_state(2, 2)


def test_on_the_cpu_nothing_is_late():
    step = StepStats(torch.arange(12.0).double().view(1, 3, 4), 2)
    assert LateSteps().swap(step) is step
    late = LateTable(step.table[0])
    assert len(late) == 3 and late[1] == (4.0, 5.0, 6.0, 7.0) and list(late) == late.rows
