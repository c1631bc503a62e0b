"""How much a compiled program computes and moves: floating-point operations of its products, bytes to and from memory.

XLA's own figures (``compiled.cost_analysis()``) count the body of a loop once on TPUs, whose programs do not note how often
it runs: a model of 32 scanned layers would have one. Here the compiled text is walked and loops are multiplied.
"""

import dataclasses
import math
import re

import numpy as np

from moe_jax.nn.splash import block_of
from moe_jax.planning.program import Instruction, Program, arrays, parse, size_in_bytes, trip_count


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one device in one run of a program.

    Attributes:
      flops: of matrix products (a multiply-add is two); elementwise arithmetic is left out. Kernels (Pallas) count what
        their authors declare, attention the blocks it computes.
      bytes: to and from the device's memory; what stays on the chip between two instructions does not count.
      kernel_flops: the part of ``flops`` inside kernels, which the compiler cannot see.
      uncounted_kernels: names of kernels that declare nothing and are not known here; they count 0.
    """

    flops: float = 0.0
    bytes: float = 0.0
    kernel_flops: float = 0.0
    uncounted_kernels: frozenset[str] = frozenset()

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.kernel_flops + other.kernel_flops,
                    self.uncounted_kernels | other.uncounted_kernels)

    def times(self, count: int) -> "Work":
        return dataclasses.replace(self, flops=self.flops * count, bytes=self.bytes * count,
                                   kernel_flops=self.kernel_flops * count)


def work(hlo_text: str, open_ended: int = 1) -> Work:
    """The work of a compiled program, from ``compiled.as_text()``. A loop whose rounds are decided as it runs counts as
    ``open_ended`` rounds; of the branches of a conditional the one with most FLOPs counts."""
    program = parse(hlo_text)
    return _of_computation(program, program.entry, open_ended)


def _of_computation(program: Program, name: str, open_ended: int) -> Work:
    total = Work()
    for instruction in program.computations[name].values():
        if instruction.opcode == "fusion":
            called = instruction.attribute("calls")
            total += Work(_products(program, called), _moved_by_fusion(program, name, instruction, called))
            continue
        for called in instruction.called():
            rounds = trip_count(program, name, instruction) if instruction.opcode == "while" else 1
            total += _of_computation(program, called, open_ended).times(open_ended if rounds is None else rounds)
        branches = [_of_computation(program, branch, open_ended) for branch in instruction.branches()]
        total += max(branches, key=lambda each: each.flops, default=Work())
        total += _of_instruction(program.computations[name], instruction)
    return total


# Instructions that move nothing: names, parts of asynchronous ones that were counted at their start, and constants.
_NOTHING = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
            "async-start", "async-update", "async-done", "partition-id", "replica-id", "iota", "opt-barrier")


def _of_instruction(computation, instruction: Instruction) -> Work:
    if instruction.opcode in _NOTHING or instruction.opcode.endswith(("-done", "-update")):
        return Work()
    if instruction.attribute("custom_call_target") == "tpu_custom_call":
        return _of_kernel(computation, instruction)
    operands = [computation[name] for name in instruction.operands if name in computation]
    flops = _product(computation, instruction) if instruction.opcode in ("dot", "convolution") else 0.0
    if instruction.opcode in ("dynamic-slice", "gather"):
        moved = 2 * _in_memory(instruction.shape)
    elif instruction.opcode == "dynamic-update-slice":
        moved = 2 * _in_memory(operands[1].shape)
    elif instruction.opcode == "copy-start":  # between memory and the chip: its result names both sides
        moved = _in_memory(instruction.shape)
    elif instruction.opcode.endswith("-start"):
        moved = sum(_in_memory(each.shape) for each in operands) * 2
    else:
        moved = _in_memory(instruction.shape) + sum(_in_memory(each.shape) for each in operands)
    return Work(flops, moved)


# Memory


def _in_memory(shape: str) -> int:
    """Bytes of the arrays of a shape that lie in the device's memory: a layout with S(n) names another place."""
    return sum(size_in_bytes(array) for array in re.findall(r"[a-z]\w*\[[\d,<=]*\](?:\{[^}]*\})?", shape)
               if not re.search(r"S\([1-9]\d*\)", array))


def _moved_by_fusion(program, name, fusion, called) -> int:
    """Operands and results, of those that are only sliced or only partly overwritten that part."""
    outer, inner = program.computations[name], program.computations[called]
    users = {}
    for each in inner.values():
        for operand in each.operands:
            users.setdefault(operand, []).append(each)
    total = 0
    for each in inner.values():
        if each.opcode == "parameter":
            operand = outer.get(fusion.operands[int(each.argument)])
            if operand is not None and _in_memory(operand.shape):
                total += _read(users, each, inner, _in_memory(operand.shape))
    results = program.root(called)
    written = [inner[part] for part in results.operands] if results.opcode == "tuple" else [results]
    places = re.findall(r"[a-z]\w*\[[\d,<=]*\](?:\{[^}]*\})?", fusion.shape)
    return total + sum(min(_in_memory(place), _written(each, inner)) for place, each in zip(places, written))


