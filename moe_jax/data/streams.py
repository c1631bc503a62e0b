"""Documents laid end to end without end, and which of several such streams each row reads: closed forms, nothing is saved."""

import functools

import numpy as np

from moe_jax.data.token_store import SplitTokens

MIXING_BLOCK_ROWS = 1024
SHUFFLED_BLOCK_ROWS = 65_536


def seeded_bits(*key: int) -> np.random.BitGenerator:
    """Random bits that depend on the key alone, on every machine and with every NumPy.

    (The raw bits of Philox are guaranteed not to change between NumPy versions; `Generator.permutation` is not.)
    """
    return np.random.Philox(np.random.SeedSequence([value % 2**64 for value in key]))


def seeded_permutation(count: int, *key: int) -> np.ndarray:
    """int64 [count]: a permutation that depends on the key alone."""
    return np.argsort(seeded_bits(*key).random_raw(count), kind="stable")


class Stream:
    """Documents laid end to end, in a new order each epoch: token p of the endless stream, for any p."""

    def __init__(self, tokens: SplitTokens, documents: np.ndarray, key: tuple[int, ...], reshuffle: bool = True):
        self.tokens, self.documents, self.key, self.reshuffle = tokens, documents, key, reshuffle
        self.lengths = np.diff(tokens.offsets_D)[documents]
        self.num_tokens = int(self.lengths.sum())
        # A batch reads one or two epochs; steps may be asked for in any order, so keep a few.
        self._order = functools.lru_cache(maxsize=3)(self._compute_order)
        self._shuffled = functools.lru_cache(maxsize=3)(self._compute_shuffled)

    def _compute_shuffled(self, block: int, rows: int) -> np.ndarray:
        return seeded_permutation(rows, *self.key, 7, block)

    def places(self, numbers: np.ndarray, length: int, finite: bool = False) -> np.ndarray:
        """Where on the stream, in rows of `length` tokens, the rows called `numbers` lie: shuffled within blocks.

        A finite stream is one block; numbers past its end stay where they are.
        """
        rows = -(-self.num_tokens // length) if finite else max(1, self.num_tokens // length)
        block_rows = max(1, rows) if finite else min(rows, SHUFFLED_BLOCK_ROWS)
        blocks, offsets = np.divmod(numbers, block_rows)
        places = np.array(numbers, np.int64)
        for block in np.unique(blocks):
            if not (finite and block > 0):
                chosen = blocks == block
                places[chosen] = block * block_rows + self._shuffled(int(block), block_rows)[offsets[chosen]]
        return places

    def _compute_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(documents in their order, int64 [documents + 1] stream position at which each begins)."""
        permutation = seeded_permutation(len(self.documents), *self.key, epoch if self.reshuffle else 0)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths[permutation])])
        return self.documents[permutation], starts

    def read(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Stream positions begin..end-1 as (token, document index in the split, serial), each [end - begin].

        serial numbers the documents of the answer; it differs between neighbours of different documents.
        """
        parts = []
        while begin < end:
            epoch, offset = divmod(begin, self.num_tokens)
            take = min(end - begin, self.num_tokens - offset)
            parts.append(self._read_epoch(epoch, offset, offset + take))
            begin += take
        token = np.concatenate([part[0] for part in parts])
        document = np.concatenate([part[1] for part in parts])
        serials, first = [], 0
        for part in parts:
            serials.append(part[2] + first)
            first = int(serials[-1][-1]) + 1
        return token, document, np.concatenate(serials)

    def _read_epoch(self, epoch: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        documents, starts = self._order(epoch)
        first = int(np.searchsorted(starts, begin, side="right")) - 1
        last = int(np.searchsorted(starts, end, side="left"))
        covered = documents[first:last]
        bounds = np.clip(starts[first : last + 1], begin, end)
        serial = np.repeat(np.arange(len(covered)), np.diff(bounds))
        # Place in the store = place in the stream, moved by the same distance for all tokens of a document.
        distance = self.tokens.offsets_D[covered] - starts[first:last]
        token = self.tokens.tokens_N[np.arange(begin, end) + distance[serial]]
        return token, covered[serial], serial

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of positions in the first epoch: (document index in the split, which of its tokens it is)."""
        documents, starts = self._order(0)
        which = np.searchsorted(starts, positions, side="right") - 1
        return documents[which], positions - starts[which]


class Mixture:
    """Which stream each row reads, and which row of that stream it is, by weights; closed form in the row number."""

    def __init__(self, weights: np.ndarray, seed: int):
        exact = weights * MIXING_BLOCK_ROWS
        quota = np.floor(exact).astype(np.int64)
        quota[(weights > 0) & (quota == 0)] = 1
        # Largest remainders fill the block; the largest quotas give back what rounding up took.
        while quota.sum() < MIXING_BLOCK_ROWS:
            quota[np.argmax(np.where(weights > 0, exact - quota, -np.inf))] += 1
        while quota.sum() > MIXING_BLOCK_ROWS:
            quota[np.argmax(quota)] -= 1
        self.quota, self.seed = quota, seed
        self._block = functools.lru_cache(maxsize=8)(self._compute_block)

    def _compute_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each row of the block: (its stream, how many earlier rows of the block read the same stream)."""
        streams = np.repeat(np.arange(len(self.quota)), self.quota)
        streams = streams[seeded_permutation(MIXING_BLOCK_ROWS, self.seed, 1, block)]
        earlier = np.empty(MIXING_BLOCK_ROWS, np.int64)
        for stream in range(len(self.quota)):
            is_stream = streams == stream
            earlier[is_stream] = np.arange(is_stream.sum())
        return streams, earlier

    def rows(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(stream, row within the stream), each int64 [end - begin]; rows of one stream are consecutive."""
        streams, numbers = [], []
        while begin < end:
            block, offset = divmod(begin, MIXING_BLOCK_ROWS)
            take = min(end - begin, MIXING_BLOCK_ROWS - offset)
            stream, earlier = (array[offset : offset + take] for array in self._block(block))
            streams.append(stream)
            numbers.append(block * self.quota[stream] + earlier)
            begin += take
        return np.concatenate(streams), np.concatenate(numbers)
