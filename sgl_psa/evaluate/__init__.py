"""Accuracy against bytes read, policy by policy: ``python -m sgl_psa.evaluate``.

Tasks make seeded contexts with questions whose answers stand in them. A runner, in this process or
over HTTP, has them answered under every policy; the rows go to ``eval.json`` and ``report.html``.
"""
