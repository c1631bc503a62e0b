"""Which tokens compete for an expert's slots: how rows of tokens become groups."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.config import Config
from moe_jax.sharding import per_device


@dataclasses.dataclass(frozen=True)
class GroupLayout:
    """How ``[B, S]`` tokens become ``[G, T]``: consecutive tokens of one or more sequences, or one position of many.

    The number of groups follows the shape at hand, so that generation (S = 1) and evaluation (another B) work: a group
    takes as many sequences as the config says, or all that this device has if there are fewer.
    """

    batch: int
    length: int
    config: Config

    def _sizes(self, local_batch: int) -> tuple[int, int]:
        """Sequences per group and positions per group."""
        moe = self.config.moe
        sequences = self.config.sequences_per_group
        if local_batch % sequences:
            sequences = local_batch
        if moe.group_over == "batch":
            return sequences, 1
        if moe.group_over == "all":
            return local_batch, self.length
        positions = moe.group_size if 0 < moe.group_size < self.length else self.length
        return sequences, positions if self.length % positions == 0 else self.length

    def split(self, x_BS: jax.Array) -> jax.Array:
        """``[B, S, ...]`` to ``[G, T, ...]``; every device regroups its own sequences."""
        def local(x_bs):
            batch, length, *rest = x_bs.shape
            sequences, positions = self._sizes(batch)
            x = x_bs.reshape(batch // sequences, sequences, length // positions, positions, *rest)
            return jnp.swapaxes(x, 1, 2).reshape(-1, sequences * positions, *rest)
        return per_device(local, x_BS)

    def join(self, x_GT: jax.Array) -> jax.Array:
        """``[G, T, ...]`` back to ``[B, S, ...]``."""
        def local(x_gt):
            groups, tokens, *rest = x_gt.shape
            batch = groups * tokens // self.length
            sequences, positions = self._sizes(batch)
            x = x_gt.reshape(batch // sequences, self.length // positions, sequences, positions, *rest)
            return jnp.swapaxes(x, 1, 2).reshape(batch, self.length, *rest)
        return per_device(local, x_GT)
