"""How likely texts are under a model: perplexity of documents, and questions answered by their likeliest choice.

Texts are packed into rows of the model's length, each a segment of its own: every number is that of the text alone. What an
encoder–decoder writes is scored given what its encoder reads, one pair to a row. Routing is causal and
dropless (:meth:`moe_jax.nn.moe.RoutingMode.causal`), whatever the model was trained with.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from moe_jax.config import Config, ConfigError
from moe_jax.data.batches import ENCODER_PADDING, empty_batch, join_rows
from moe_jax.data.documents import CorpusError, Document
from moe_jax.data.questions import Question
from moe_jax.data.vocabularies import PAD_ID, Vocabulary
from moe_jax.errors import UserError
from moe_jax.nn.moe import RoutingMode
from moe_jax.sharding import compiler_options, local_rows
from moe_jax.training import processes
from moe_jax.training.evaluate import put_batch
from moe_jax.training.losses import cross_entropy
from moe_jax.training.step import Batch, forward


@dataclasses.dataclass(frozen=True)
class Text:
    """Tokens int32 ``[n]``, the first ``given`` of which are read and not predicted; ``read`` ``[m]`` by the encoder, if there is
    one."""

    ids: np.ndarray
    given: int = 0
    read: np.ndarray | None = None


def check_scorable(config: Config, items: Sequence[Document | Question]) -> None:
    """Refuses, with ConfigError, documents for an encoder–decoder, which says only how likely a text is given another."""
    if config.model.encoder_layers and isinstance(items[0], Document):
        raise ConfigError(f"model.encoder_layers={config.model.encoder_layers}: an encoder–decoder writes one text given another, "
                          f'so a "text" alone has no likelihood; write lines with "input" and "target", or questions with "context", '
                          f'"choices" and "answer".')


def log_likelihoods(params: Any, bias_LE: jax.Array, texts: Sequence[Text], config: Config, vocab_size: int,
                    mesh: jax.sharding.Mesh, begin_id: int = PAD_ID) -> np.ndarray:
    """Natural logarithm of the probability of each text's tokens beyond the given ones, fp64 ``[len(texts)]``.

    Args:
      texts: at least one and at most ``data.sequence_length`` tokens each; of an encoder–decoder at most ``data.target_length``,
        and at most ``data.sequence_length`` to be read.
      begin_id: stands before a text's first token.

    Raises:
      UserError: the model's outputs are not finite.
    """
    if config.model.encoder_layers:
        places = [(number, 0) for number in range(len(texts))]
    else:
        places = packed([len(text.ids) for text in texts], config.data.sequence_length)
    scores = np.zeros(len(texts))
    function = processes.compiled_together(_scores(config, vocab_size), "scoring of texts")
    batch_size = config.data.batch_size
    rows = max(row for row, _ in places) + 1
    in_row = [[] for _ in range(rows)]
    for number, (row, begin) in enumerate(places):
        in_row[row].append((number, begin))
    for first in range(0, rows, batch_size):
        here = in_row[first : first + batch_size]
        batch = _batch(here, texts, config, begin_id)
        own = join_rows([{name: value[part] for name, value in batch.items()} for part in local_rows(mesh, batch_size)])
        score_BS = np.asarray(jax.device_get(function(params, put_batch(own, mesh, batch_size), bias_LE)), np.float64)
        for row, inside in enumerate(here):
            for number, begin in inside:
                text = texts[number]
                scores[number] = score_BS[row, begin + text.given : begin + len(text.ids)].sum()
    if not np.isfinite(scores).all():
        raise UserError("the model gives texts a likelihood that is not a finite number; its parameters are broken")
    return scores


def packed(lengths: Sequence[int], row: int) -> list[tuple[int, int]]:
    """(row, first place) of each text: the longest first, each into the first row with room for it."""
    room = np.full(len(lengths), row)  # of each row; at worst every text needs one of its own
    places = [(0, 0)] * len(lengths)
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        fits = int(np.argmax(room >= lengths[number]))
        places[number] = (fits, int(row - room[fits]))
        room[fits] -= lengths[number]
    return places


def _batch(rows, texts, config, begin_id) -> dict[str, np.ndarray]:
    """The rows as :mod:`moe_jax.data.batches` lays them out, with ``is_target``; the last batch has empty rows."""
    data = config.data
    batch = empty_batch(data.batch_size, data.target_length or data.sequence_length)
    if config.model.encoder_layers:
        batch |= empty_batch(data.batch_size, data.sequence_length, ENCODER_PADDING)
    batch["is_target"] = np.zeros_like(batch["valid"])
    if config.data.prefix_attention == "bidirectional":
        batch["in_prefix"] = np.zeros_like(batch["valid"])
    for row, inside in enumerate(rows):
        for segment, (number, begin) in enumerate(sorted(inside, key=lambda item: item[1]), start=1):
            text = texts[number]
            end = begin + len(text.ids)
            batch["target_ids"][row, begin:end] = text.ids
            batch["input_ids"][row, begin + 1 : end] = text.ids[:-1]
            batch["input_ids"][row, begin] = begin_id
            batch["valid"][row, begin:end] = True
            batch["segment_ids"][row, begin:end] = segment
            batch["positions"][row, begin:end] = np.arange(len(text.ids))
            batch["is_target"][row, begin + text.given : end] = True
            if text.read is not None:
                here = slice(len(text.read))
                batch["encoder_input_ids"][row, here], batch["encoder_positions"][row, here] = text.read, np.arange(len(text.read))
                batch["encoder_valid"][row, here], batch["encoder_segment_ids"][row, here] = True, segment
            if "in_prefix" in batch and text.given:
                # As in training: one place more, where the last given token is read.
                batch["in_prefix"][row, begin : begin + text.given + 1] = True
    return batch


@functools.lru_cache(maxsize=8)
def _scores(config, vocab_size):
    return jax.jit(functools.partial(_score_tokens, config=config, vocab_size=vocab_size), compiler_options=compiler_options())


def _score_tokens(params: Any, batch: Batch, bias_LE: jax.Array, config: Config, vocab_size: int) -> jax.Array:
    """Log-probability of every target, 0 elsewhere, ``[B, S]``; on every process."""
    output = forward(config, vocab_size, params, batch, RoutingMode.causal(config), bias_LE)
    ce_BS, _ = cross_entropy(output.logits_BSV, batch["target_ids"])
    return jax.reshard(jnp.where(batch["is_target"], -ce_BS, 0.0), P())


# Documents.


def windows(ids: np.ndarray, length: int) -> list[Text]:
    """A document in parts of ``length`` tokens, each of which begins anew, as rows of training and validation do."""
    return [Text(ids[begin : begin + length]) for begin in range(0, len(ids), length)]


def perplexity(documents: Sequence[Document], vocabulary: Vocabulary, score: Any, length: int) -> dict[str, Any]:
    """Cross-entropy of documents, their ends included, as in validation.

    Args:
      score: :func:`log_likelihoods` of a list of texts.
      length: of the model; longer documents are cut (:func:`windows`).

    Returns:
      ``ce`` (nats per token), ``perplexity`` (its exponential), ``bits_per_byte`` (of the UTF-8 text), ``tokens``, ``bytes``,
      ``documents``, ``cut`` (documents longer than the model's length), the same by domain in ``domains``, and ``items``:
      domain, name, log_likelihood, tokens and bytes of each.
    """
    end = vocabulary.end_ids[:1]
    parts = [windows(np.append(vocabulary.encode(document.text), end).astype(np.int32), length) for document in documents]
    scores = iter(score([part for texts in parts for part in texts]))
    items = [{"name": document.name, "domain": document.domain, "log_likelihood": float(sum(next(scores) for _ in texts)),
              "tokens": sum(len(part.ids) for part in texts), "bytes": document.num_bytes, "cut": len(texts) > 1}
             for document, texts in zip(documents, parts)]
    return {**_by_domain(items, _perplexity), "items": items}


def perplexity_given(questions: Sequence[Question], vocabulary: Vocabulary, score: Any, length: int,
                     target_length: int = 0) -> dict[str, Any]:
    """As :func:`perplexity` of the one choice of each question, its end included, given the context, which ``given`` says; ``cut``
    are contexts that lost their beginning. ``items`` have ``where`` in place of a name."""
    texts, cut = zip(*(texts_of(question, vocabulary, length, target_length, ended=True) for question in questions))
    items = [{"where": question.where, "domain": question.domain, "log_likelihood": float(found), "tokens": len(text.ids) - text.given,
              "bytes": len(question.choices[0].encode("utf-8", "replace")), "cut": was_cut}
             for question, (text,), was_cut, found in zip(questions, texts, cut, score([text for (text,) in texts]))]
    return {"given": True, **_by_domain(items, _perplexity), "items": items}


def _perplexity(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    total = {name: sum(item[name] for item in items) for name in ("log_likelihood", "tokens", "bytes", "cut")}
    ce = -total["log_likelihood"] / total["tokens"]
    return {"ce": ce, "perplexity": math.exp(ce) if ce < 700 else math.inf,
            "bits_per_byte": -total["log_likelihood"] / math.log(2) / total["bytes"], "tokens": total["tokens"],
            "bytes": total["bytes"], "documents": len(items), "cut": int(total["cut"])}


# Questions.


def texts_of(question: Question, vocabulary: Vocabulary, length: int, target_length: int = 0,
             ended: bool = False) -> tuple[list[Text], bool]:
    """The question with each of its choices, and whether its beginning had to be cut off.

    With ``target_length``, an encoder–decoder's, the encoder reads the context and the decoder writes the choice; both end with the
    end id, as in training. Of a decoder a choice has its end if ``ended``.

    Context and choice are tokenised as one text. What all choices leave of the context's own tokens is given, the same for
    all; a token that reaches over the seam is predicted. Where a text is longer than the model's ``length``, its first tokens
    are left out, as many of all choices as of the longest.

    Raises:
      CorpusError: what is to be predicted alone is longer.
    """
    context = np.asarray(vocabulary.encode(question.context))
    if target_length:
        return _pairs_of(question, context, vocabulary, length, target_length)
    end = vocabulary.end_ids[:1] if ended else ()
    whole = [np.append(vocabulary.encode(question.context + choice), end).astype(np.int32) for choice in question.choices]
    given = min(_common(context, ids) for ids in whole)
    excess = max(0, max(map(len, whole)) - length)
    if excess > given:
        raise CorpusError(f"{question.where}: a choice has more tokens than the {length} of the model's rows "
                          f"(data.sequence_length); shorten it")
    return [Text(ids[excess:], given - excess) for ids in whole], excess > 0


def _pairs_of(question, context, vocabulary, length, target_length) -> tuple[list[Text], bool]:
    end = vocabulary.end_ids[:1]
    read = np.append(context, end).astype(np.int32)
    written = [np.append(vocabulary.encode(choice), end).astype(np.int32) for choice in question.choices]
    if max(map(len, written)) > target_length:
        raise CorpusError(f"{question.where}: what is to be written has more tokens than the {target_length} of the decoder's rows "
                          f"(data.target_length); shorten it")
    return [Text(ids, 0, read[-length:]) for ids in written], len(read) > length


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two texts begin with alike."""
    size = min(len(first), len(second))
    differing = np.flatnonzero(first[:size] != second[:size])
    return int(differing[0]) if len(differing) else size


def multiple_choice(questions: Sequence[Question], vocabulary: Vocabulary, score: Any, length: int,
                    target_length: int = 0) -> dict[str, Any]:
    """Answers each question with the choice of the highest log-likelihood; of equal ones with the first.

    Returns:
      ``accuracy``; ``accuracy_normalised``, with the log-likelihood per UTF-8 byte of the choice; ``guessing``, what drawing
      at random gives; ``questions``; ``cut`` (contexts that lost their beginning); the same by domain in ``domains``, and
      ``items``: where, domain, log_likelihoods, answer, chosen, chosen_normalised and cut of each.
    """
    texts, cut = zip(*(texts_of(question, vocabulary, length, target_length) for question in questions))
    scores = iter(score([text for each in texts for text in each]))
    items = []
    for question, each, was_cut in zip(questions, texts, cut):
        found = np.array([next(scores) for _ in each])
        sizes = np.array([len(choice.encode("utf-8", "replace")) for choice in question.choices])
        items.append({"where": question.where, "domain": question.domain, "log_likelihoods": found.tolist(),
                      "answer": question.answer, "chosen": int(np.argmax(found)),
                      "chosen_normalised": int(np.argmax(found / sizes)), "cut": was_cut})
    return {**_by_domain(items, _accuracy), "items": items}


def _accuracy(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    share = lambda values: float(np.mean(values))
    return {"accuracy": share([item["chosen"] == item["answer"] for item in items]),
            "accuracy_normalised": share([item["chosen_normalised"] == item["answer"] for item in items]),
            "guessing": share([1 / len(item["log_likelihoods"]) for item in items]), "questions": len(items),
            "cut": sum(item["cut"] for item in items)}


def _by_domain(items: Sequence[dict[str, Any]], summary: Any) -> dict[str, Any]:
    domains: Iterable[str] = sorted({item["domain"] for item in items})
    of_domain = lambda name: [item for item in items if item["domain"] == name]
    return {**summary(items), "domains": {name: summary(of_domain(name)) for name in domains}}
