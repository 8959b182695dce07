"""Coverage audit: what decode really covered, measured against dense attention.

:class:`Auditor` watches a live wrapper; ``python -m sgl_psa.audit`` measures the stop rules on the
queries and keys of a model.
"""

from sgl_psa.audit.auditor import Auditor
from sgl_psa.audit.counts import TOLERANCE, AuditCounts

__all__ = ["TOLERANCE", "AuditCounts", "Auditor"]
