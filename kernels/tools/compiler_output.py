"""Reading what compilers and assemblers write."""

import collections
import math
import re
from typing import Any

# Targets of the custom calls that Pallas kernels become.
_CALLS = ("__gpu$xla.gpu.triton", "tpu_custom_call")


def parse_ptxas(text: str) -> dict[str, dict[str, int]]:
    """Reads the output of `ptxas -v`: kernel -> `registers`, and bytes of `stack`, `spill_stores` and `spill_loads`."""
    result: dict[Any, dict[str, int]] = {}
    name = None
    for line in text.splitlines():
        if found := re.search(r"(?:Compiling entry function '|Function properties for )([^\s']+)", line):
            name = found[1]
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            sizes = zip(("stack", "spill_stores", "spill_loads"), map(int, found.groups()))
            result.setdefault(name, {}).update(sizes)
        elif found := re.search(r"Used (\d+) registers", line):
            result.setdefault(name, {})["registers"] = int(found[1])
    return {name: sizes for name, sizes in result.items() if "registers" in sizes}


def parse_launches(text: str) -> dict[str, dict[str, int]]:
    """Reads XLA's thunk_sequence.txt: kernel -> `grid` (blocks), `threads` (per block) and `shared` (bytes per block)."""
    pattern = r"(\S+) grid: \[([\d, ]+)\] threads: \[([\d, ]+)\]\s+shared_memory: (\d+) bytes"
    product = lambda sizes: math.prod(map(int, sizes.split(",")))
    return {
        name: {"grid": product(grid), "threads": product(threads), "shared": int(shared)}
        for name, grid, threads, shared in re.findall(pattern, text)
    }


def array_bytes(text: str) -> int:
    """Bytes of all arrays in HLO's text for shapes, such as `(f32[8,3]{1,0}, s32[])`; layouts are ignored."""
    total = 0
    for dtype, sizes in re.findall(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]", text):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
    return total


def parse_pallas_calls(hlo: str) -> list[dict[str, Any]]:
    """The Pallas kernels in an HLO text: `name` and `bytes`, those of all operands and results, each counted once."""
    result = []
    for line in hlo.splitlines():
        found = re.match(r'\s*(?:ROOT )?%?\S+ = (.*?) custom-call\(.*?custom_call_target="([^"]*)"', line)
        if not found or found[2] not in _CALLS:
            continue
        operands = re.search(r"operand_layout_constraints=\{((?:[^{}]|\{[^{}]*\})*)\}", line)
        name = re.search(r'[{,] ?name = "([^"]*)"', line) or re.search(
            r'op_name="(?:[^"]*/)?([^"/]+)/pallas_call', line
        )
        moved = array_bytes(found[1]) + array_bytes(operands[1] if operands else "")
        result.append({"name": name[1] if name else None, "bytes": moved})
    return result


_COLLECTIVES = (
    "all-gather|all-reduce|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast|reduce-scatter"
)


def parse_collectives(hlo: str) -> dict[str, int]:
    """Number, by opcode, of the operations in an HLO text that move data between devices."""
    return dict(collections.Counter(re.findall(rf"(?<![\w-])({_COLLECTIVES})(?:-start)?\(", hlo)))


def _instructions(hlo):
    """(opcode, bytes of the result, bytes of the operands) of each instruction in an HLO text."""
    sizes: dict[str, int] = {}
    for line in hlo.splitlines():
        found = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)", line)
        if found:
            name, shape, opcode, rest = found.groups()
            sizes[name] = array_bytes(shape)
            operands = re.findall(r"%([\w.\-]+)", rest.partition(")")[0])
            yield opcode, sizes[name], sum(sizes.get(operand, 0) for operand in operands)


def collective_bytes(hlo: str) -> dict[str, int]:
    """Bytes, by opcode, that a device gives to or takes from such operations: of their operands or results, if these are more."""
    found: collections.Counter[str] = collections.Counter()
    for opcode, result, operands in _instructions(hlo):
        if match := re.fullmatch(rf"({_COLLECTIVES})(-start)?", opcode):
            # What starts one, but for a sum, lists its operands among its results.
            listed = match[2] and match[1] != "all-reduce"
            found[match[1]] += max(result - operands * bool(listed), operands)
    return dict(found)


_MOVES_NOTHING = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional"}


def moved_bytes(hlo: str) -> int:
    """Bytes that a compiled program reads and writes if each operation reads its operands, and writes its results, once.

    Loops are left out: those of a training step are inside the kernels' own launches.
    """
    entry = hlo[hlo.find("\nENTRY") + 1 :]
    counted = (i for i in _instructions(entry) if i[0] not in _MOVES_NOTHING and not i[0].endswith("-done"))
    return sum(result + operands for _, result, operands in counted)
