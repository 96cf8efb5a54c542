"""The page of ``rome explore``: a thin Gradio layer around :class:`rome.report.explore.Explorer`, and its server."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

from rome.core.errors import UserError, first_line
from rome.report.explore import rendering
from rome.report.explore.desk import Desk
from rome.report.explore.explorer import MOST_STEPS, STEPS, Explorer, ball_of
from rome.report.explore.uploads import MOST_BYTES, Shown
from rome.report.subject import NATURAL
from rome.threats import LpBall

GRADIO = "gradio>=6.31"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
try:
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
except ImportError as error:
    raise UserError(f"rome explore needs Gradio ({first_line(error)}): pip install '{GRADIO}'") from None

REACH = 3
"""Upper end of the slider, as a multiple of the budget."""
PORTS = 20
"""Number of ports that are tried by default."""
SELECT_LAYER = """element.addEventListener("click", event => {
  const gates = event.target.closest("[data-layer]");
  if (gates) trigger("select", {layer: gates.dataset.layer});
});"""
"""Clicking a layer's gates selects that layer."""
STORE_QUERY = """(image, threat, eps, steps, layer) => {
  const query = Object.entries({image, threat, eps, steps, layer}).filter(([, value]) => value !== null);
  history.replaceState(null, "", "?" + new URLSearchParams(query));
}"""
"""Stores the query in the page's address; an upload cannot be stored there."""
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Liberation Sans", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")


def build(explorers: Sequence[Explorer]) -> gr.Blocks:
    """Build the page. Its address stores the query, so that it can be reopened or shared."""
    desk = Desk(explorers)
    start = [NATURAL, *desk.balls][-1]
    threats = [NATURAL, *desk.balls, *desk.others]
    ball = desk.balls.get(start)
    layer = desk.layers[-1] if desk.layers else None
    title = " and ".join(explorer.name for explorer in explorers)
    with gr.Blocks(title=f"{title} · rome explore", analytics_enabled=False, fill_width=True) as page:
        shown = gr.State(None)
        shown_layer = gr.Textbox(layer, visible="hidden")  # not a State: JavaScript stores it in the address
        gr.HTML(f'<header><p class="kicker">rome explore</p><h1>{escape(title)}</h1></header>')
        with gr.Row(elem_id="desk", equal_height=False):
            with gr.Column(scale=0, min_width=290, elem_id="controls"):
                with gr.Group():
                    number = gr.Number(0, label="Test image", precision=0, elem_id="number")
                    with gr.Row(elem_id="turn"):
                        previous = gr.Button("Previous", size="sm", min_width=60)
                        following = gr.Button("Next", size="sm", min_width=60)
                        random = gr.Button("Random", size="sm", min_width=60)
                    file = gr.UploadButton("Upload an image", size="sm", elem_id="upload")
                message = gr.HTML(elem_id="said")
                threat = gr.Radio(threats, value=start, label="Threat", elem_id="threat")
                with gr.Group(visible=ball is not None) as budget:
                    eps = gr.Textbox(
                        ball.radius if ball else "", label="ε, such as 0.03 or 8/255", max_lines=1, elem_id="eps"
                    )
                    slide = gr.Slider(**_range(ball), show_label=False, container=False, elem_id="slide", buttons=[])
                steps = gr.Slider(1, MOST_STEPS, STEPS, step=1, label="Steps of APGD", elem_id="steps", buttons=[])
            with gr.Column(scale=1, min_width=300, elem_id="answers"):
                attack = gr.HTML(elem_id="attack")
                gates = gr.HTML(elem_id="experts", js_on_load=SELECT_LAYER)
        query, answered = [threat, eps, steps, shown_layer], [message, attack, gates]

        def answer(shown: Shown, *query: Any) -> tuple[Any, Any, Any]:
            """Return the note about the image and both halves of the answer; after an error the old answer stays."""
            try:
                answers = desk.look(shown, *query)
            except UserError as error:
                return rendering.error(str(error)), gr.skip(), gr.skip()
            return rendering.note(shown.description), rendering.attacks(answers), rendering.experts(answers)

        def show_test(choose: Callable[[float], float]) -> Callable[..., Any]:
            def show(current: float | None, *query: Any) -> tuple[Any, ...]:
                try:
                    image = desk.test(number := choose(current or 0))
                except UserError as error:
                    return gr.skip(), gr.skip(), rendering.error(str(error)), gr.skip(), gr.skip()
                return number, image, *answer(image, *query)

            return show

        def show_upload(path: str, *query: Any) -> tuple[Any, ...]:
            try:
                image = desk.upload(path)
            except UserError as error:
                return gr.skip(), gr.skip(), rendering.error(str(error)), gr.skip(), gr.skip()
            return None, image, *answer(image, *query)

        def show_budget(name: str, eps: str | None = None) -> tuple[Any, Any, Any]:
            chosen = desk.balls.get(name)
            if chosen is None:
                return gr.update(visible=False), gr.skip(), gr.skip()
            return gr.update(visible=True), eps or chosen.radius, gr.update(**_range(chosen, eps))

        def restore_query(request: gr.Request) -> tuple[Any, ...]:
            """Return the query in the page's address, with defaults for what is missing or invalid."""
            stored = {"image": "", "steps": ""} | dict(request.query_params)
            image, count = (
                int(stored[key]) if stored[key].isdecimal() and len(stored[key]) < 19 else None
                for key in ("image", "steps")
            )
            name = stored["threat"] if stored.get("threat") in threats else start
            where = stored["layer"] if stored.get("layer") in desk.layers else layer
            return image or 0, name, *show_budget(name, stored.get("eps")), count or STEPS, where

        restored = _on(page.load, restore_query, [], [number, threat, budget, eps, slide, steps, shown_layer])
        for event, choose in (
            (restored.then, lambda current: current),
            (number.input, lambda current: current),
            (previous.click, lambda current: (current - 1) % desk.tests),
            (following.click, lambda current: (current + 1) % desk.tests),
            (random.click, lambda current: desk.random()),
        ):
            done = _on(event, show_test(choose), [number, *query], [number, shown, *answered], busy=message)
            done.then(None, [number, *query], None, js=STORE_QUERY)
        _on(file.upload, show_upload, [file, *query], [number, shown, *answered], busy=message)
        for event in (
            _on(threat.input, show_budget, [threat], [budget, eps, slide]).then,
            _on(slide.input, rendering.number, [slide], [eps]).then,
            *(_on(typed, show_budget, [threat, eps], [budget, eps, slide]).then for typed in (eps.submit, eps.blur)),
            _on(gates.select, _clicked_layer, [], [shown_layer]).then,
            steps.input,
        ):
            done = _on(event, answer, [shown, *query], answered, busy=message)
            done.then(None, [number, *query], None, js=STORE_QUERY)
    return page


