"""What is installed here, and what runs: `python -m experiments.doctor`, or `radgs-doctor`.

Versions, devices, which backend each operator takes and why not the others, the extras that are missing, and what is kept for the
next start. Send its output with a question.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
from typing import Any

import jax
from absl import flags

import radgs_jax
from experiments.patients import models
from experiments.runtime import cli
from kernels.common import private_cache
from kernels.tools import operators

LIBRARIES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "optax", "numpy", "scipy", "nibabel", "pydicom")
EXTRAS = {
    "dicom": ("pydicom", "gdcm"),
    "serve": ("starlette", "uvicorn"),
    "train": ("optax", "chex", "grain", "array_record", "tensorflow_datasets"),
}
"""Of each extra of the package: modules that it brings."""
SPEC = "tiny"
"""Arguments that backends are tried with."""


def examine() -> dict[str, Any]:
    """All of it as plain values: versions, machine, kernels, extras, model, kept."""
    machine = {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
    }
    base = models.base_folder()
    return {
        "versions": {
            "radgs_jax": radgs_jax.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in LIBRARIES},
        },
        "machine": machine,
        "kernels": {op: _backends(op) for op in operators.OPERATORS},
        "extras": {extra: [n for n in names if not importlib.util.find_spec(n)] for extra, names in EXTRAS.items()},
        "model": {"folder": str(base), "there": (base / "manifest.json").exists()},
        "kept": _kept(),
    }


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _backends(op):
    """Backend -> None where it runs here, or why it does not; the first that runs is taken."""
    spec, found = operators.OPERATORS[op].specs.SPECS[SPEC], {}
    for name in operators.OPERATORS[op].backends:
        try:
            operators.resolve(op, spec, name)
            found[name] = None
        except NotImplementedError as reason:
            found[name] = str(reason).removeprefix(f"{op}: ")
    return found


def _kept():
    """Folder, and MB and number of files of each of its parts; or why nothing is kept."""
    _, reason = private_cache.find("xla")
    if reason:
        return {"reason": reason}
    sizes = {}
    for part in sorted(path for path in private_cache.root().iterdir() if path.is_dir()):
        files = [path.stat().st_size for path in part.rglob("*") if path.is_file()]
        sizes[part.name] = {"files": len(files), "mb": round(sum(files) / 1e6, 1)}
    return {"folder": str(private_cache.root()), "parts": sizes}


def describe(found: dict[str, Any]) -> str:
    """What `examine` has found, for people."""
    lines = [f"{name} {version or 'missing'}" for name, version in found["versions"].items()]
    text = ["versions: " + ", ".join(lines)]
    text += [f"{name}: {value}" for name, value in found["machine"].items()]
    for op, backends in found["kernels"].items():
        taken = next((name for name, reason in backends.items() if reason is None), "nothing that runs")
        others = "; ".join(f"{name}: {reason or 'runs, too'}" for name, reason in backends.items() if name != taken)
        text.append(f"{op}: takes {taken} ({others})")
    for extra, missing in found["extras"].items():
        text.append(f"extra {extra}: {f'without {chr(44).join(missing)}' if missing else 'complete'}")
    text.append(f"base model: {found['model']['folder']}{'' if found['model']['there'] else ', which is not there'}")
    kept = found["kept"]
    text.append(f"kept for the next start: {kept.get('folder') or 'nothing: ' + kept['reason']}")
    text += [f"  {part}: {size['files']} files, {size['mb']} MB" for part, size in kept.get("parts", {}).items()]
    return "\n".join(text)


def define_flags() -> None:
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_bool("json", False, "Print JSON.")


def main() -> None:
    """Prints what `examine` finds."""
    found = examine()
    print(json.dumps(found, indent=1) if flags.FLAGS.json else describe(found))


def command() -> None:
    """Runs the command; the console script calls this."""
    cli.run(main, define_flags)


if __name__ == "__main__":
    command()
