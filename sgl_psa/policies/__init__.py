"""Selection policies: which pages a decode step may read. One policy a file, one table."""

from __future__ import annotations

from collections.abc import Callable

from sgl_psa.config import PSAConfig
from sgl_psa.policies.dense import dense_row
from sgl_psa.policies.psa import psa_row
from sgl_psa.row import Row
from sgl_psa.rule import RequestRule

#: policy name -> row builder; every test and every flag goes over this table.
POLICIES: dict[str, Callable[[RequestRule, PSAConfig], Row]] = {
    "psa": psa_row,
    "dense": dense_row,
}

__all__ = ["POLICIES", "dense_row", "psa_row"]
