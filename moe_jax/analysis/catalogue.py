"""All analyses of recorded routing: one line each. To add one: docs/analysis.md."""

from moe_jax.analysis import specialisation
from moe_jax.analysis.tables import Analysis, Headline, MissingArray, Table, to_csv

__all__ = ["ANALYSES", "Analysis", "Headline", "MissingArray", "Table", "to_csv"]

ANALYSES: tuple[Analysis, ...] = (
    Analysis("routing_by_domain", "Where each domain goes", "OpenMoE, figures 5 to 8",
             specialisation.routing_by_domain, specialisation.draw_routing_by_category),
    Analysis("routing_by_turn", "Conversations of one and of several turns", "OpenMoE, section 4",
             specialisation.routing_by_turn, specialisation.draw_routing_by_turn),
    Analysis("domain_specialisation", "Domain specialisation", "OLMoE, equation 8",
             specialisation.domain_specialisation, specialisation.draw_domain_specialisation),
)
