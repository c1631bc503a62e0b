"""Training objectives: how a piece of text becomes an example, inputs that are given and targets that are to be written.

A decoder reads inputs and targets one after the other, and its loss is of the targets alone; of an encoder–decoder the encoder
reads the inputs and the decoder writes the targets:

  prefix_lm         the text itself; what stands before a random place is given (Raffel et al. 2020 §3.2.1)
  span_corruption   spans of the text are hidden, each behind a sentinel; the targets name them (the same, §3.1.4)
  ul2               a mixture of denoisers, each announced by a mode text (Tay et al. 2022, table 1)
  openmoe           OpenMoE's mixture of six (Xue et al. 2024, its code)

The fifth, causal, needs none of this: `batches.py` alone makes its rows. Everything here is NumPy and a pure function of its
arguments; what is drawn comes from the raw bits of a Philox generator, which never change between NumPy versions.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from moe_jax.data.documents import CorpusError
from moe_jax.data.vocabularies import EOS_ID, PAD_ID, Vocabulary, with_extra_ids


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """One way to hide text.

    share: of the rows; a mixture's add up to 1. mean_span, rate: spans of so many tokens on average hide so much of the
    text; mean_span=0 hides everything after a random place. mode: text in front of the inputs.
    """

    share: float
    mean_span: float = 0.0
    rate: float = 0.5
    mode: str = ""


# UL2's code (appendix 9.2) takes the shares as arguments: R and X denoisers 40 % each, S 20 % (§4.5).
# OpenMoE: `ul2_objective`, rates as in its configs.
MIXTURES = {
    "prefix_lm": (Denoiser(1.0),),
    "ul2": (
        Denoiser(0.2, 3, 0.15, "[NLU] "),
        Denoiser(0.2, 8, 0.15, "[NLU] "),
        Denoiser(0.1, 3, 0.5, "[NLG] "),
        Denoiser(0.1, 8, 0.5, "[NLG] "),
        Denoiser(0.1, 64, 0.15, "[NLG] "),
        Denoiser(0.1, 64, 0.5, "[NLG] "),
        Denoiser(0.2, mode="[S2S] "),
    ),
    "openmoe": (
        Denoiser(0.1, 3, 0.15, "[NLU] "),
        Denoiser(0.1, 8, 0.15, "[NLU] "),
        Denoiser(0.1, 3, 0.5, "[NLG] "),
        Denoiser(0.1, 8, 0.5, "[NLG] "),
        Denoiser(0.1, 64, 0.5, "[NLG] "),
        Denoiser(0.5, mode="[S2S] "),
    ),
}


def denoisers_of(config) -> tuple[Denoiser, ...]:
    """Those of a DataConfig; none for the causal objective."""
    if config.objective == "span_corruption":
        return (Denoiser(1.0, config.span_mean, config.span_rate),)
    return MIXTURES.get(config.objective, ())


# Which tokens are hidden.


def span_counts(length: int, rate: float, mean_span: float) -> tuple[int, int]:
    """(hidden tokens, spans) in a text of `length` >= 2 tokens: T5's `random_spans_noise_mask`.

    At least one token is hidden and one is not, and no span, hidden or not, is empty.
    """
    hidden = min(max(round(length * rate), 1), length - 1)
    return hidden, min(max(round(hidden / mean_span), 1), hidden, length - hidden)


def hidden_spans(length: int, rate: float, mean_span: float, bits: np.random.BitGenerator) -> np.ndarray:
    """bool [length]: spans to hide. Spans that stay and spans that go alternate, beginning with one that stays; all such
    divisions are equally likely (T5's `random_spans_noise_mask`)."""
    hidden, spans = span_counts(length, rate, mean_span)
    lengths = np.stack([_random_lengths(length - hidden, spans, bits), _random_lengths(hidden, spans, bits)], axis=1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths.reshape(-1))


def _random_lengths(items: int, parts: int, bits: np.random.BitGenerator) -> np.ndarray:
    """int64 [parts], each at least 1, that add up to `items`; every such division is equally likely."""
    order = np.argsort(bits.random_raw(items - 1), kind="stable") if items > 1 else np.zeros(0, np.int64)
    cuts = np.sort(order[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [items]]))


