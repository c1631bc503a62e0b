"""Synthetic records of routing whose truth is known."""

import dataclasses

import numpy as np

from moe_jax.analysis.recording import RoutingRecord

__all__ = ["any_number", "make", "places_run_out"]


def make(tokens=4096, layers=2, experts=8, choices=2, domains=2, documents=64, vocabulary=40, row=128, turns=0, by=None,
         strength=0.8, seed=0, **fields) -> RoutingRecord:
    """A record in which `by` decides where tokens go; None: every set of K experts is equally likely.

    Documents are equally long and follow each other in rows of `row` tokens; document d is of domain d % domains, and
    falls into `turns` equally long turns if that is above 0. Token ids are drawn with Zipf's law.

    Args:
      by: "domain", "token", "position", "document" or "turn": each value of it has K favourite experts in every layer,
        which a token takes with probability `strength`, and else a uniform set.
      fields: replace arrays and attributes of the record.
    """
    random = np.random.default_rng(seed)
    each = tokens // documents
    documents_T = np.arange(tokens) // each
    positions_T = np.arange(tokens) % each
    words = 1 / np.arange(1, vocabulary + 1)
    token_ids_T = random.choice(vocabulary, tokens, p=words / words.sum())
    values = {
        "step": 100, "layers": tuple(range(1, 2 * layers, 2)), "num_experts": experts, "token_ids_T": token_ids_T,
        "target_ids_T": np.append(token_ids_T[1:], 0), "predicted_ids_T": random.permutation(token_ids_T),
        "rows_T": np.arange(tokens) // row, "row_positions_T": np.arange(tokens) % row, "positions_T": positions_T,
        "documents_T": documents_T, "domains_T": documents_T % domains,
        "turns_T": positions_T * turns // each + 1 if turns else np.zeros(tokens, int),
        "domains": tuple(f"domain {index}" for index in range(domains)),
        "token_texts": tuple(f"w{index}" for index in range(vocabulary)),
    }
    code_T = {"domain": values["domains_T"], "token": token_ids_T, "position": positions_T, "document": documents_T,
              "turn": values["turns_T"], None: np.zeros(tokens, int)}[by]
    experts_LTK = _sets(random, (layers, tokens), experts, choices)
    if by is not None:
        favourite_LCK = _sets(random, (layers, code_T.max() + 1), experts, choices)
        experts_LTK = np.where(random.random((layers, tokens, 1)) < strength, favourite_LCK[:, code_T], experts_LTK)
    gates_LTK = np.sort(random.dirichlet(np.ones(experts), (layers, tokens)).astype(np.float32))[..., ::-1][..., :choices]
    values |= {"experts_LTK": experts_LTK, "gates_LTK": gates_LTK, "kept_LTK": np.ones(experts_LTK.shape, bool)}
    return RoutingRecord(**(values | fields))


def _sets(random, shape, experts, choices):
    """Sets of K different experts, each equally likely, in random order."""
    return np.argsort(random.random((*shape, experts)), axis=-1)[..., :choices]


def any_number(record: RoutingRecord, seed: int = 0) -> RoutingRecord:
    """The record with only the first 0, 1, … or K choices of each token, any number as likely: as if experts had chosen."""
    size_LT1 = np.random.default_rng(seed).integers(0, record.experts_per_token + 1, (*record.experts_LTK.shape[:2], 1))
    chosen_LTK = np.arange(record.experts_per_token) < size_LT1
    return dataclasses.replace(record, experts_LTK=np.where(chosen_LTK, record.experts_LTK, -1))


def places_run_out(record: RoutingRecord, capacity: int) -> np.ndarray:
    """kept_LTK where in each row each expert has `capacity` places, filled token by token."""
    kept_LTK = np.zeros(record.experts_LTK.shape, bool)
    for layer, experts_TK in enumerate(record.experts_LTK.tolist()):
        filled = {}
        for token, (row, chosen) in enumerate(zip(record.rows_T.tolist(), experts_TK)):
            for choice, expert in enumerate(chosen):
                filled[row, expert] = filled.get((row, expert), 0) + 1
                kept_LTK[layer, token, choice] = filled[row, expert] <= capacity
    return kept_LTK
