"""The server of the review seat: on this computer only, for one browser, behind a token.

Handlers are coroutines that do not wait while they act, so that actions come one after another without locks.
"""

import contextlib
import json
import secrets
import socket
import threading
import webbrowser
from pathlib import Path
from typing import Any

import uvicorn
from filelock import FileLock, Timeout
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cardiac_qc_plugin.data.predictions import MAP_NAMES
from cardiac_qc_plugin.metrics.segmentation import CLASS_NAMES
from cardiac_qc_plugin.reports.pages import CONTOURS, FLAG_COLOR
from cardiac_qc_plugin.review.seat import NoSuchCase, Seat, TakenOver, reviewer_name
from cardiac_qc_plugin.review.state import PAUSE, Refused
from cardiac_qc_plugin.workflows.files import OutputError

__all__ = ["create_app", "serve"]

STATIC = Path(__file__).with_name("static")
HOST = "127.0.0.1"
MAX_BODY = 1 << 20  # bytes; a stroke over a whole slice of 512 x 512 pixels is no stroke
VOLUMES = ("image", "uncertainty", "automatic", "regions")
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Lets through what comes from the page that the user opened with the token, and nothing else.

    The host has to be this computer by its own name (against DNS rebinding), the origin the page itself, and the
    cookie has to hold the token.

    Args:
        app: what to guard.
        token: the secret of this start of the server.
        port: on which the server listens.
        once: another secret, which opens the page a single time: for the command line of a browser, which other users
            of this computer can see.
    """

    def __init__(self, app: ASGIApp, token: str, port: int, once: str | None = None) -> None:
        self.app, self.token, self.once = app, token, once
        self.hosts = {f"{name}:{port}" for name in (HOST, "localhost")}
        self.cookie = f"review_{port}"  # cookies of this computer are shared by all its ports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # nothing here speaks over web sockets
            return
        request = Request(scope)
        reason = self.refusal(request)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(k.lower().encode(), v.encode()) for k, v in SECURITY_HEADERS.items()]
            await send(message)

        if reason:
            app: ASGIApp = JSONResponse({"error": reason}, status_code=403)
        elif request.url.path == "/" and self.opens(request.query_params.get("token")):
            self.once = None if request.query_params["token"] == self.once else self.once
            app = RedirectResponse("/", status_code=303)  # the token leaves the address bar and the history
            app.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
        else:
            app = self.app
        await app(scope, receive, send_with_headers)

    def refusal(self, request: Request) -> str | None:
        headers: Headers = request.headers
        if headers.get("host") not in self.hosts:
            return "This is no address of the review server."
        origin = headers.get("origin")
        if (origin is None and request.method not in ("GET", "HEAD")) or (
            origin is not None and origin != f"http://{headers['host']}"
        ):
            return "Requests of other origins are refused."
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and request.url.path != "/":
            return "Requests of other sites are refused."
        given = request.cookies.get(self.cookie)
        if request.url.path == "/" and self.opens(request.query_params.get("token")):
            return None
        if request.url.path == "/":
            given = request.query_params.get("token") or given
        if not self.is_token(given):
            return "Open the address that the review command printed: its token is missing or that of an earlier start."
        return None

    def opens(self, given: str | None) -> bool:
        """Whether it is a secret that may stand in the page's address."""
        once = (
            self.once is not None and given is not None and secrets.compare_digest(given.encode(), self.once.encode())
        )
        return once or self.is_token(given)

    def is_token(self, given: str | None) -> bool:
        return given is not None and secrets.compare_digest(given.encode(), self.token.encode())


