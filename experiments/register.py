"""Registers vertebrae of a CT in X-rays.

A case file: `python -m experiments.register --cases=C.json --variant=full --out=OUT`. One acquisition: `--ct --mask --label=20,21
--xrays=ap.npy,lat.npy --cameras=cameras.json --out=OUT`. The network is the shipped one, or with `--workdir=W` that of a prepared
workdir, where nothing is read from the CT. The start pose is read from --init, made of --points (a vertebra's centre in each view)
and the CT's own orientation, found by the workdir's localizer where it has one, or else by looking for the whole body. The function
behind this command is `experiments.patients.registering.register_rows`. The exit status is 0 if every case was registered, 1 if
some could not be, 2 if none could, and with --strict 3 if a pose was refused.
"""

from absl import flags

from data_pipelines.xrays import read_options
from experiments.runtime import cli
from experiments.runtime import endings
from experiments.runtime import input_flags
from experiments.runtime import shards


def define_flags() -> None:
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_string("cases", None, "Case file; all its cases are registered.")
    flags.DEFINE_string("variant", "full", "Array of the X-ray files to register, with --cases.")
    input_flags.define_scan()
    input_flags.define_xrays("--ct")
    flags.DEFINE_enum(
        "values",
        None,
        read_options.VALUES,
        "What the X-rays' numbers are; default: what DICOM's tags say, line integrals elsewhere.",
    )
    flags.DEFINE_integer("sign", None, "1: a larger number means more X-rays; -1: fewer; default: DICOM's tag, else 1.")
    flags.DEFINE_integer(
        "bits",
        None,
        "Bits of a stored number; default: DICOM's BitsStored. Needed for inverted intensities in other files.",
        lower_bound=read_options.BITS_RANGE[0],
        upper_bound=read_options.BITS_RANGE[1],
    )
    flags.DEFINE_string(
        "init",
        None,
        "Start pose world_from_ct: a 4x4 matrix in JSON, or an earlier pose.json or pose.tfm; default: a localizer finds it.",
    )
    flags.DEFINE_string("points", None, "'u,v;u,v': the vertebra's centre in each view, in pixels, instead of --init.")
    flags.DEFINE_string(
        "axis",
        None,
        "'u,v;u,v': a second point in each view, on the bone's axis towards the CT's top; with --points. All turns are tried.",
    )
    flags.DEFINE_bool("raw", False, "Short for --values=intensity.")
    flags.DEFINE_float(
        "air",
        None,
        "Pixel value where the beam passes nothing, after DICOM's rescaling and inversion; default: the brightest pixels.",
    )
    flags.DEFINE_list("flat", None, "One image per view of the beam without a patient.")
    flags.DEFINE_float("log_scale", None, "How much a stored number grows when ln(I) grows by 1, with --values=log.")
    flags.DEFINE_list("dark", None, "One image per view of the panel without a beam, for intensities.")
    flags.DEFINE_float(
        "saturation", None, "Stored number of a saturated pixel; default: the end of the range of --bits."
    )
    flags.DEFINE_list(
        "frame", None, "Number of the frame, from 0, in files with several: one for all views, or one per view."
    )
    flags.DEFINE_bool("collimator", True, "Search for the collimator's border where the file gives none.")
    flags.DEFINE_bool("mirrored", False, "The X-rays and cameras show the mirror image of what the source sees.")
    flags.DEFINE_string(
        "workdir", None, "Folder that `experiments.prepare` made; default: the CT is read, with the shipped network."
    )
    flags.DEFINE_bool("cache", True, "Keep what is extracted from the CT in the user's cache, and take it from there.")
    flags.DEFINE_string("out", None, "New folder for the results.", required=True)
    flags.DEFINE_integer("passes", None, "Passes of the network; default: 5.", lower_bound=1, upper_bound=50)
    flags.DEFINE_bool(
        "reconstruct", False, "Also reconstruct the vertebra with the network, at the pose that was found."
    )
    flags.DEFINE_bool("refine", True, "Refine the network's pose against the X-rays themselves.")
    flags.DEFINE_list(
        "camera_sd",
        None,
        "How far the cameras are off, mm and degrees (root mean square), such as 1.0,0.3: they are then corrected; default: not at "
        "all, and by what is usual where they are DICOM's nominal ones.",
    )
    flags.DEFINE_float(
        "distortion_sd",
        0.0,
        "How far the X-rays are stretched at their field's border, as a fraction of its radius, such as 0.03 of an image "
        "intensifier: this is then fitted.",
        lower_bound=0.0,
    )
    flags.DEFINE_bool("together", False, "Also refine the trusted vertebrae of --label together, into spine.json.")
    flags.DEFINE_bool("strict", False, f"End with status {endings.REFUSED} if a pose is refused.")
    flags.DEFINE_bool(
        "resume", False, "Go on with the cases that a stopped run with the same flags has left unfinished."
    )
    shards.define()
    flags.DEFINE_bool("pictures", True, "Also write each case's picture, volumes and transform, not only results.json.")
    flags.DEFINE_bool("slicer", False, "Also write each case's scene for 3D Slicer, with the CT.")


def main() -> None:
    """Registers what the flags name; raises as `register_command.run`."""
    # Imported here, so that --help need not wait for jax.
    from experiments.patients import register_command

    register_command.run()


def command() -> None:
    """Runs the command; the console script calls this."""
    cli.run(main, define_flags, log_in="out")


if __name__ == "__main__":
    command()
