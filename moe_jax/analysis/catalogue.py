"""All analyses of recorded routing: one line each. To add one: docs/analysis.md."""

from moe_jax.analysis.tables import Analysis, Headline, MissingArray, Table, to_csv

__all__ = ["ANALYSES", "Analysis", "Headline", "MissingArray", "Table", "to_csv"]

ANALYSES: tuple[Analysis, ...] = ()
