"""Compiles an MoE layer for a TPU that is not there; run by test_two_level.py in a process of its own.

Prints one JSON line per config of the command line: for each exchange of rows in the order in which they start,
[direction, the products between its start and its end], a product by the letters of its einsum; None where it has no end
of its own (it is not asynchronous).
"""

import json
import re
import sys

from moe_jax.planning.slices import parse_slice, prepare_environment, tpu_devices

prepare_environment()

import jax  # noqa: E402
from tiny import config  # noqa: E402

from moe_jax.planning.layer import lowered_layer  # noqa: E402
from moe_jax.planning.program import parse  # noqa: E402
from moe_jax.sharding import make_mesh  # noqa: E402


def products(program, instructions):
    """The einsums of these instructions, also inside fusions."""
    found = []
    for each in instructions:
        inside = program.computations.get(each.attribute("calls") or "", {}).values() if each.opcode == "fusion" else ()
        for product in (each, *inside):
            letters = re.search(r"([A-Z]{2,3},[A-Z]{2,3}->[A-Z]{2,3})", product.rest)
            if product.opcode in ("dot", "convolution") and letters:
                found.append(letters.group(1))
    return found


def exchanges(text):
    program = parse(text)
    schedule = list(program.computations[program.entry].values())
    found = []
    for place, each in enumerate(schedule):
        if each.opcode not in ("all-to-all", "all-to-all-start"):
            continue
        direction = "backward" if "transpose(" in each.rest else "forward"
        ends = [later for later in range(place, len(schedule))
                if schedule[later].opcode == "all-to-all-done" and each.name in schedule[later].operands]
        found.append([direction, products(program, schedule[place:ends[0]]) if ends else None])
    return found


def main(*settings):
    devices = tpu_devices(parse_slice("v5e:4x4"))
    for values in map(json.loads, settings):
        run = config(model_d_model=512, model_dtype="bfloat16", model_vocab_size=64, model_num_layers=2, moe_d_ff=1024,
                     moe_num_experts=16, moe_group_size=256, data_sequence_length=256, data_batch_size=32, **values)
        mesh = make_mesh(dict(data=2, fsdp=1, expert=8, tensor=1), devices)
        with jax.set_mesh(mesh):
            print(json.dumps(exchanges(lowered_layer(run, mesh).compile().as_text())))


if __name__ == "__main__":
    main(*sys.argv[1:])
