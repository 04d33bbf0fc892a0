"""The C++ kernels, driven by `sanitize.cc` without Python, under the address, undefined-behaviour and thread sanitizers."""

import os
import pathlib
import shutil
import subprocess

import jax
import pytest

from kernels.common import ffi_build

TESTS = pathlib.Path(__file__).parent
SOURCES = [
    TESTS / "sanitize.cc",
    *(ffi_build.HEADERS.parent / name / f"{name}.cc" for name in ("splat", "voxelize", "drr")),
]
# Conversions of floats that no integer can hold are undefined too, and not part of "undefined".
SANITIZERS = {
    "address": ["-fsanitize=address"],
    "undefined": ["-fsanitize=undefined,float-cast-overflow", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}


def _command(flags, sources, program):
    """The flags of the real build without the optimisation, which would triple the time and hide stack frames."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler found")
    kept = [flag for flag in ffi_build.FLAGS if flag not in ("-O3", "-shared", "-fPIC")]
    march = ["-march=x86-64-v3"] if ffi_build._has_x86_64_v3() else []
    include = [f"-I{ffi_build.HEADERS}", f"-I{jax.ffi.include_dir()}"]
    return [compiler, *kept, *march, "-O1", "-g1", *flags, *include, *map(str, sources), "-o", str(program)]


def _build(flags, sources, program):
    """Compiles the sources side by side, then links them."""
    objects = [program.with_name(f"{source.stem}.o") for source in sources]
    jobs = [
        subprocess.Popen([*_command(flags, [source], built), "-c"], stderr=subprocess.PIPE, text=True)
        for source, built in zip(sources, objects)
    ]
    errors = [job.communicate()[1] for job in jobs]
    assert not any(job.returncode for job in jobs), "\n".join(errors)
    subprocess.run(_command(flags, objects, program), check=True, capture_output=True, text=True)


def _skip_without_runtime(flags, folder):
    """Runs an empty program, which fails where the sanitizer's runtime is missing or does not work."""
    source = folder / "nothing.cc"
    source.write_text("int main() { return 0; }\n")
    program = folder / "nothing"
    for command in (_command(flags, [source], program), [str(program)]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{flags[0]}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")


# Each takes half a minute of one core, most of it to compile.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("address", marks=pytest.mark.long),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("undefined", "thread")),
    ],
)
def test_kernels_run_clean(name, tmp_path):
    flags, program = SANITIZERS[name], tmp_path / "sanitize"
    _skip_without_runtime(flags, tmp_path)
    _build(flags, SOURCES, program)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr, f"exit {done.returncode}\n{done.stderr[-6000:]}"
    assert done.stdout == "all calls done\n"
