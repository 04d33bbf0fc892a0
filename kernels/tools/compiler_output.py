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


def parse_collectives(hlo: str) -> dict[str, int]:
    """Number, by opcode, of the operations in an HLO text that move data between devices."""
    names = "all-gather|all-reduce|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast|reduce-scatter"
    return dict(collections.Counter(re.findall(rf"(?<![\w-])({names})(?:-start)?\(", hlo)))
