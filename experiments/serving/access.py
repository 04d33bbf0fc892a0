"""Who may talk to the page's server: whoever has the token that was printed, from a page of this server, by a local name.

The server listens on 127.0.0.1, but every program and every web page on this machine can reach that. So each request carries the
token. It is in the address of the page and of what the page links to, and in a header of everything else; anything that changes
something needs the header, which no page of another origin can send. There is no cookie, because browsers send the cookies of
127.0.0.1 to servers on all of its ports. A Host header of another name is refused, since a hostile name server may let its own
name point here (DNS rebinding).
"""

import secrets
import urllib.parse

from starlette.datastructures import Headers
from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp
from starlette.types import Message
from starlette.types import Receive
from starlette.types import Scope
from starlette.types import Send

TOKEN_HEADER = "X-Radgs-Token"
TOKEN_BYTES = 32
"""Of the token, which is made anew at every start: 256 bits, since nothing slows down who guesses."""
LOCAL_NAMES = ("127.0.0.1", "localhost")
READING = ("GET", "HEAD")
"""Methods that change nothing, for which the token may be in the address."""
POLICY = "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
"""Content-Security-Policy: the page runs and loads nothing but this server's files. `data:` is for its empty icon."""
REPORT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; sandbox allow-scripts"
)
"""Policy of report.html, which holds its own script and pictures: it can reach neither this server nor another one."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Of every response, unless it has its own."""


def new_token() -> str:
    """A token for one run of the server."""
    return secrets.token_urlsafe(TOKEN_BYTES)


class Guard:
    """An ASGI application that lets through to another one what may talk to it, and sets HEADERS."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request; whatever is no HTTP request is ignored."""
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        reason = self._refusal(scope)
        app = self._app if reason is None else PlainTextResponse(f"{reason}\n", 403)
        await app(scope, receive, send_with_headers)

    def _refusal(self, scope):
        """Why a request is refused, or None."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or _name(hosts[0]) not in LOCAL_NAMES:
            return f"Host: found another name, wanted {' or '.join(LOCAL_NAMES)}"
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{hosts[0]}":
            return "Origin: found another page, wanted this server's"
        given = headers.getlist(TOKEN_HEADER)
        if not given and scope["method"] in READING:
            given = urllib.parse.parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        if len(given) != 1 or not secrets.compare_digest(given[0].encode(), self._token):
            return "token: found none or another one, wanted that of the address that was printed at the start"
        return None


def _name(host):
    """The name in a Host header, which may have a port."""
    name, _, port = host.partition(":")
    return name.lower() if not port or port.isdecimal() else None
