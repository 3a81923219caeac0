"""``samullm report``: a run directory as one HTML page, written or served and kept up to date."""

from __future__ import annotations

import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Annotated

import typer

from samullm_plugin.cli.output import console
from samullm_plugin.errors import InputError, SamullmError
from samullm_plugin.run.report import read_run, report_html, write_report

REFRESH_MS = 3000
"""How often an open page asks; making one costs seconds for a million requests, so it is kept."""

BUSY_SHARE = 0.1
"""At most this share of the time goes into making pages, beside the run that they show."""


def report_server(directory: Path, port: int = 0) -> ThreadingHTTPServer:
    """Return a server of the report, bound to 127.0.0.1; ``serve_forever`` runs it.

    Args:
        directory: of the run.
        port: 0: any that is free.

    Raises:
        InputError: if the folder holds no run or the port is taken.
    """
    read_run(directory)
    kept: list[tuple[float, bytes]] = []
    one_at_a_time = Lock()

    def page() -> bytes:
        with one_at_a_time:
            began_s = time.monotonic()
            if not kept or began_s >= kept[0][0]:
                html = report_html(read_run(directory), None, REFRESH_MS).encode()
                took_s = time.monotonic() - began_s
                wait_s = max(REFRESH_MS / 1000, took_s * (1 / BUSY_SHARE - 1))
                kept[:] = [(time.monotonic() + wait_s, html)]
            return kept[0][1]

    class Handler(BaseHTTPRequestHandler):
        """Answers GET / with the page."""

        def do_GET(self) -> None:
            """Answer with the page, or with 404."""
            if self.path not in ("/", "/index.html"):
                self.send_error(404)
                return
            try:
                body = page()
            except SamullmError as error:
                self.send_error(500, "the run cannot be read", str(error))
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise InputError(
            f"--port {port}: {error.strerror}; give another, or 0 for any that is free"
        ) from error


def serve_report(directory: Path, port: int, say: Callable[[str], None]) -> None:
    """Serve the report until Ctrl-C."""
    server = report_server(directory, port)
    say(f"the report of {directory}: http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C ends it)")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def report(
    run_dir: Annotated[Path, typer.Argument(help="Directory of a run, finished or not.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Page to write; report.html in the run directory."),
    ] = None,
    serve: Annotated[
        bool,
        typer.Option("--serve", help="Show the page on 127.0.0.1 while the run goes on."),
    ] = False,
    port: Annotated[
        int, typer.Option(help="Port for --serve; 0: any that is free.", min=0, max=65535)
    ] = 0,
) -> None:
    """Show a run on one page: planned against measured, failures, and where figures come from."""
    if serve:
        if output is not None:
            raise InputError("--serve writes no file; leave out --output")
        serve_report(
            run_dir, port, lambda text: console().print(text, markup=False, soft_wrap=True)
        )
        return
    run = read_run(run_dir)
    path = output if output is not None else run_dir / "report.html"
    write_report(run, path)
    console().print(f"report written to {path}", markup=False)