def _clicked_layer(event: gr.EventData) -> str:
    """Return the layer whose gates were clicked."""
    return str(event.layer)


def serve(explorers: Sequence[Explorer], host: str, port: int | None, say: Callable[[str], None]) -> None:
    """Serve the page until interrupted.

    Args:
        host: address to listen on.
        port: port to listen on; None takes the first free one from 7860.
        say: called with the line that gives the page's address.

    Raises:
        UserError: it cannot listen on this address or port.
    """
    with listen(host, port) as listening, tempfile.TemporaryDirectory(prefix="rome-explore-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # deleted when the server ends
        page = build(explorers)
        address, number = listening.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        app = application(page, address, number)
        say(f"explore at http://{shown}:{number} (press Ctrl-C to stop)")
        server(app).run(sockets=[listening])


def server(app: FastAPI) -> uvicorn.Server:
    """Return a server that ends on Ctrl-C even while a page is open."""
    return uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))


def application(page: gr.Blocks, host: str, port: int) -> FastAPI:
    """Wrap the page in a web application that makes no request to any other host."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    here = Path(__file__).parent
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=host,
        server_port=port,
        footer_links=[],
        show_error=False,
        max_file_size=4 * MOST_BYTES,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Base(font=FONTS, font_mono=MONO),
        css_paths=[here.parent / "templates/colours.css", here / "page.css"],
    )
    return app


def listen(host: str, port: int | None) -> socket.socket:
    """Open a listening socket.

    Args:
        host, port: see :func:`serve`.

    Raises:
        UserError: it cannot listen on this address or port.
    """
    first = 7860 if port is None else port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for tried in range(first, first + (PORTS if port is None else 1)):
        try:
            return socket.create_server((host, tried), family=family)
        except OSError as error:
            reason = (error.strerror or first_line(error)).partition(" (while")[0]
    raise UserError(f"cannot listen on {host} port {first} ({reason}); choose another with --port or --host")


def _on(event: Any, function: Callable[..., Any], inputs: list[Any], outputs: list[Any], busy: Any = None) -> Any:
    """Register an event handler: of several events in quick succession only the last counts, and it is no API endpoint.

    Args:
        busy: widget that shows the seconds while it runs; none by default.
    """
    progress: dict[str, Any] = (
        {"show_progress": "minimal", "show_progress_on": busy} if busy else {"show_progress": "hidden"}
    )
    return event(function, inputs, outputs, api_visibility="private", trigger_mode="always_last", **progress)


def _range(ball: LpBall | None, eps: str | None = None) -> dict[str, Any]:
    """Settings of the radius slider; its value is ``eps`` if that is a valid radius, else the ball's budget."""
    budget = 1.0 if ball is None else ball.eps or 1.0
    value = budget
    if ball is not None and eps is not None:
        with suppress(UserError):
            chosen = ball_of(ball.norm, eps, {})
            value = min(chosen.eps if chosen else 0.0, REACH * budget)
    rounded = [float(f"{each:.3g}") for each in (REACH * budget, value, budget / 100)]
    return {"minimum": 0, **dict(zip(("maximum", "value", "step"), rounded, strict=True))}
