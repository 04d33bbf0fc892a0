"""The page's server: an ASGI application of a few addresses, in front of a session.

| address | answer |
|---|---|
| `GET /`, `/page.js`, `/page.css` | the page |
| `GET /api/state` | what it shows: the job, what is loaded, the latest result |
| `GET /api/files?folder=` | a folder below the one where the server was started |
| `POST /api/uploads`, `PUT /api/uploads/{upload}/{name}` | a new upload; a file of it |
| `POST /api/load`, `/api/prepare`, `/api/register`, `/api/accept` | begin a job; accept the pose |
| `GET /api/xrays/{view}` | uint16 numbers, row by row (`slices.xray_numbers`) |
| `GET /api/results/{name}/{plane}/{index}` | int16 HU, row by row (`slices.Slices.slice`) |
| `GET /api/results/{name}/{file}` | a file to download |

Files are sent as they are, as the body of a request: there is no form to take apart. The page draws slices that are resampled
here on plain canvases. A volume viewer such as NiiVue or vtk.js would have to be shipped or fetched, with megabytes of script, and
would interpolate the CT in ways of its own; three planes at a known pose need none.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.responses import PlainTextResponse
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from data_pipelines.ct import numbering
from data_pipelines.xrays import radiograph
from experiments.patients import one_acquisition
from experiments.runtime import cli
from experiments.serving import access
from experiments.serving import results
from experiments.serving import slices
from experiments.serving.sessions import Busy
from experiments.serving.sessions import Inputs
from experiments.serving.sessions import Session
from experiments.serving.user_files import StartFolder
from experiments.serving.user_files import Uploads
from radgs_jax import errors

HERE = pathlib.Path(__file__).parent
PAGE = {"/page.js": "text/javascript", "/page.css": "text/css"}
"""Files of the page beside page.html, and their types."""
TOKEN = "{{token}}"
"""What page.html has in place of the token."""
MAX_JSON_BYTES = 64 * 2**10
"""Longest request of JSON. The page's have less than 2 kB."""


def make_app(session: Session, folder: StartFolder, uploads: Uploads, token: str) -> ASGIApp:
    """The application.

    Args:
      folder: whose files may be picked; uploads: where uploaded files go; token: what every request needs.
    """
    page = _Page(session, folder, uploads, token)
    routes = [
        Route("/", page.html),
        *(Route(path, _static(path, kind)) for path, kind in PAGE.items()),
        Route("/api/state", page.state),
        Route("/api/files", page.files),
        Route("/api/uploads", page.new_upload, methods=["POST"]),
        Route("/api/uploads/{upload}/{name}", page.upload, methods=["PUT"]),
        Route("/api/load", page.load, methods=["POST"]),
        Route("/api/prepare", page.prepare, methods=["POST"]),
        Route("/api/register", page.register, methods=["POST"]),
        Route("/api/accept", page.accept, methods=["POST"]),
        Route("/api/xrays/{view:int}", page.xray),
        Route("/api/results/{name}/{plane}/{index}", page.slice),
        Route("/api/results/{name}/{file}", page.file),
    ]
    handlers: dict[Any, Callable] = {errors.InputError: _unusable}
    return access.Guard(Starlette(routes=routes, exception_handlers=handlers), token)


def _unusable(request, error):
    return JSONResponse({"error": str(error)}, 409 if isinstance(error, Busy) else 400)


def _static(path, kind):
    content = (HERE / path[1:]).read_text(encoding="utf-8")
    return lambda request: Response(content, media_type=kind)


