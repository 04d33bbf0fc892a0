"""A page in the browser that registers a vertebra: `python -m experiments.serve --workdir=W`, then open the address it prints.

It takes a CT, its label map, two X-rays and cameras.json, which are dropped there or picked from the folder where the server was
started, and the vertebra's centre clicked in both views. Only this machine can reach it, and only with the address that is
printed. Nothing is sent anywhere. Uploads and results are kept in --workdir. What can be done and seen: docs/page.md.
"""

import pathlib

from absl import flags

from experiments.runtime import cli
from radgs_jax import errors

LAST_PORT = 65535
EXTRA = ("starlette", "uvicorn")
"""Packages that only this command needs."""


def define_flags() -> None:
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_string("workdir", None, "Folder for uploads and results; made if missing.", required=True)
    flags.DEFINE_integer("port", 0, "Port on 127.0.0.1; 0 takes a free one.", lower_bound=0, upper_bound=LAST_PORT)


def main() -> None:
    """Serves the page until Ctrl-C.

    Raises:
      InputError: the extra `serve` is not installed, or the port or the folder cannot be had.
    """
    try:
        from experiments.serving import server
        from experiments.serving.sessions import Session
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        errors.fail("python", "packages", f"no {error.name}", "those of the extra: pip install '.[serve]'")
    given = flags.FLAGS
    workdir = pathlib.Path(given.workdir)
    session = Session(workdir / server.RESULTS)
    announce = lambda url, _: print(f"open {url}\nCtrl-C ends the server", flush=True)
    server.serve(session, workdir, pathlib.Path.cwd(), given.port, announce)


def command() -> None:
    """Runs the command; the console script calls this."""
    cli.run(main, define_flags)


if __name__ == "__main__":
    command()
