"""Are kinds of token – punctuation, digits, keywords – sent to few experts? The entropy of ST-MoE."""

import keyword
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.analysis.recording import RoutingRecord
from moe_jax.analysis.report_figures import MUTED, legend, new_figure, reference_line
from moe_jax.analysis.routing_counts import (
    chosen_TK, count, counts_LCE, dealt_anew, drop_note, headline, pair_codes, ratios, uniform_std)
from moe_jax.analysis.routing_figures import SERIES, grid, shown
from moe_jax.analysis.tables import MissingArray, Table, latest

CLASSES = ("special", "white space", "digits", "punctuation", "keyword", "Capitalised", "word", "piece", "other")
LEAST_TOKENS = 100


def class_of(text: str) -> str:
    """The class of a token's text, by the first rule that fits.

    1. special: no text, or a name in <>. 2. white space: nothing else. The rest looks at the text without the blanks around
    it ("▁" and "Ġ" count as blanks): 3. digits: digits, with points, commas or underscores between them. 4. punctuation: no
    letter and no digit. 5. keyword: of Python (the words and, if, in, is, not, or … are English too). 6. Capitalised: letters and
    underscores, the first a capital. 7. word: letters and underscores, with a blank before, so that a word begins here.
    8. piece: the same without a blank: the inside or the end of a word, or a word after punctuation. 9. other: letters
    mixed with anything else, such as "x1" or "self.".
    """
    if not text or (len(text) > 2 and text[0] == "<" and text[-1] == ">"):
        return "special"
    text = text.replace("▁", " ").replace("Ġ", " ")
    core = text.strip()
    if not core:
        return "white space"
    if core[0].isdigit() and core.translate(str.maketrans("", "", ".,_")).isdigit():
        return "digits"
    if not any(mark.isalnum() for mark in core):
        return "punctuation"
    if keyword.iskeyword(core):
        return "keyword"
    if core.replace("_", "").isalpha():
        return "Capitalised" if core[0].isupper() else "word" if text[0].isspace() else "piece"
    return "other"


def class_codes(record: RoutingRecord) -> tuple[np.ndarray, list[str]]:
    """Classes with at least 100 tokens: the code of each token's class ``[T]`` (-1: of a rarer one) and their names.

    Raises:
      MissingArray: the record has no texts, or no class is so frequent.
    """
    record = latest([record])
    if not record.token_texts:
        raise MissingArray("The record holds no token_texts; record with the vocabulary that the text was cut with")
    code_V = np.array([CLASSES.index(class_of(text)) for text in record.token_texts])
    code_T = np.where(record.token_ids_T < len(code_V), code_V[np.minimum(record.token_ids_T, len(code_V) - 1)], 0)
    kept = np.flatnonzero(np.bincount(code_T, minlength=len(CLASSES)) >= LEAST_TOKENS)
    if not len(kept):
        raise MissingArray(f"No class of tokens has {LEAST_TOKENS} tokens in this record of {record.num_tokens:,}; record more")
    renumber = np.full(len(CLASSES), -1)
    renumber[kept] = np.arange(len(kept))
    return renumber[code_T], [CLASSES[code] for code in kept]


def token_classes(records: Sequence[RoutingRecord]) -> Table:
    """Entropy of a token class's routing in each layer (ST-MoE): H = -Σ_e r_e ln r_e in nats, r_e the share of the
    class's dispatched choices that goes to expert e. ln E if the class goes everywhere alike, 0 if to one expert. ST-MoE looks
    at sentinel tokens; here the classes are those of :func:`class_of`.

    Returns:
      Columns layer, class, tokens, entropy, uniform (expected for uniform routing of so many choices:
      ln E - (E - K) / 2n, as the K choices of a token differ), all_text (entropy of the layer's load).
    """
    record = latest(records)
    code_T, names = class_codes(record)
    size, experts = len(names), record.num_experts
    counts = counts_LCE(record, code_T, size, dispatched=True)
    # The variance of the ratios, times E² / 2, is what ln E is missed by.
    missed = experts**2 / 2 * np.nan_to_num(uniform_std(record, code_T, size, True).ravel()) ** 2
    everything = counts_LCE(record, np.zeros(record.num_tokens, int), 1, dispatched=True)
    layer, kind = (index.ravel() for index in np.indices(counts.shape[:2]))
    columns = {"layer": np.array(record.layers)[layer], "class": np.array(names)[kind], "tokens": count(code_T, size)[kind],
               "entropy": entropy(counts).ravel(),
               "uniform": math.log(experts) - missed,
               "all_text": entropy(everything)[layer, 0]}

    def told(counts_R: np.ndarray) -> np.ndarray:
        return information(counts_R.reshape(-1, size, experts))

    codes = [pair_codes(code_T, chosen_TK(record, place, True), experts) for place in range(len(record.layers))]
    value = np.mean([told(count(code, size * experts)[None])[0] for code in codes])
    top = headline("information of a token's class about its expert in nats, mean over layers", value,
                   dealt_anew(record, code_T, size, True, told), record, codes, size * experts, told)
    caption = (
        f"Entropy over the {experts} experts of where each class of tokens goes; {(code_T >= 0).sum():,} tokens in "
        f"{size} classes, told by the token's text. Dashed: ln {experts} = {math.log(experts):.2f}, uniform routing "
        f"(less by {np.max(math.log(experts) - columns['uniform']):.2g} at most for so few tokens); dotted: all text. "
        "Specialisation: classes far below the dotted line. ST-MoE finds this in encoders, and in its decoders "
        f"none.{drop_note(record)}")
    return Table(columns, caption, (top,), {"experts": experts})


def entropy(counts: np.ndarray) -> np.ndarray:
    """Entropy of the last axis in nats, of counts; NaN where they add up to 0."""
    share = ratios(counts)
    return -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=-1)


def information(counts_RCE: np.ndarray) -> np.ndarray:
    """Mutual information of category and expert in nats, ``[R]``: the entropy of the load less that within categories."""
    weight_RC = ratios(counts_RCE.sum(axis=-1))
    return entropy(counts_RCE.sum(axis=1)) - (weight_RC * np.nan_to_num(entropy(counts_RCE))).sum(axis=-1)


def draw_token_classes(table: Table) -> Any:
    value_CL, names, layers = grid(table.columns, "entropy", "class", "layer")
    figure, axes = new_figure(3.8)
    axis, ceiling = axes[0, 0], math.log(table.facts["experts"])
    for index, (value_L, name) in enumerate(zip(value_CL, names)):
        tokens = table.where(**{"class": name})["tokens"][0]
        axis.plot(layers, value_L, marker="osD"[index // len(SERIES)], markersize=4.5, linewidth=1.5,
                  color=SERIES[index % len(SERIES)], label=f"{name} ({tokens:,})")
    all_L = grid(table.columns, "all_text", "class", "layer")[0][0]
    axis.plot(layers, all_L, color=MUTED, linestyle=":", linewidth=1.8, label="all text")
    reference_line(axis, ceiling, "uniform, ln E")
    axis.set(xlabel="layer", ylabel="entropy of the class's\nrouting (nats)", ylim=(0, 1.06 * ceiling))
    axis.set_xticks(layers if len(layers) <= 16 else shown(layers, 8))
    legend(axis, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
