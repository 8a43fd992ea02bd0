"""genflow demo RUN [RUN]"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

from genflow.cli.canvas import Canvas
from genflow.cli.demo_actions import Choice, Player, draw, edit, invert, open_player, plain, strip
from genflow.cli.options import add_weights
from genflow.errors import UserError

HOST = "127.0.0.1"  # this machine alone
SAFE = ["download", "fullscreen"]  # buttons of a picture that send it nowhere
WAITING = 32  # clicks at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="one, or two side by side: runs, checkpoints, models")
    parser.add_argument("--port", type=int, default=7860, help="of the page, on this machine alone (7860)")
    add_weights(parser)
    parser.set_defaults(batch=64)


def run(args: argparse.Namespace) -> int:
    if len(args.runs) > 2:
        raise UserError(
            f"{len(args.runs)} models are too many for one page; name one or two (genflow compare takes more)"
        )
    _check_port(args.port)
    page = build_page([open_player(path, args) for path in args.runs])
    past = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), HOST, "localhost"]
    os.environ["no_proxy"] = ",".join(filter(None, past))  # gradio asks its own page whether it is there
    page.launch(server_name=HOST, server_port=args.port, share=False, quiet=True, prevent_thread_lock=True)
    print(f"http://{HOST}:{args.port}; stop it by Ctrl-C")
    page.block_thread()
    return 0


def _check_port(port: int) -> None:
    """Raises UserError for a port that is none, or that cannot be had."""
    if not 1 <= port <= 65535:
        raise UserError(f"--port {port} is not within 1 .. 65535; try 7860")
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((HOST, port))
        except OSError as error:
            raise UserError(f"--port {port} cannot be had ({error.strerror}); name another") from error


def build_page(players: Sequence[Player]) -> Any:
    """The page, a gradio.Blocks, not yet served. Raises UserError where gradio is missing."""
    try:
        import gradio
    except ImportError as error:
        raise UserError("the page needs gradio: pip install gradio") from error
    from genflow.flows.autoencoder import AutoencoderFlow
    from genflow.flows.base import Flow

    with gradio.Blocks(title="genflow", analytics_enabled=False) as page:
        gradio.Markdown("# " + " beside ".join(str(player.args.run) for player in players))
        controls = _controls(gradio, players)
        if drawing := [player for player in players if not isinstance(player.flow, AutoencoderFlow)]:
            with gradio.Tab("Draw"):
                _tab(gradio, drawing, "Draw", [], controls, draw)
        pictured = [player for player in players if len(player.flow.shape) == 3]
        moving = [player for player in pictured if hasattr(player.flow, "guided")]
        if moving:
            with gradio.Tab("Step by step"):
                _tab(gradio, moving, "Show the steps", [], controls, strip, told=False)
        if editable := [player for player in pictured if Canvas.of(player.flow)]:
            with gradio.Tab("Edit"):
                image = _picture(gradio)
                strength = gradio.Slider(0.05, 1, 0.6, label="strength: the more, the freer")
                before = gradio.Textbox(label="what it shows now (then by FlowEdit; empty: image-to-image)")
                _tab(gradio, editable, "Edit", [image, strength, before], controls, edit)
        if inverted := [player for player in pictured if type(player.flow).encode is not Flow.encode]:
            with gradio.Tab("Invert"):
                _tab(gradio, inverted, "To noise and back", [_picture(gradio)], controls, invert)
    return page.queue(max_size=WAITING)


def _picture(gradio: Any) -> Any:
    """A picture that a person gives, as the file that it is."""
    return gradio.Image(type="filepath", image_mode=None, label="picture", height=220)


def _controls(gradio: Any, players: Sequence[Player]) -> list[Any]:
    """One for each field of Choice, in its order; those that no model takes are hidden."""
    from genflow.registry import names

    takes = {name for player in players for name in player.takes}
    own = {name: value for player in reversed(players) for name, value in player.own.items()}
    start = Choice()
    heard = any(player.hears for player in players)
    with gradio.Row():
        prompt = gradio.Textbox(label="prompt", visible=heard, scale=3)
        seed = gradio.Number(start.seed, label="seed", precision=0, minimum=0)
        pictures = any(len(player.flow.shape) == 3 for player in players)
        count = gradio.Slider(1, 16, start.count, step=1, label="pictures", visible=pictures)
    with gradio.Row():
        sampler, steps, guidance = (own.get(f, getattr(start, f)) for f in ("sampler", "steps", "guidance"))
        return [
            prompt,
            seed,
            count,
            gradio.Dropdown(names("sampler"), value=sampler, label="sampler", visible="sampler" in takes),
            gradio.Slider(1, max(100, steps), steps, step=1, label="steps", visible="steps" in takes),
            gradio.Slider(
                min(0, guidance), max(12, guidance), guidance, step=0.1, label="guidance", visible="guidance" in takes
            ),
        ]


def _tab(
    gradio: Any,
    players: Sequence[Player],
    button: str,
    inputs: list[Any],
    controls: list[Any],
    action: Callable[..., Any],
    *,
    told: bool = True,
) -> None:
    """A button, and for each model a picture and what is told of it."""
    press = gradio.Button(button, variant="primary")
    with gradio.Row():
        for player in players:
            with gradio.Column():
                label = f"{player.args.run}{'' if player.hears else ' (hears no prompt)'}"
                picture = gradio.Image(label=label, format="png", interactive=False, buttons=SAFE)
                outputs = [picture, gradio.Markdown()] if told else [picture]
            press.click(
                _shown(gradio, player, action),
                [*controls, *inputs],
                outputs,
                api_visibility="private",
                concurrency_id="models",  # one at a time, whatever the tab
                concurrency_limit=1,
            )


def _shown(gradio: Any, player: Player, action: Callable[..., Any]) -> Callable[..., Any]:
    """An action as gradio calls it: the controls first; a person's mistake is told on the page."""

    def call(
        prompt: str, seed: float | None, count: float, sampler: str, steps: float, guidance: float, *more: Any
    ) -> Any:
        if seed is None:
            raise gradio.Error("give a seed", print_exception=False)
        prompt = plain(prompt) if player.hears else ""
        choice = Choice(prompt, int(seed), int(count), sampler, int(steps), guidance)
        try:
            return action(player, choice, *more)
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    return call
