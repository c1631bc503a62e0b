"""The text of a compiled program (``compiled.as_text()``) as instructions; rounds of loops; the compiler's estimates."""

import dataclasses
import math
import re
from typing import Callable


@dataclasses.dataclass(frozen=True)
class Instruction:
    """``name = shape opcode(operands), rest``, as it stands in the text; operands are names."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    argument: str
    rest: str
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """``name=value`` up to the next comma, of simple attributes."""
        match = re.search(rf"(?:^|[ ,]){name}=%?([\w.\-\"]+)", self.rest)
        return match.group(1).strip('"') if match else None

    def called(self) -> list[str]:
        """Computations that run as a part of this instruction."""
        names = [self.attribute(name) for name in ("calls", "body")]
        if self.opcode == "call":
            names.append(self.attribute("to_apply"))
        return [name for name in names if name]

    def branches(self) -> list[str]:
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        if listed:
            return [name.strip().lstrip("%") for name in listed.group(1).split(",")]
        return [name for name in map(self.attribute, ("true_computation", "false_computation")) if name]


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, each a list of instructions in order, and the number of devices the groups count in."""

    computations: dict[str, dict[str, Instruction]]
    entry: str
    devices: int

    def root(self, computation: str) -> Instruction:
        return next(each for each in self.computations[computation].values() if each.is_root)


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LEFT = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (?=\S)")
_OPCODE = re.compile(r" ?([\w\-]+)\(")


def parse(hlo_text: str) -> Program:
    """The instructions of a compiled program's text.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations, entry, current = {}, None, None
    for line in hlo_text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header.group(2)] = {}
            entry = header.group(2) if header.group(1) else entry
        elif current is not None and (instruction := _instruction(line)):
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of a compiled program (compiled.as_text()).")
    head = hlo_text[: hlo_text.find("\n")]
    sizes = [re.search(rf"\b{name}=(\d+)", head) for name in ("replica_count", "num_partitions")]
    return Program(computations, entry, math.prod(int(size.group(1)) if size else 1 for size in sizes))


def _instruction(line: str) -> Instruction | None:
    left = _LEFT.match(line)
    if not left:
        return None
    start = left.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.find(" ", start)
    opcode = _OPCODE.match(line, end)
    if not opcode:
        return None
    close = _closing(line, opcode.end() - 1)
    argument = line[opcode.end():close]
    # A name comes last: older programs write each operand's shape before it.
    operands = tuple(re.findall(r"%([\w.\-]+)", argument)) if "%" in argument else tuple(
        part.strip().split(" ")[-1] for part in re.sub(r"/\*.*?\*/", "", argument).split(",") if part.strip())
    return Instruction(left.group(2), line[start:end], opcode.group(1), operands, argument, line[close + 1:],
                       bool(left.group(1)))


def _closing(text: str, start: int) -> int:
    """Where the bracket at ``start`` is closed."""
    depth = 0
    for place in re.finditer(r"[()]", text[start:]):
        depth += 1 if place.group() == "(" else -1
        if depth == 0:
            return start + place.start()
    return len(text) - 1


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions) of an array's or a tuple's shape: ``"(bf16[2,3]{1,0}, u32[])"``; tokens are left out."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", shape)
    return [(dtype, tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size))
            for dtype, sizes in found if dtype != "token"]


def size_in_bytes(shape: str) -> int:
    """Bytes of the data of a shape, without padding."""
    return sum(-(-_bits(dtype) * math.prod(sizes) // 8) for dtype, sizes in arrays(shape))


def _bits(dtype: str) -> int:
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits.group(1)) if digits else 8


# Rounds of loops


def trip_count(program: Program, computation: str, loop: Instruction) -> int | None:
    """Rounds of a ``while``; None where they are decided as it runs.

    The compiler's own note if there is one; else, as TPU programs have none, read from a counter that goes by a constant
    step from a constant to a constant.
    """
    if noted := re.search(r'"?known_trip_count"?:\{"n":"(\d+)"\}', loop.rest):
        return int(noted.group(1))
    condition, body = loop.attribute("condition"), loop.attribute("body")
    test = _value(program, condition, program.root(condition).name, None)
    if not test or test[0] != "compare" or test[2][:1] != ("state",) or test[3][:1] != ("constant",):
        return None
    counter = test[2][1]
    following = program.root(body).operands
    start = program.computations[computation].get(loop.operands[0])
    if start is None or start.opcode != "tuple" or program.root(body).opcode != "tuple":
        return None
    first = _value(program, computation, start.operands[counter], None)
    step = _value(program, body, following[counter], None)
    if not first or first[0] != "constant" or not step or step[0] != "add" or ("state", counter) not in step:
        return None
    step = next((part[1] for part in step[1:] if part[0] == "constant"), 0)
    distance = test[3][1] - first[1] + (test[1] == "LE")
    return max(0, -(-distance // step)) if step > 0 and test[1] in ("LT", "LE", "NE") else None


_UNCHANGED = ("copy", "copy-start", "copy-done", "bitcast", "reshape", "convert")


def _value(program, computation, name, arguments):
    """What a scalar is, as a tuple: ("constant", n), ("state", i) of a loop's tuple, ("add", a, b), ("compare", how, a,
    b); None of anything else. ``arguments``: values of the parameters where the computation is a fusion's."""
    instruction = program.computations[computation].get(name)
    if instruction is None:
        return None
    if instruction.opcode == "constant":
        return ("constant", int(instruction.argument)) if re.fullmatch(r"-?\d+", instruction.argument) else None
    if instruction.opcode == "parameter":
        return arguments[int(instruction.argument)] if arguments else ("parameter",)
    if instruction.opcode not in (*_UNCHANGED, "get-tuple-element", "add", "compare", "fusion"):
        return None
    inner = [_value(program, computation, operand, arguments) for operand in instruction.operands]
    if None in inner or not inner:
        return None
    if instruction.opcode in _UNCHANGED:
        return inner[0]
    if instruction.opcode == "get-tuple-element":
        return ("state", int(instruction.attribute("index"))) if inner[0] == ("parameter",) else None
    if instruction.opcode == "compare":
        return ("compare", instruction.attribute("direction"), *inner)
    if instruction.opcode == "fusion":
        called = instruction.attribute("calls")
        return _value(program, called, program.root(called).name, inner)
    return ("add", *inner)


# The compiler's estimate of time


def estimated_cycles(hlo_text: str, branch: Callable[..., int] = max) -> int | None:
    """The sum of the compiler's own estimates, loops multiplied; None where it gives none (CPUs).

    Good for comparing programs for one TPU only: kernels and most collectives have no estimate and count nothing. Of the
    branches of a conditional the dearest counts, and once the body of a loop whose rounds are decided as it runs; with
    ``branch=min`` the cheapest, and no round.
    """
    program = parse(hlo_text)
    cycles = _cycles(program, program.entry, branch)
    return cycles or None


def _cycles(program: Program, name: str, branch: Callable[..., int]) -> int:
    total = 0
    for instruction in program.computations[name].values():
        estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
        total += int(estimate.group(1)) if estimate else 0
        if instruction.opcode in ("while", "call"):
            rounds = trip_count(program, name, instruction) if instruction.opcode == "while" else 1
            total += (branch(0, 1) if rounds is None else rounds) * sum(_cycles(program, called, branch) for called in instruction.called())
        total += branch((_cycles(program, called, branch) for called in instruction.branches()), default=0)
    return total
