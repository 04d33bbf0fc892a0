"""The page's session: what is loaded, one job at a time in a thread of its own, and the latest result.

The registration is `register`'s: `one_acquisition.rows` and `register_rows` make the start pose, the pose, the verdict and the
files. What has been loaded, and the programs that were compiled, are kept between clicks.
"""

import concurrent.futures
import dataclasses
import functools
import math
import pathlib
import sys
import threading
import time
import traceback
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.ct import segmentation
from data_pipelines.io import files
from data_pipelines.xrays import radiograph
from data_pipelines.xrays.radiograph import Radiograph
from experiments.patients import models
from experiments.patients import one_acquisition
from experiments.patients import registering
from experiments.patients import untrained
from experiments.patients.one_acquisition import GivenStart
from experiments.patients.workdir import ScanDigests
from experiments.patients.workdir import Target
from experiments.reports import run_record
from experiments.runtime.kept_programs import kept
from experiments.serving import results
from experiments.serving import said
from experiments.serving.results import Result
from radgs_jax import errors
from radgs_jax.levels import level_name
from radgs_jax.registration import pipeline
from radgs_jax.registration.pipeline import RegisterOptions
from radgs_jax.registration.prepared import Prepared

VIEWS = 2
"""X-rays of an acquisition on the page."""
REVIEW, REVIEW_FORMAT = "review.json", "radgs-review/1"
"""File of a result that says that its pose was accepted by whoever looked at it."""

MakeLoader = Callable[[ScanDigests, untrained.BodyReader], Callable[[Target], Prepared]]
"""Makes the function from a target to its `Prepared`, as `untrained.shipped_loader`."""


class Busy(errors.InputError):
    """Something was asked for while something else is being done."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The files of an acquisition, and what they do not say themselves.

    Attributes:
      ct, mask: as `scans.read_scan` takes them.
      xrays: one file per view.
      cameras: a file for `view_geometry.read_calibration`; None uses DICOM's nominal geometry.
      labels: numbering of the mask; None recognises it.
      options: of the X-rays.
      camera_sd: how far the cameras are off, mm and degrees; None as `one_acquisition.assumed_camera_sd`.
    """

    ct: pathlib.Path
    mask: pathlib.Path
    xrays: tuple[pathlib.Path, ...]
    cameras: pathlib.Path | None = None
    labels: str | None = None
    options: radiograph.ReadOptions = radiograph.ReadOptions()
    camera_sd: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Loaded:
    """An acquisition that is ready to be registered.

    Attributes:
      number: counts what was loaded.
      xrays: the views; labels: VerSe numbers of the whole vertebrae, from head to feet.
      camera_sd: mm and degrees.
      load: from a target to its `Prepared`, cached; body: reads its scan; digests: of its files.
      warnings: what was said while it was read.
    """

    number: int
    inputs: Inputs
    xrays: Sequence[Radiograph]
    labels: Sequence[int]
    camera_sd: tuple[float, float]
    load: Callable[[Target], Prepared]
    body: untrained.BodyReader
    digests: dict[str, Any]
    warnings: Sequence[str]

    def target(self, label: int) -> Target:
        """A vertebra of the scan.

        Raises:
          InputError: it is not among `labels`.
        """
        if label not in self.labels:
            errors.fail("page", "level", level_name(label), ", ".join(map(level_name, self.labels)))
        inputs = self.inputs
        return Target(inputs.ct.name, inputs.ct, inputs.mask, label, inputs.labels)

    def shown(self) -> dict[str, Any]:
        """What the page shows of it, as plain values."""
        inputs = self.inputs
        names = [path.name for path in (inputs.ct, inputs.mask, *inputs.xrays, inputs.cameras) if path]
        return results.shown_inputs(self.number, names, self.xrays, self.labels, self.warnings)

    def options(self) -> RegisterOptions:
        """How its vertebrae are registered."""
        mm, degrees = self.camera_sd
        return RegisterOptions(camera_sd=(math.radians(degrees), mm))


