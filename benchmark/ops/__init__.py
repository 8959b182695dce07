"""How fast the ops are, against the machine's own bandwidth and against torch; one file a question.

    python -m benchmark.ops

writes ``out/bench_ops.json`` (rows), ``out/bench_ops.md`` (table) and ``out/bench_ops.png``
(roofline).
"""
