"""Selection policies: which pages a decode step may read. One policy a file, one table."""

from __future__ import annotations

from sgl_psa.policies.base import KNOBS, Candidates, Policy
from sgl_psa.policies.dense import DENSE_POLICY
from sgl_psa.policies.oracle_marginal import ORACLE_MARGINAL
from sgl_psa.policies.oracle_top_p import ORACLE_TOP_P
from sgl_psa.policies.psa import PSA
from sgl_psa.policies.swa import SWA
from sgl_psa.policies.top_p import TOP_P
from sgl_psa.policies.topk import TOPK
from sgl_psa.policies.window import WINDOW

#: policy name -> policy; every test and every flag goes over this table.
POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        PSA,
        DENSE_POLICY,
        TOPK,
        WINDOW,
        SWA,
        TOP_P,
        ORACLE_TOP_P,
        ORACLE_MARGINAL,
    )
}

__all__ = ["KNOBS", "POLICIES", "Candidates", "Policy"]