def _read(users, instruction, inner, whole):
    """Bytes that a fusion reads of a parameter of ``whole`` bytes."""
    total = 0
    for user in users.get(instruction.name, ()):
        if user.opcode == "bitcast":
            total += _read(users, user, inner, whole)
        elif user.opcode in ("dynamic-slice", "gather") and user.operands[0] == instruction.name:
            total += size_in_bytes(user.shape)
        elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == instruction.name):
            return whole
    return min(total, whole)


def _written(instruction, inner):
    while instruction.opcode == "bitcast":
        instruction = inner[instruction.operands[0]]
    if instruction.opcode == "dynamic-update-slice":
        return size_in_bytes(inner[instruction.operands[1]].shape)
    return size_in_bytes(instruction.shape)


# Products


def _products(program, name) -> float:
    total = 0.0
    for instruction in program.computations[name].values():
        if instruction.opcode in ("dot", "convolution"):
            total += _product(program.computations[name], instruction)
        for called in instruction.called():
            total += _products(program, called)
    return total


def _product(computation, instruction) -> float:
    left, right = (arrays(computation[name].shape)[0][1] for name in instruction.operands[:2])
    result = arrays(instruction.shape)[0][1]
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        sizes = [left[int(place)] for place in contracted.group(1).split(",") if place] if contracted else []
        return 2.0 * math.prod(result) * math.prod(sizes)
    return _convolution(left, right, result, instruction.rest)


def _convolution(left, right, result, rest) -> float:
    """TPU programs write every product as a convolution, whose spatial dimensions may be batches (windows that fit at one
    place only): multiply-adds are counted where the window lies inside, as XLA's own analysis does."""
    labels = re.match(r"(\w+)_(\w+)->(\w+)", re.search(r"dim_labels=([\w>\-]+)", rest).group(1)).groups()
    size = lambda which, letter: (left, right, result)[which][labels[which].index(letter)]
    groups = re.search(r"feature_group_count=(\d+)", rest), re.search(r"batch_group_count=(\d+)", rest)
    feature_groups, batch_groups = (int(match.group(1)) if match else 1 for match in groups)
    window = re.search(r"window=\{([^}]*)\}", rest)
    window = dict(part.split("=") for part in window.group(1).split()) if window else {}
    total = 2.0 * size(0, "f") / feature_groups * size(1, "o") * size(0, "b") / batch_groups
    for place, letter in enumerate(sorted(set(labels[0]) - set("bf"))):
        get = lambda name, default: window.get(name, "x".join([default] * 9)).split("x")[place]
        total *= _positions(size(0, letter), size(1, letter), size(2, letter), int(get("stride", "1")),
                            int(get("pad", "0_0").split("_")[0]), int(get("lhs_dilate", "1")), int(get("rhs_dilate", "1")))
    return total


def _positions(left: int, right: int, result: int, stride: int, pad: int, left_dilation: int, right_dilation: int) -> int:
    """Pairs (place of the window, place in the window) of one spatial dimension that meet an element."""
    if left == result and right == 1:
        return result
    at = (np.arange(result) * stride - pad)[:, None] + (np.arange(right) * right_dilation)[None]
    return int(np.count_nonzero((at >= 0) & (at % left_dilation == 0) & (at // left_dilation < left)))


# Kernels


def _of_kernel(computation, instruction) -> Work:
    moved = _in_memory(instruction.shape) + sum(_in_memory(computation[name].shape) for name in instruction.operands
                                                if name in computation)
    if declared := re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.rest):
        return Work(float(declared.group(1)), moved, float(declared.group(1)))
    name = re.sub(r"[.\d]+$", "", instruction.name)
    # Of a pair of blocks: q·k and p·v forward; for dq also do·v and ds·k; for dk and dv q·k, do·v, p·do and ds·q. So many
    # products are of the width of queries, and of values.
    kinds = {"splash_mha_fwd": (1, 1), "splash_mha_dq": (2, 1), "splash_mha_dkv": (2, 2)}
    products = next((count for kind, count in kinds.items() if name.startswith(kind)), None)
    if products is None:
        return Work(bytes=moved, uncounted_kernels=frozenset({name}))
    # Queries, keys and values, [B, H, S, d] or one sequence's, come first behind small integers, the grid of blocks
    # [1, queries, keys] among them. In a window it is narrower; the diagonal and what is below it in the grid are computed.
    operands = [array for operand in instruction.operands for array in arrays(computation[operand].shape)]
    queries, _, values, *_ = (sizes for dtype, sizes in operands if len(sizes) >= 3 and "f" in dtype)
    *batch, length, head = queries
    block = block_of(length)
    blocks = length // block
    width = min((min(sizes[-2:]) for dtype, sizes in operands if len(sizes) == 3 and dtype == "s8"), default=blocks)
    pairs = blocks * width - width * (width - 1) / 2
    flops = 2.0 * math.prod(batch) * (products[0] * head + products[1] * values[-1]) * block * block * pairs
    return Work(flops, moved, flops)
