"""Values of the rules table and names of the statistics columns."""

DENSE = 0
MARGINAL = 1
COVERAGE = 2
CONSERVATIVE = 3

STAT_NAMES = (
    "pages_attended",
    "tokens_attended",
    "pages_scored",
    "rounds",
    "estimated_coverage",
    "stale_pages",
)
NUM_STATS = len(STAT_NAMES)
