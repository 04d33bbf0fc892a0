"""Our operators and DiffDRR's trilinear renderer, timed in turns."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any
from typing import cast
from typing import IO
from typing import Literal

import jax
import numpy as np

from kernels.drr.arg_specs import DrrSpec
from kernels.tools import operators
from kernels.tools import process
from kernels.tools import timing
from kernels.tools.operators import Spec

DIFFDRR_SAMPLES = 128
"""Samples per ray that DiffDRR takes: as many as `drr` takes through the middle of the crop of 96^3 voxels at its step of
0.75 mm. Its time is about proportional to it."""

# OpenMP's threads keep spinning for a while after their work, on the processors that we measure next; in s, chosen by hand.
_SETTLE_S = 0.02


class Peer:
    """DiffDRR in a process of its own.

    Attributes:
      missing: the reason why that Python has no DiffDRR, or None.
    """

    def __init__(self, python: str, spec: DrrSpec, thread_count: int) -> None:
        """Starts the process.

        Args:
          python: path of the Python that has DiffDRR.
          spec: what it renders.
          thread_count: number of threads that it may use.
        """
        self.missing: str | None = None
        volume, affine, intrinsics = spec.arrays()
        matrix = np.eye(4)
        matrix[:3] = spec.spacing_mm * affine[0].astype(np.float64)
        matrix[:3, 3] -= 0.5 * spec.spacing_mm * (np.array(spec.shape) - 1)
        self._folder = tempfile.TemporaryDirectory()
        folder = pathlib.Path(self._folder.name)
        np.save(folder / "volume.npy", volume)
        np.save(folder / "weights.npy", np.asarray(operators.inputs("drr", spec)[1][0]))
        self._image = folder / "image.npy"
        settings = {
            "volume": str(folder / "volume.npy"),
            "weights": str(folder / "weights.npy"),
            "spacing_mm": spec.spacing_mm,
            "matrix": matrix.tolist(),
            "pixels": spec.size,
            "focal_px": float(intrinsics[0, 0]),
            "samples": DIFFDRR_SAMPLES,
            "threads": thread_count,
        }
        script = pathlib.Path(__file__).with_name("peer_diffdrr.py")
        self._process = subprocess.Popen(
            [python, "-I", str(script), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        # Pipes were asked for above, so all three are there.
        self._to, self._from, self._errors = (
            cast(IO[str], stream) for stream in (self._process.stdin, self._process.stdout, self._process.stderr)
        )
        first = self._from.readline()
        if not first:
            self.missing = (self._errors.read().strip().splitlines() or ["it ended without a word"])[-1]
        else:
            self.missing = json.loads(first).get("missing")

    def _ask(self, line):
        self._to.write(line + "\n")
        self._to.flush()
        answer = self._from.readline().strip()
        if not answer:
            raise RuntimeError(f"DiffDRR stopped: {self._errors.read().strip()[-500:]}")
        return answer

    def timer(self, what: Literal["forward", "both"]) -> timing.Timer:
        """A timer of one rendering, or of one with the gradient to the pose; the process takes the time itself."""

        def run():
            seconds = float(self._ask(what))
            time.sleep(_SETTLE_S)
            return seconds

        return run

    def image(self) -> np.ndarray:
        """The rendered image, (height, width)."""
        self._ask(f"image {self._image}")
        return np.load(self._image)

    def close(self) -> None:
        """Ends the process by closing its standard input, and removes its files."""
        self._process.communicate()
        self._folder.cleanup()


def _race_here(python, crop, ours, thread_count, seconds):
    if thread_count < process.threads() and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:thread_count])
    peer = Peer(python, crop, thread_count)
    try:
        if peer.missing:
            return {"missing": peer.missing}
        timers: dict[Any, timing.Timer] = {
            ("diffdrr", "forward"): peer.timer("forward"),
            ("diffdrr", "both"): peer.timer("both"),
        }
        quantities: tuple[timing.Quantity, ...] = ("forward", "both", "to_pose")
        for op, (spec, implementation) in ours.items():
            for what in quantities:
                timers[op, what] = timing.timer(op, spec, implementation, what)
        medians = timing.take_turns(timers, seconds)
        result = {
            "threads": thread_count,
            "diffdrr_forward_ms": 1e3 * medians["diffdrr", "forward"],
            "diffdrr_to_pose_ms": 1e3 * medians["diffdrr", "both"],
        }
        for op in ours:
            result |= {f"{op}_{what}_ms": 1e3 * medians[op, what] for what in quantities}
            result[f"diffdrr_over_{op}"] = medians["diffdrr", "both"] / medians[op, "to_pose"]
        # Both render the crop from the same arrays; a large difference would show that the comparison is unfair.
        image = np.asarray(jax.jit(operators.of_arrays("drr", crop, None))(*operators.inputs("drr", crop)[0]))[0]
        result["image_difference"] = float(np.linalg.norm(peer.image() - image) / np.linalg.norm(image))
        return result
    finally:
        peer.close()


def against_diffdrr(
    python: str | None, crop: DrrSpec, ours: Mapping[str, tuple[Spec, str | None]], seconds: float
) -> list[dict[str, Any]] | None:
    """Times our operators and DiffDRR in turns, forward and backward to the pose.

    Args:
      python: path of a Python that has DiffDRR; None for this one.
      crop: what DiffDRR renders.
      ours: operator -> (spec, implementation).
      seconds: time given to each measurement.
    Returns:
      A dict of times in ms and their ratios with one thread each, then one with all threads each. None, with a line on
      standard error, where that Python has no DiffDRR.
    """
    if python is None:
        if importlib.util.find_spec("diffdrr") is None:
            process.say("DiffDRR: not installed here; --diffdrr_python=PATH names a python that has it")
            return None
        python = sys.executable
    counts = [1] if hasattr(os, "sched_setaffinity") and process.threads() > 1 else []
    results = []
    for count in (*counts, process.threads()):
        process.say(f"DiffDRR and {' and '.join(ours)}, {count} thread(s) each")
        results.append(process.run_apart(_race_here, str(python), crop, ours, count, seconds))
        if "missing" in results[-1]:
            process.say(f"DiffDRR: {results[-1]['missing']}")
            return None
    return results


def worst(races: list[dict[str, Any]] | None, key: str) -> float | None:
    """The least value of `key` over the results of `against_diffdrr`; None where there are none."""
    return None if races is None else min(race[key] for race in races)