def create_app(seat: Seat, token: str, port: int, reviewer: str = "", once: str | None = None) -> ASGIApp:
    """The application; all paths that it reads or writes come from the seat's list of cases.

    Args:
        seat: the cases.
        token: secret that the page has to show.
        port: on which the server listens.
        reviewer: name that the page proposes.
        once: see `Guard`.
    """

    async def page(request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    async def settings(request: Request) -> Response:
        colors = {name: color for name, (color, _) in CONTOURS.items()}
        return JSONResponse(
            {
                "reviewer": reviewer,
                "classes": {name: label for label, name in CLASS_NAMES.items()},
                "colors": colors,
                "flag_color": FLAG_COLOR,
                "maps": MAP_NAMES,
                "pause": PAUSE,
                "output": str(seat.output),
            }
        )

    async def cases(request: Request) -> Response:
        return JSONResponse(list(seat.worklist()))

    async def volume(request: Request) -> Response:
        name = request.query_params.get("name")
        if name not in VOLUMES:
            raise HTTPException(404, f"There is no volume {name!r}.")
        voxels = seat.review(request.query_params.get("case")).volume(name)
        return Response(voxels, media_type="application/octet-stream")

    async def state(request: Request) -> Response:
        return JSONResponse(seat.review(request.query_params.get("case")).current())

    async def open_case(request: Request) -> Response:
        body = await read_body(request)
        review = seat.review(body.get("case"))
        description = review.describe()
        session = review.open(body.get("reviewer"), body.get("take_over") is True, body.get("previous"))
        return JSONResponse({"session": session, **description, "state": review.current()})

    async def close_case(request: Request) -> Response:
        body = await read_body(request)
        seat.review(body.get("case")).close(body.get("session"))
        return JSONResponse({})

    async def act(request: Request) -> Response:
        body = await read_body(request)
        if not isinstance(body.get("action"), dict):
            raise HTTPException(400, "An action is expected.")
        return JSONResponse(seat.act(body.get("case"), body.get("session"), body["action"]))

    routes = [
        Route("/", page),
        Route("/api/settings", settings),
        Route("/api/cases", cases),
        Route("/api/volume", volume),
        Route("/api/state", state),
        Route("/api/open", open_case, methods=["POST"]),
        Route("/api/close", close_case, methods=["POST"]),
        Route("/api/act", act, methods=["POST"]),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    handlers = {
        HTTPException: lambda request, error: problem(error.status_code, error.detail),
        NoSuchCase: lambda request, error: problem(404, f"There is no case {error.args[0]!r}."),
        TakenOver: lambda request, error: problem(409, str(error)),
        Refused: lambda request, error: problem(422, str(error)),
        ValueError: lambda request, error: problem(422, str(error)),
        OutputError: lambda request, error: problem(507, f"Not saved: {error}"),
    }
    return Guard(Starlette(routes=routes, exception_handlers=handlers), token, port, once)


def problem(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status_code=status)


async def read_body(request: Request) -> dict[str, Any]:
    """The JSON object that was sent.

    Raises:
        HTTPException: it is too large, or no JSON object.
    """
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise HTTPException(415, "JSON is expected.")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"More than {MAX_BODY} bytes were sent.")
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "What was sent is no JSON.") from error
    if not isinstance(data, dict):
        raise HTTPException(400, "A JSON object is expected.")
    return data


def serve(
    predictions: str | Path,
    output: str | Path | None = None,
    reviewer: str = "",
    port: int = 0,
    browser: bool = True,
) -> None:
    """Serve the review page until it is interrupted; its address is printed.

    Args:
        predictions: output folder of ``run``.
        output: where the reviews go; by default beside the predictions, with ``_reviewed`` after the name.
        reviewer: name that the page proposes.
        port: to listen on; 0 takes a free one.
        browser: open the page in the default browser.

    Raises:
        ValueError: see `Seat`; the reviewer's name is not UTF-8; there is no such port; or another server reviews into
            this folder.
        OSError: the port is taken, or the output cannot be written.
    """
    if reviewer.strip():
        reviewer_name(reviewer)
    if not 0 <= port < 2**16:
        raise ValueError(f"port is a number from 0 to 65535, got {port}.")
    predictions = Path(predictions)
    output = Path(output) if output else predictions.resolve().with_name(predictions.resolve().name + "_reviewed")
    seat = Seat(predictions, output)
    output.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(output / ".review.lock", timeout=0))
        except Timeout as error:
            raise ValueError(f"{output}: another review server is at work there. End it first.") from error
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}: choose another --port than {port}.") from error
        listener.listen()  # before the address is told
        port = listener.getsockname()[1]
        token, once = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        address = f"http://{HOST}:{port}/?token="
        told = f"Cases: {len(seat.folders)}. Corrections go to {output}\nOpen {address}{token}\nCtrl-C ends the server."
        print(told, flush=True)  # a pipe or a log file would have it when the server ends
        app = create_app(seat, token, port, reviewer, once if browser else None)
        config = uvicorn.Config(app, log_level="warning", server_header=False, ws="none", lifespan="off")
        if browser:  # in a thread: a browser in the terminal returns when it is closed
            threading.Thread(target=webbrowser.open, args=(address + once,), daemon=True).start()
        uvicorn.Server(config).run(sockets=[listener])
