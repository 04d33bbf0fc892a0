"""A first registered vertebra: `python -m experiments.demo --out=OUT`.

Makes a phantom patient's CT and two X-rays of it, registers L3 without a start pose, and says where its report is. Nothing is
trained. OUT also holds the inputs as a user has them, ap.npy, lat.npy and cameras.json, to try other commands with.
"""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from absl import flags

from data_pipelines import cases
from data_pipelines.io import camera_files
from data_pipelines.io import files
from data_pipelines.phantom import scan_files
from data_pipelines.phantom.generate import PhantomConfig
from data_pipelines.simulation import case_files
from data_pipelines.simulation import quick
from experiments.patients import registering
from experiments.patients import starts
from experiments.patients import untrained
from experiments.patients import workdir
from experiments.patients.registering import Row
from experiments.reports import overview
from experiments.runtime import cli
from experiments.runtime.kept_programs import kept
from radgs_jax.geometry.xray import XRay
from radgs_jax.levels import level_name

PHANTOM = PhantomConfig(spacing_mm=(1.0, 1.0, 1.5), levels=(19, 20, 21, 22, 23, 24))
SEED = 31000
"""Of the phantom and its X-rays; no model was trained on it."""
LABEL = 22
VARIANT = "real"
VIEWS = ("ap", "lat")
"""Names of the X-rays' files."""


def run_demo(out: pathlib.Path | str) -> pathlib.Path:
    """Makes the patient, registers the vertebra, and writes everything to `out`, a new folder, unless that has been done before.

    Returns:
      path of the page.
    Raises:
      InputError: a folder that is not new or cannot be written.
    """
    out = pathlib.Path(out).resolve()
    page = out / "registered" / overview.NAME
    if page.exists():
        print("the demo is there already; another --out makes it again")
        return page
    files.check_new(out)
    print("1/3 a phantom patient: CT and labels")
    (subject,) = scan_files.phantoms(out / "patient", [SEED], PHANTOM)
    print("2/3 two X-rays of the patient, who has moved")
    path = case_files.simulated_cases(
        out / "xrays" / "cases.json", [subject], [LABEL], 1, [(10.0, 20.0)], SEED, quick.PanelFaults(), (VARIANT,)
    )
    case_file = cases.read(path)
    (scene,) = case_file.scenes.values()
    target, xrays = workdir.target_of(case_file.volumes[scene.volume]), cases.read_xrays(scene, VARIANT)
    inputs = _write_inputs(out, target, xrays)
    print("3/3 L3 in the X-rays")
    prepared = untrained.shipped_loader(None)(target)
    start, _ = starts.start_from_body([prepared], xrays, kept)
    row = Row("L3", target, xrays, start, cases.truth(case_file, scene))
    registering.register_rows([row], lambda _: prepared, out / "registered", say=print)
    print(f"the same, from files: {sys.executable} -m experiments.register {' '.join(inputs)} --out=OUT")
    return page


def _write_inputs(out: pathlib.Path, target: workdir.Target, xrays: Sequence[XRay]) -> list[str]:
    """Writes the X-rays and cameras as files of a user, and returns `register`'s flags that name them."""
    paths = [out / f"{name}.npy" for name in VIEWS]
    for path, xray in zip(paths, xrays, strict=True):
        np.save(path, xray.line_integrals)
    views = [camera_files.camera_json(xray.camera, name) for xray, name in zip(xrays, VIEWS)]
    files.write_json(out / "cameras.json", views)
    return [
        f"--ct={target.ct} --mask={target.mask} --label={level_name(LABEL)}",
        f"--xrays={','.join(map(str, paths))} --cameras={out / 'cameras.json'}",
    ]


def define_flags() -> None:
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_string("out", None, "New folder for the patient, the X-rays and the results.", required=True)


def main() -> None:
    """Runs `run_demo` with the flags; raises as it."""
    print(f"open {run_demo(flags.FLAGS.out)}")


def command() -> None:
    """Runs the command; the console script calls this."""
    cli.run(main, define_flags)


if __name__ == "__main__":
    command()
