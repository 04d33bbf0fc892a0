"""Listens on this machine alone, and serves the page until a signal ends it."""

import pathlib
import socket
from collections.abc import Callable

import uvicorn

from data_pipelines.io import files
from experiments.serving import access
from experiments.serving import app
from experiments.serving.sessions import Session
from experiments.serving.user_files import StartFolder
from experiments.serving.user_files import Uploads
from radgs_jax import errors

ADDRESS = "127.0.0.1"
UPLOADS, RESULTS = "uploads", "results"
"""Folders of the workdir."""


def serve(
    session: Session,
    workdir: pathlib.Path | str,
    folder: pathlib.Path | str,
    port: int = 0,
    ready: Callable[[str, uvicorn.Server], None] = lambda url, server: None,
) -> None:
    """Serves the page until the server is told to end.

    Args:
      session: of the page.
      workdir: where uploads go; folder: whose files may be picked.
      port: 0 takes a free one.
      ready: takes the page's address, with its token, and the server, when the port is open.
    Raises:
      InputError: the port or the folder cannot be had.
    """
    token, uploads = access.new_token(), Uploads(files.make_folder(pathlib.Path(workdir) / UPLOADS))
    application = app.make_app(session, StartFolder(folder), uploads, token)
    with socket.socket() as listening:
        # Otherwise a port is blocked for a minute after the server that had it.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((ADDRESS, port))
        except OSError as error:
            errors.fail("flags", "--port", f"{port}: {error.strerror}", "a free port, or 0 for any")
        # Addresses hold the token, so that no log may have them.
        listening.listen()
        config = uvicorn.Config(
            application, log_config=None, access_log=False, server_header=False, lifespan="off", ws="none"
        )
        server = uvicorn.Server(config)
        ready(f"http://{ADDRESS}:{listening.getsockname()[1]}/?token={token}", server)
        try:
            server.run([listening])
        except KeyboardInterrupt:
            pass  # raised once more when all requests have been answered: a signal is how a server ends
        finally:
            session.close()