class _Page:
    """The functions behind the addresses. Those without `async` run in threads."""

    def __init__(self, session, folder, uploads, token):
        self._session, self._folder, self._uploads = session, folder, uploads
        self._html = (HERE / "page.html").read_text(encoding="utf-8").replace(TOKEN, token)

    async def html(self, request: Request) -> Response:
        return Response(self._html, media_type="text/html")

    async def state(self, request: Request) -> Response:
        return JSONResponse(self._session.state())

    def files(self, request: Request) -> Response:
        return JSONResponse(self._folder.listed(request.query_params.get("folder", ".")))

    def new_upload(self, request: Request) -> Response:
        return JSONResponse({"upload": self._uploads.new()})

    async def upload(self, request: Request) -> Response:
        await self._uploads.add(request.path_params["upload"], request.path_params["name"], request.stream())
        return JSONResponse({})

    async def load(self, request: Request) -> Response:
        self._session.load(_inputs(await _body(request), self._path))
        return JSONResponse(self._session.state())

    async def prepare(self, request: Request) -> Response:
        self._session.prepare(_label(await _body(request)))
        return JSONResponse(self._session.state())

    async def register(self, request: Request) -> Response:
        body = await _body(request)
        self._session.register(_label(body), _points(body))
        return JSONResponse(self._session.state())

    def accept(self, request: Request) -> Response:
        self._session.accept()
        return JSONResponse(self._session.state())

    def xray(self, request: Request) -> Response:
        return _numbers(slices.xray_numbers(self._session.xray(request.path_params["view"])), "<u2")

    def slice(self, request: Request) -> Response:
        result, plane = self._session.result(request.path_params["name"]), request.path_params["plane"]
        try:
            index = int(request.path_params["index"])
        except ValueError:
            index = slices.REACH + 1
        if plane not in slices.PLANES or abs(index) > slices.REACH:
            return PlainTextResponse("no such slice\n", 404)
        return _numbers(result.slices.slice(plane, index), "<i2")

    def file(self, request: Request) -> Response:
        result, name = self._session.result(request.path_params["name"]), request.path_params["file"]
        if not result.written or name not in (*results.TYPES, results.ARCHIVE):
            return PlainTextResponse("no such file\n", 404)
        headers = {"Content-Disposition": f'attachment; filename="{result.name}-{name}"'}
        if name == "report.html":
            # It is opened in the browser, with its own script but without any access.
            headers = {"Content-Security-Policy": access.REPORT_POLICY}
        return Response(result.file(name), headers=headers, media_type=results.TYPES.get(name, "application/zip"))

    def _path(self, given, what):
        """The file of {"path": ...} in the start folder or of {"upload": ...}."""
        if isinstance(given, dict) and len(given) == 1:
            ((kind, value),) = given.items()
            if kind == "path" and isinstance(value, str):
                return self._folder.inside(value)
            if kind == "upload" and isinstance(value, str):
                return self._uploads.path(value)
        return errors.fail("page", what, "nothing" if given is None else repr(given), "a file")


async def _body(request):
    """The JSON object of a request."""
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > MAX_JSON_BYTES:
            errors.fail("request", "size", f"more than {MAX_JSON_BYTES} bytes", "a shorter one")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        errors.fail("request", "body", repr(data[:40]), "a JSON object")
    return body


def _inputs(body, path):
    """The `Inputs` of a request."""
    xrays, cameras = body.get("xrays"), body.get("cameras")
    if not isinstance(xrays, list):
        errors.fail("request", "xrays", repr(xrays), "a list")
    options = radiograph.ReadOptions(
        values=_choice(body, "values", radiograph.VALUES),
        air=_number(body, "air"),
        bits=_whole(body, "bits"),
        mirrored=body.get("mirrored") is True,
    )
    labels, camera_sd = _text(body, "labels"), _text(body, "camera_sd")
    if labels is not None:
        numbering.parse_labels(labels)
    return Inputs(
        path(body.get("ct"), "CT"),
        path(body.get("mask"), "mask"),
        tuple(path(xray, f"X-ray {index + 1}") for index, xray in enumerate(xrays)),
        None if cameras is None else path(cameras, "cameras"),
        labels,
        options,
        None
        if camera_sd is None
        else cli.mm_and_degrees("--camera_sd", camera_sd.split(","), one_acquisition.MAX_CAMERA_SD),
    )


def _text(body, name):
    """A text that is not empty, or None."""
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        errors.fail("request", name, repr(value), "a text")
    return (value or "").strip() or None


def _choice(body, name, known):
    value = _text(body, name)
    if value is not None and value not in known:
        errors.fail("request", name, repr(value), f"one of {', '.join(known)}")
    return value


def _number(body, name):
    value = _text(body, name)
    return None if value is None else cli.numbers(f"--{name}", [value], "a number")[0]


def _whole(body, name):
    value = _number(body, name)
    if value is not None and value % 1 != 0:
        errors.fail("flags", f"--{name}", value, "a whole number")
    return None if value is None else int(value)


def _label(body):
    label = body.get("label")
    if not isinstance(label, int):
        errors.fail("request", "label", repr(label), "a VerSe number")
    return label


def _points(body):
    """(u, v) in each view, or None."""
    points = body.get("points")
    if points is None:
        return None
    try:
        return [[float(u), float(v)] for u, v in points]
    except (TypeError, ValueError):
        return errors.fail("request", "points", repr(points), "a pair (u, v) for each view")


def _numbers(array, kind):
    return Response(array.astype(kind).tobytes(), media_type="application/octet-stream")