def hidden_suffix(
    length: int, bits: np.random.BitGenerator, most_prefix: int | None = None, most_hidden: int | None = None
) -> np.ndarray:
    """bool [length]: hide all after a prefix of 1 … length - 1 tokens, each equally likely (T5's
    `random_prefix_noise_mask`; half of the text on average). A single token is hidden itself.

    most_prefix, most_hidden: at most so many tokens of each; together at least `length`.
    """
    if length == 1:
        return np.ones(1, bool)
    least = 1 if most_hidden is None else max(1, length - most_hidden)
    most = length - 1 if most_prefix is None else min(length - 1, most_prefix)
    prefix = least + int(bits.random_raw()) % (most - least + 1)
    return np.arange(length) >= prefix


def with_sentinels(tokens: np.ndarray, hidden: np.ndarray, first: int) -> np.ndarray:
    """The tokens with each hidden span replaced by one sentinel: `first`, then the ids below it in turn."""
    begins = hidden & ~np.concatenate([[False], hidden[:-1]])
    sentinel = first + 1 - np.cumsum(begins, dtype=np.int32)
    return np.where(begins, sentinel, tokens)[~hidden | begins].astype(np.int32)


def span_corruption(
    tokens: np.ndarray, rate: float, mean_span: float, first_sentinel: int, bits: np.random.BitGenerator
) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets), int32, without end ids: "we hold X self evident Y" and "X these truths to be Y that".

    The text ends with a hidden span, as T5's code has it: of its targets the last sentinel stands before a span.
    """
    hidden = hidden_spans(len(tokens), rate, mean_span, bits)
    return with_sentinels(tokens, hidden, first_sentinel), with_sentinels(tokens, ~hidden, first_sentinel)


# Examples of an objective with a vocabulary.


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A denoiser with the ids it needs. Examples are inputs and targets; `ends`: an end id closes each of them.

    Attributes:
      mode_ids: in front of the inputs.
      first_sentinel: the last id of the vocabulary; further sentinels are the ids below it.
    """

    denoiser: Denoiser
    mode_ids: tuple[int, ...]
    first_sentinel: int
    ends: bool
    # Not in the text of a recipe, which is part of the data's fingerprint: a vocabulary's fingerprint has them.
    begin_id: int = dataclasses.field(default=PAD_ID, repr=False)
    end_id: int = dataclasses.field(default=EOS_ID, repr=False)

    @property
    def least(self) -> int:
        """Tokens that a text must have."""
        return 2 if self.denoiser.mean_span else 1

    def example_length(self, length: int) -> int:
        """Tokens of inputs and targets together, of a text of `length` tokens; grows with it."""
        denoiser = self.denoiser
        sentinels = 2 * span_counts(length, denoiser.rate, denoiser.mean_span)[1] if denoiser.mean_span else 0
        return length + sentinels + len(self.mode_ids) + 2 * self.ends

    def longest(self, room: int, most: int | None = None) -> int:
        """Tokens of the longest text whose example fits into `room`, at most `most`; 0 if none does."""
        length = min(room, room if most is None else most)
        while length >= self.least and self.example_length(length) > room:
            length -= 1
        return length if length >= self.least else 0

    def fits(self, length: int, inputs_room: int, targets_room: int) -> bool:
        """Whether the inputs and the targets of a text of `length` tokens fit into so much room each; of one whose end is
        hidden, whether there is a place to cut it."""
        denoiser, rest = self.denoiser, len(self.mode_ids) + self.ends
        if not denoiser.mean_span:
            inputs_room, targets_room = inputs_room - rest, targets_room - self.ends
            return targets_room > 0 and inputs_room >= min(length - 1, 1) and length <= inputs_room + targets_room
        hidden, spans = span_counts(length, denoiser.rate, denoiser.mean_span)
        return length - hidden + spans + rest <= inputs_room and hidden + spans + self.ends <= targets_room

    def longest_pair(self, inputs_room: int, targets_room: int, most: int | None = None) -> int:
        """As :meth:`longest`, of an example whose inputs and targets lie apart. A text whose end is hidden is at most one
        token longer than the larger room, so that the place to cut it stays open."""
        length = inputs_room + targets_room
        if not self.denoiser.mean_span:
            length = max(inputs_room - len(self.mode_ids), targets_room) - self.ends + 1
        length = max(length if most is None else min(length, most), 0)
        while length >= self.least and not self.fits(length, inputs_room, targets_room):
            length -= 1
        return length if length >= self.least else 0

    def text_of_row(self, config) -> int:
        """Tokens of text that a row of a DataConfig's reads: a longest example's; 0 if none fits."""
        if config.target_length:
            return self.longest_pair(config.sequence_length, config.target_length)
        return self.longest(config.sequence_length)

    def example(
        self, tokens: np.ndarray, bits: np.random.BitGenerator, rooms: tuple[int, int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets), int32; together `example_length(len(tokens))`. `rooms`: for each of the two, which they fit
        (:meth:`fits`)."""
        denoiser, end = self.denoiser, np.full(int(self.ends), self.end_id, np.int32)
        if denoiser.mean_span:
            inputs, targets = span_corruption(tokens, denoiser.rate, denoiser.mean_span, self.first_sentinel, bits)
        else:
            most = () if rooms is None else (rooms[0] - len(self.mode_ids) - self.ends, rooms[1] - self.ends)
            hidden = hidden_suffix(len(tokens), bits, *most)
            inputs, targets = tokens[~hidden], tokens[hidden]
        join = lambda *parts: np.concatenate(parts).astype(np.int32)
        return join(np.array(self.mode_ids, np.int32), inputs, end), join(targets, end)


def recipes_of(config, vocabulary: Vocabulary) -> tuple[tuple[Recipe, ...], Vocabulary]:
    """The recipes of a DataConfig's objective, and the vocabulary with its sentinels; none, and as it was, if causal.

    Raises:
      CorpusError: too few sentinels, or rows too short for an example.
    """
    found = []
    ends = config.objective != "prefix_lm" or config.target_length > 0
    for denoiser in denoisers_of(config):
        mode_ids = tuple(int(token) for token in vocabulary.encode(denoiser.mode)) if denoiser.mode else ()
        recipe = Recipe(denoiser, mode_ids, 0, ends, vocabulary.begin_id, vocabulary.eos_id)
        if not recipe.text_of_row(config):
            if config.target_length:
                raise CorpusError(
                    f"data.sequence_length={config.sequence_length}, data.target_length={config.target_length}: too short for "
                    f"data.objective={config.objective!r}: inputs or targets of the shortest of its examples do not fit"
                )
            shortest = recipe.example_length(recipe.least)
            raise CorpusError(
                f"data.sequence_length={config.sequence_length} is too short for data.objective={config.objective!r}: one "
                f"of its examples has at least {shortest} tokens"
            )
        found.append(recipe)
    spans = [r for r in found if r.denoiser.mean_span]
    needed = max((span_counts(r.text_of_row(config), r.denoiser.rate, r.denoiser.mean_span)[1] for r in spans),
                 default=0)
    if config.sentinels and config.sentinels < needed:
        raise CorpusError(
            f"data.sentinels={config.sentinels}: data.objective={config.objective!r} hides up to {needed} spans in a row of "
            f"data.sequence_length={config.sequence_length}; set it to at least that, or to 0"
        )
    if needed:
        vocabulary = with_extra_ids(vocabulary, config.sentinels or needed)
    return tuple(dataclasses.replace(r, first_sentinel=vocabulary.first_sentinel) for r in found), vocabulary


def fill_row(
    row: dict[str, np.ndarray], pieces: Iterable[tuple[np.ndarray, int, int]], recipe: Recipe, bits: np.random.BitGenerator
) -> None:
    """Writes into one row of padding an example of each piece of text, as many as fit; the last is cut to fit.

    The layout is that of seqio's PrefixLMFeatureConverter.

    Args:
      row: the keys of `batches.Batches`, `is_target`, and `in_prefix` if wanted, each [S].
      pieces: (tokens, domain, document) in order. An end id that closes a piece is left out where examples have their own.
    """
    begin, segment, length = 0, 0, len(row["valid"])
    for tokens, domain, document in pieces:
        if recipe.ends and len(tokens) and tokens[-1] == recipe.end_id:
            tokens = tokens[:-1]
        fitting = recipe.longest(length - begin, len(tokens))
        if not fitting:
            continue
        inputs, targets = recipe.example(tokens[:fitting], bits)
        segment, given, end = segment + 1, begin + len(inputs), begin + len(inputs) + len(targets)
        here = slice(begin, end)
        row["target_ids"][here] = np.concatenate([inputs, targets])
        row["input_ids"][begin + 1 : end] = row["target_ids"][begin : end - 1]
        row["input_ids"][begin] = recipe.begin_id
        row["valid"][here], row["segment_ids"][here] = True, segment
        row["positions"][here] = np.arange(end - begin)
        row["domain_ids"][here], row["document_ids"][here] = domain, document
        row["is_target"][given:end] = True
        if "in_prefix" in row:  # one place more: there the last of the inputs is read, and the first target predicted
            row["in_prefix"][begin : given + 1] = True
        begin = end


# Encoder and decoder.


def fill_pair(
    row: dict[str, np.ndarray], pieces: Iterable[tuple[np.ndarray, int, int]], recipe: Recipe, bits: np.random.BitGenerator
) -> None:
    """As :func:`fill_row` for an encoder–decoder: inputs go to the encoder's row, targets to the decoder's, as segments of the
    same number.

    Args:
      row: the keys of `batches.Batches`: those with `encoder_` in front [S], the others [T].
    """
    given, written, segment = 0, 0, 0
    for tokens, domain, document in pieces:
        if len(tokens) and tokens[-1] == recipe.end_id:
            tokens = tokens[:-1]
        rooms = len(row["encoder_valid"]) - given, len(row["valid"]) - written
        fitting = recipe.longest_pair(*rooms, len(tokens))
        if not fitting:
            continue
        inputs, targets = recipe.example(tokens[:fitting], bits, rooms)
        segment += 1
        for side, begin, ids in (("encoder_", given, inputs), ("", written, targets)):
            here = slice(begin, begin + len(ids))
            row[f"{side}valid"][here], row[f"{side}segment_ids"][here] = True, segment
            row[f"{side}positions"][here] = np.arange(len(ids))
            row[f"{side}domain_ids"][here], row[f"{side}document_ids"][here] = domain, document
        row["encoder_input_ids"][given : given + len(inputs)] = inputs
        row["target_ids"][written : written + len(targets)] = targets
        row["input_ids"][written : written + len(targets)] = np.concatenate([[recipe.begin_id], targets[:-1]])
        given, written = given + len(inputs), written + len(targets)


def text_and_target_lengths(inputs_length: int, rate: float, mean_span: float) -> tuple[int, int]:
    """(tokens of text, of targets) that fill `inputs_length` inputs by span corruption, end ids counted: T5's
    `random_spans_helper`, without its exception for a rate of one half.

    Raises:
      ValueError: not even two tokens of text fit.
    """
    def lengths(text):
        hidden, spans = span_counts(text, rate, mean_span)
        return text - hidden + spans + 1, hidden + spans + 1

    text = 2
    if lengths(text)[0] > inputs_length:
        raise ValueError(f"inputs_length={inputs_length}: the inputs of two tokens of text are {lengths(2)[0]}")
    while lengths(text + 1)[0] <= inputs_length:
        text += 1
    return text, lengths(text)[1]


def encoder_decoder_batch(
    examples: Sequence[tuple[np.ndarray, np.ndarray]], inputs_length: int, targets_length: int
) -> dict[str, np.ndarray]:
    """Examples, one per row, for a model whose encoder reads inputs and whose decoder writes targets (T5).

    examples: (inputs, targets), for instance of `span_corruption`; an end id is added to both.

    Returns:
      encoder_input_ids, encoder_valid [B, inputs_length]; decoder_input_ids (the targets shifted right, 0 at the start),
      decoder_target_ids, decoder_valid [B, targets_length]. int32 and bool; 0 and False in padding.

    Raises:
      ValueError: an example is longer than its row.
    """
    batch = {}
    for name, place, length in (("encoder", 0, inputs_length), ("decoder", 1, targets_length)):
        ids = np.full((len(examples), length), PAD_ID, np.int32)
        for row, example in enumerate(examples):
            tokens = np.append(example[place], EOS_ID)
            if len(tokens) > length:
                side = ("inputs", "targets")[place]
                raise ValueError(f"example {row}: {len(tokens)} {side} with the end id, but {side}_length={length}")
            ids[row, : len(tokens)] = tokens
        batch[f"{name}_valid"] = ids != PAD_ID
        batch["encoder_input_ids" if name == "encoder" else "decoder_target_ids"] = ids
    batch["decoder_input_ids"] = np.where(
        batch["decoder_valid"], np.pad(batch["decoder_target_ids"], ((0, 0), (1, 0)))[:, :-1], PAD_ID
    )
    return batch