class Session:
    """One user's work. Its public functions may be called from any thread; they raise `Busy` where a job has to end first."""

    def __init__(self, folder: pathlib.Path | str, make_loader: MakeLoader = untrained.shipped_loader) -> None:
        """Args: folder: where results go; make_loader: of the vertebrae."""
        self._folder, self._make_loader = pathlib.Path(folder), make_loader
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "registering")
        self._lock = threading.Lock()
        self._job, self._running, self._waiting, self._error = None, None, 0, ""
        self._loaded: Loaded | None = None
        self._result: Result | None = None
        self._loads = 0

    def close(self) -> None:
        """Waits for the job that is running, so that nothing unfinished is left, and drops those that wait."""
        self._worker.shutdown(cancel_futures=True)

    def load(self, inputs: Inputs) -> None:
        """Begins to read an acquisition, in place of the one that is loaded.

        Raises:
          InputError: not VIEWS X-rays.
        """
        if len(inputs.xrays) != VIEWS:
            errors.fail("page", "X-rays", len(inputs.xrays), VIEWS)
        self._begin("load", functools.partial(self._load, inputs))

    def prepare(self, label: int) -> None:
        """Begins to read a vertebra and its programs, so that its first registration is as quick as the next ones."""
        loaded = self._needed()
        self._begin("prepare", functools.partial(self._prepare, loaded, loaded.target(label)), beside=True)

    def register(self, label: int, points: Sequence[Sequence[float]] | None) -> None:
        """Begins to register a vertebra, from its centre (u, v) in each view, pixels, or from the whole body.

        Raises:
          InputError: nothing is loaded, an unknown level, or points that are not one in each view.
        """
        loaded = self._needed()
        target = loaded.target(label)
        if points is not None:
            _check_points(points, loaded.xrays)
        self._begin("register", functools.partial(self._register, loaded, target, points))

    def accept(self) -> None:
        """Writes that whoever looks at the latest result accepts its pose.

        Raises:
          InputError: there is none that may be used, or it cannot be written.
        """
        with self._lock:
            result = self._result
        if result is None or not result.written or not result.accepted:
            errors.fail("page", "result", "none that may be used", "a pose that was accepted")
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        files.write_json(result.folder / REVIEW, {"format": REVIEW_FORMAT, "pose_accepted": True, "time": when})
        self._change_result(result, reviewed=True)

    def result(self, name: str) -> Result:
        """The latest result, where that is its name.

        Raises:
          InputError: it is not.
        """
        with self._lock:
            result = self._result
        if result is None or result.name != name:
            errors.fail("page", "result", repr(name), "the latest one")
        return result

    def xray(self, view: int) -> Radiograph:
        """A view of what is loaded.

        Raises:
          InputError: there is none.
        """
        xrays = self._needed().xrays
        if not 0 <= view < len(xrays):
            errors.fail("page", "view", view, f"0 to {len(xrays) - 1}")
        return xrays[view]

    def state(self) -> dict[str, Any]:
        """What the page shows, as plain values."""
        with self._lock:
            job, running, loaded, result = self._job, self._running, self._loaded, self._result
            state = {"busy": self._waiting > 0, "error": self._error}
        # One that waits shows what it waits for.
        state["job"] = job and {**(running or job).shown(), "kind": job.kind, "beside": job.beside}
        state["loaded"] = loaded and loaded.shown()
        state["result"] = result and result.shown()
        return state

    def _needed(self):
        with self._lock:
            if self._loaded is None:
                errors.fail("page", "images", "nothing loaded", "a CT, a mask and X-rays")
            return self._loaded

    def _begin(self, kind, work, beside=False):
        """Hands work to the worker. One that is `beside` others is done before what is asked for next, and never refused."""
        with self._lock:
            if not beside:
                if self._job is not None and not self._job.beside:
                    errors.fail("page", "state", f"{self._job.kind} under way", "it to end first", Busy)
                self._error = ""
            job = said.Job(kind, beside)
            if not beside or self._job is None:
                self._job = job
            self._waiting += 1
        self._worker.submit(self._run, job, work)

    def _run(self, job, work):
        error = ""
        with self._lock:
            self._running = job
        try:
            with said.telling(job):
                work(job)
        except (errors.InputError, errors.RunError) as found:
            error = str(found)
        except MemoryError:
            error = "memory: found too little, wanted enough: fewer or smaller inputs, or another machine"
        except Exception as found:  # a fault of this program, which must not end the page
            traceback.print_exc(file=sys.stderr)
            error = f"a fault of this program: {type(found).__name__}: {found}"
        with self._lock:
            # What a vertebra that was prepared early lacks, its registration says again.
            if not job.beside:
                self._error = error
            self._waiting, self._running = self._waiting - 1, None
            if self._job is job:
                self._job = None

    def _load(self, inputs, job):
        with self._lock:
            self._loaded = self._result = None
            self._loads += 1
        job.say("reading the X-rays")
        xrays = radiograph.read_views(list(map(str, inputs.xrays)), inputs.cameras, inputs.options)
        camera_sd = inputs.camera_sd
        if camera_sd is None:
            camera_sd = one_acquisition.assumed_camera_sd(xrays)
        job.say("reading the mask")
        labels = segmentation.whole_vertebrae(inputs.mask, inputs.labels)
        job.say("reading the CT")
        digests, body = ScanDigests(), untrained.body_reader()
        found = {"xrays": [files.sha256(path) for path in inputs.xrays]}
        if inputs.cameras is not None:
            found["cameras"] = files.sha256(inputs.cameras)
        found["base"] = files.sha256(models.base_folder() / "manifest.json")
        load = functools.lru_cache(self._make_loader(digests, body))
        loaded = Loaded(self._loads, inputs, xrays, labels, camera_sd, load, body, found, job.warnings())
        found["scan"] = digests.of(loaded.target(labels[0]))
        # Its slices are shown, and what is wrong with it is said at once.
        body(loaded.target(labels[0]))
        with self._lock:
            self._loaded = dataclasses.replace(loaded, warnings=job.warnings())

    def _prepare(self, loaded, target, job):
        with self._lock:
            if self._loaded is not loaded:
                return
        job.say(f"reading {level_name(target.label)} from the CT")
        prepared = loaded.load(target)
        job.say("loading programs")
        pipeline.warm_up(prepared, loaded.xrays, loaded.options(), kept)

    def _register(self, loaded, target, points, job):
        record, level = run_record.RunRecord(), level_name(target.label)
        with self._lock:
            self._result = None
        job.say("looking for the body in the X-rays" if points is None else f"reading {level} from the CT")
        rows, reports = one_acquisition.rows(
            [target], loaded.xrays, loaded.load, GivenStart(points=points), loaded.inputs.cameras, say=job.note
        )
        job.say(f"registering {level}")
        out = results.new_place(self._folder, level)
        extra_files = {"detection.json": reports["body"]} if reports else {}
        extra_files["run.json"] = lambda _: record.finish(loaded.digests, [*loaded.warnings, *job.warnings()])

        def found(row, outcome, prepared):
            scan, _ = loaded.body(target)
            result = results.of(out, row, outcome, prepared, scan, loaded.options().camera_sd)
            result = dataclasses.replace(result, notes=job.notes(), warnings=job.warnings())
            with self._lock:
                self._result = result
            job.say("writing the report")

        registering.register_rows(
            rows, loaded.load, out, loaded.options(), extra_files=extra_files, inputs=loaded.digests, found=found
        )
        self._change_result(self._result, written=True, warnings=job.warnings())

    def _change_result(self, result, **changes):
        with self._lock:
            if self._result is result:
                self._result = dataclasses.replace(result, **changes)


def _check_points(points, xrays):
    wanted = f"{len(xrays)} points (u, v) in pixels of their views"
    if np.shape(points) != (len(xrays), 2):
        errors.fail("page", "centre", f"shape {np.shape(points)}", wanted)
    for (u, v), xray in zip(points, xrays):
        inside = -0.5 <= u <= xray.camera.width - 0.5 and -0.5 <= v <= xray.camera.height - 0.5
        if not inside:
            errors.fail("page", "centre", f"{u:g}, {v:g}", wanted)
