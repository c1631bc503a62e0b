"""All analyses of recorded routing: one line each. To add one: docs/analysis.md."""

from moe_jax.analysis import (
    balance, cache, load_figures, positions, prediction, specialisation, spread, vocabulary)
from moe_jax.analysis.tables import Analysis, Headline, MissingArray, Table, to_csv

__all__ = ["ANALYSES", "Analysis", "Headline", "MissingArray", "Table", "to_csv"]

ANALYSES: tuple[Analysis, ...] = (
    Analysis("routing_by_domain", "Where each domain goes", "OpenMoE, figures 5 to 8",
             specialisation.routing_by_domain, specialisation.draw_routing_by_category),
    Analysis("routing_by_position", "Where each position goes", "OpenMoE, figure 9",
             positions.routing_by_position, specialisation.draw_routing_by_category),
    Analysis("routing_by_token", "Where the most frequent tokens go", "OpenMoE, figure 10",
             vocabulary.routing_by_token, specialisation.draw_routing_by_category),
    Analysis("top_tokens", "What each expert gets most often", "OpenMoE, tables 9 and 15",
             vocabulary.top_tokens, vocabulary.draw_top_tokens),
    Analysis("drops_by_position", "Dropped choices by position", "OpenMoE, figure 12",
             positions.drops, positions.draw_drops, needs="buffers"),
    Analysis("drops_by_source", "Dropped choices by domain", "OpenMoE, figure 12",
             positions.drops_by_source, positions.draw_drops_by_source, needs="buffers"),
    Analysis("std_by_position", "How unevenly each position is spread", "OpenMoE, figure 13",
             spread.std_by_position, spread.draw_std_over_experts),
    Analysis("std_by_token", "How unevenly each token is spread", "OpenMoE, figure 14",
             spread.std_by_token, spread.draw_std_over_experts),
    Analysis("routing_by_turn", "Conversations of one and of several turns", "OpenMoE, section 4",
             specialisation.routing_by_turn, specialisation.draw_routing_by_turn),
    Analysis("domain_specialisation", "Domain specialisation", "OLMoE, equation 8",
             specialisation.domain_specialisation, specialisation.draw_domain_specialisation),
    Analysis("vocabulary_specialisation", "Vocabulary specialisation", "OLMoE, equation 9",
             vocabulary.vocabulary_specialisation, vocabulary.draw_vocabulary_specialisation),
    Analysis("balance", "Balance of the load", "Wang et al. 2024, table 2: MaxVio",
             balance.balance, load_figures.balance),
    Analysis("expert_loads", "Load of every expert", "DeepSeek-V3, figure 9",
             balance.expert_loads, load_figures.expert_loads),
    Analysis("balance_by_position", "Balance along the context", "MaxVio against the context that a token has",
             balance.balance_by_position, load_figures.balance_by_position),
    Analysis("distribution_shift", "A burst of one domain", "MaxVio of batches under a shift of the data",
             balance.distribution_shift, load_figures.distribution_shift),
    Analysis("router_confidence", "How decided the router is", "flaxformer's router_confidence, by layer",
             balance.router_confidence, load_figures.router_confidence),
    Analysis("collapse_over_training", "Signs of collapse over training", "Load, confidence and norms of saved steps",
             balance.collapse_over_training, load_figures.collapse_over_training, needs="steps"),
    Analysis("expert_prediction", "Predicting the next layer's experts", "HOBBIT, AdapMoE, ProMoE, Fate: recall@k",
             prediction.expert_prediction, load_figures.expert_prediction),
    Analysis("token_overlap", "Experts that consecutive tokens share", "Expert caches: overlap against k²/E",
             prediction.token_overlap, load_figures.token_overlap),
    Analysis("expert_cache", "A cache of experts", "LRU, LFU and Belady 1966: hits and waiting",
             cache.expert_cache, load_figures.expert_cache),
)
