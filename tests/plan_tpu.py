"""Compiles steps for TPUs that are not there; run by test_compiled_plan.py in a process of its own.

Prints one JSON line.
"""

import dataclasses
import json
import math

import jax
import tiny

from moe_jax.planning.compiled import OutOfMemory, abstract_batch, compile_step
from moe_jax.planning.slices import parse_slice, tpu_devices
from moe_jax.sharding import make_mesh
from moe_jax.training.state import abstract_state

SLICE, SIZES = "v5e-4", {"data": 1, "fsdp": 2, "expert": 2, "tensor": 1}


def config(**settings):
    return tiny.config(**(dict(
        model_num_layers=2, model_d_model=256, model_num_heads=4, model_num_kv_heads=2, model_head_dim=64,
        model_vocab_size=512, model_dtype="bfloat16", moe_every=1, moe_num_experts=4, moe_d_ff=512, moe_row_exchange="auto",
        data_sequence_length=256, data_batch_size=4, optimizer_name="adamw") | settings))


def pair():
    """An encoder–decoder whose rows have two lengths."""
    return config(model_encoder_layers=2, attention_positions="relative", data_objective="span_corruption", data_target_length=128)


def own_bytes(tree):
    """Of the arrays as they lie on one device; a random key is two words of 32 bits."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * getattr(leaf.dtype, "itemsize", 8)
               for leaf in jax.tree.leaves(tree))


def main():
    said, slice_ = [], parse_slice(SLICE)
    found = {step: dataclasses.asdict(compile_step(config(), slice_, SIZES, step, said.append))
             for step in ("train", "decode")}
    found["pair"] = dataclasses.asdict(compile_step(pair(), slice_, SIZES, "train"))
    mesh = make_mesh(SIZES, tpu_devices(slice_))
    with jax.set_mesh(mesh):
        state = own_bytes(abstract_state(config(), 512, mesh))
    # 128 M rows of the table do not fit into 16 GB.
    try:
        compile_step(config(model_vocab_size=2**27, model_num_layers=1), slice_, SIZES, "decode")
        refused = None
    except OutOfMemory as error:
        refused = {"message": str(error), "needed": error.needed_bytes, "available": error.available_bytes}
    print(json.dumps({"said": said, "state_bytes": state, "batch_bytes": own_bytes(abstract_batch(config(), mesh)),
                      "refused": refused, "hbm_bytes": slice_.chip.hbm_bytes, **found}))


if __name__ == "__main__":
    main()
