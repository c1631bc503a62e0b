"""Turns of conversations: which turn each token of a document belongs to, told by a separator in its text."""

from collections.abc import Iterator

import numpy as np

from moe_jax.data.batches import Batches
from moe_jax.data.documents import USER_HEADING
from moe_jax.data.vocabularies import Vocabulary

# How conversations in .jsonl files are written out, so that their turns are found without saying so.
TURN_SEPARATOR = f"\n{USER_HEADING}"


def turns_of_text(tokens_N: np.ndarray, vocabulary: Vocabulary, separator: str) -> np.ndarray:
    """The turn of every token of one document, int32 ``[N]``: how many separators begin before the token ends.

    0 before the first separator, and all through a document without one. A separator at the very beginning need not have
    its line break. Found in the bytes of the text, so that it does not matter how the vocabulary cuts them.
    """
    text = vocabulary.decode(tokens_N.tolist()).encode("utf-8", "replace")
    ends_N = np.cumsum(vocabulary.bytes_per_token_V[tokens_N])
    ends_N += len(text) - (ends_N[-1] if len(ends_N) else 0)  # some vocabularies drop the first space
    wanted, starts = separator.encode(), []
    stripped = wanted.removeprefix(b"\n")
    if stripped != wanted and text.startswith(stripped):
        starts.append(0)
    found = text.find(wanted)
    while found >= 0:
        starts.append(found)
        found = text.find(wanted, found + len(wanted))
    return np.searchsorted(np.asarray(starts, np.int64), ends_N, side="left").astype(np.int32)


def with_turns(batches: Batches, vocabulary: Vocabulary, separator: str,
               max_batches: int | None = None) -> Iterator[dict[str, np.ndarray]]:
    """The evaluation batches with one more entry, ``turn_ids`` ``[B, S]``: the turn of the *input* token; 0 in padding."""
    split, known = batches.tokens, {}
    for number, batch in enumerate(batches.evaluation_batches(max_batches)):
        turn_BS = np.zeros(batch["valid"].shape, np.int32)
        document_BS, place_BS = batches.evaluation_places(number)
        for document in np.unique(document_BS[batch["valid"]]).tolist():
            if document not in known:
                begin, end = split.offsets_D[document], split.offsets_D[document + 1]
                known[document] = turns_of_text(np.asarray(split.tokens_N[begin:end]), vocabulary, separator)
            here = (document_BS == document) & batch["valid"]
            # Inputs are the targets one place later: the input before a target is of the turn of that earlier token.
            turn_BS[here] = known[document][np.maximum(place_BS[here] - 1, 0)]
        yield {**batch, "turn_ids": turn_BS}
