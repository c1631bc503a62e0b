"""Conversations about held-out documentation, and what a model makes of their last answers.

A question is "What does NAME do?", its answer the first line of that docstring. The same answers are asked for in four
contexts: alone, as the second turn, as the last of as many turns about one module as fit into a row, and after as many
examples from other modules in one long question. Since the answers are the same tokens, nothing but the context differs.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from moe_jax.analysis.positions import drops_by_source
from moe_jax.analysis.recording import record_routing
from moe_jax.data.batches import empty_batch
from moe_jax.data.corpora import conversation
from moe_jax.data.documents import USER_HEADING, VALIDATION
from moe_jax.data.token_store import TokenStore
from moe_jax.data.vocabularies import PAD_ID, Vocabulary
from moe_jax.nn.moe import WITHOUT_DROPS
from moe_jax.sweeps import TrainedModel
from moe_jax.sweeps.definition import SweepError
from moe_jax.training.evaluate import loss_summary

CONTEXTS = ("single", "second", "multi-turn", "few-shot")
LONGEST_ANSWER = 100  # characters
FEWEST_BEFORE = 3  # turns, or examples, that must fit before the last question
HEADING = f"{USER_HEADING}\n"


@dataclasses.dataclass(frozen=True)
class Question:
    """In token ids. ask: the user's words without the heading, and the assistant's heading. answer: what comes then. turn: an
    earlier turn, whole. example: question and answer inside a longer question."""

    ask: np.ndarray
    answer: np.ndarray
    turn: np.ndarray
    example: np.ndarray

    @classmethod
    def of(cls, name: str, answer: str, vocabulary: Vocabulary) -> "Question":
        words = f"What does {name} do?"
        text = conversation([{"role": "user", "content": words}, {"role": "assistant", "content": answer}])
        ask = text.removeprefix(HEADING).removesuffix(f"{answer}\n")
        return cls(*map(vocabulary.encode, (ask, f"{answer}\n", f"{text}\n", f"{words} {answer}\n")))


def questions_by_module(store: TokenStore, vocabulary: Vocabulary) -> list[list[Question]]:
    """Of every held-out document of the domain ``docs``: the names in it, with the first line of what it says of each."""
    split, modules = store.splits[VALIDATION], []
    for document in np.flatnonzero(split.domain_D == store.domains.index("docs")).tolist():
        text = vocabulary.decode(split.tokens_N[split.offsets_D[document] : split.offsets_D[document + 1]].tolist())
        found = []
        for part in text.split("\n\n\n"):
            name, _, words = part.partition("\n\n")
            answer = words.partition("\n")[0].strip()
            if name.isidentifier() and 0 < len(answer) <= LONGEST_ANSWER:
                found.append(Question.of(name, answer, vocabulary))
        modules.append(found)
    return modules


Row = tuple[np.ndarray, np.ndarray]  # context and answer


def rows_of(modules: Sequence[Sequence[Question]], heading: np.ndarray, length: int, most: int) -> list[tuple[Row, ...]]:
    """For each question that is asked, at most ``most``, a row of each of ``CONTEXTS``, of at most ``length`` tokens.

    Questions with fewer than ``FEWEST_BEFORE`` turns or examples before them, for want of room or of questions, are left out.
    """
    rows = []
    for number, place in _alternating(modules):
        module, asked = modules[number], modules[number][place]
        same = [module[(place + shift) % len(module)] for shift in range(1, len(module))]
        foreign = [each for shift in range(1, len(modules)) for each in modules[(number + shift) % len(modules)]]
        room = length - len(heading) - len(asked.ask) - len(asked.answer)
        turns, examples = _fitting([each.turn for each in same], room), _fitting([each.example for each in foreign], room)
        if min(len(turns), len(examples)) >= FEWEST_BEFORE:
            contexts = ([heading], [turns[0], heading], [*turns, heading], [heading, *examples])
            rows.append(tuple((np.concatenate([*before, asked.ask]), asked.answer) for before in contexts))
        if len(rows) == most:
            break
    return rows


def _alternating(modules: Sequence[Sequence[Question]]) -> Iterator[tuple[int, int]]:
    """(module, place in it) of the first questions of all modules, then of the second ones, …"""
    for place in range(max(map(len, modules), default=0)):
        yield from ((number, place) for number, module in enumerate(modules) if place < len(module))


def _fitting(parts: Sequence[np.ndarray], room: int) -> Sequence[np.ndarray]:
    """The first parts, as many as have room together."""
    ends = np.cumsum([len(part) for part in parts])
    return parts[: np.searchsorted(ends, room, side="right")]


def batches_of(rows: Sequence[Sequence[Row]], batch_size: int, length: int) -> list[dict[str, np.ndarray]]:
    """Batches of :class:`moe_jax.data.batches.Batches`, a conversation per row; ``domain_ids`` is the context where the target
    is a token of the asked answer, -1 elsewhere; ``document_ids`` the number of the question."""
    batches, places = [], [(number, which) for number, contexts in enumerate(rows) for which in range(len(contexts))]
    for start in range(0, len(places), batch_size):
        batch = empty_batch(batch_size, length)
        for row, (number, which) in enumerate(places[start : start + batch_size]):
            context, answer = rows[number][which]
            tokens = np.concatenate([context, answer])
            here = slice(0, len(tokens))
            batch["target_ids"][row, here] = tokens
            batch["input_ids"][row, here] = np.concatenate([[PAD_ID], tokens[:-1]])
            batch["positions"][row, here] = np.arange(len(tokens))
            batch["valid"][row, here], batch["segment_ids"][row, here] = True, 1
            batch["document_ids"][row, here] = number
            batch["domain_ids"][row, len(context) : len(tokens)] = which
        batches.append(batch)
    return batches


def measure(model: TrainedModel) -> dict[str, float]:
    """``answers/<context>``: cross-entropy of the asked answers, nats per token; ``cost/<context>``: that minus ``answers/single``,
    what the context costs (below 0: it helps); ``drops/<context>``: share of the choices that were dropped where an answer is
    predicted, mean over layers.

    Raises:
      SweepError: no question fits.
    """
    data, config = model.run.data, model.config.data
    modules = questions_by_module(data.store, data.vocabulary)
    most = model.config.training.eval_batches * config.batch_size
    rows = rows_of(modules, data.vocabulary.encode(HEADING), config.sequence_length, most)
    if not rows:
        raise SweepError(f"data.sequence_length={config.sequence_length}: in no held-out documentation do {FEWEST_BEFORE + 1} turns fit "
                         f"into a row; set it higher, or data.max_bytes or data.validation_fraction.")
    batches = batches_of(rows, config.batch_size, config.sequence_length)
    # Contexts in the place of domains: evaluation and records then tell them apart.
    run = dataclasses.replace(model.run, data=dataclasses.replace(data, domains=list(CONTEXTS)))
    evaluator = dataclasses.replace(model, run=run).evaluator
    summary = loss_summary(evaluator.sums(model.params, model.bias_LE, batches, model.mode), list(CONTEXTS))["domains"]
    answers = {name: summary[name]["ce"] for name in CONTEXTS}
    metrics = {f"answers/{name}": value for name, value in answers.items()} | {
        f"cost/{name}": value - answers["single"] for name, value in answers.items() if name != "single"}
    drops = dict.fromkeys(CONTEXTS, 0.0)
    if model.config.moe_layers and model.mode.dispatch not in WITHOUT_DROPS:
        table = drops_by_source([record_routing(run, model.params, model.bias_LE, model.step, batches, model.mode)])
        for name in CONTEXTS:
            cells = table.where(domain=name)
            drops[name] = cells["dropped"].sum() / cells["choices"].sum()
    return metrics | {f"drops/{name}": value for name, value in drops.items()} | {"questions": len(rows)}
