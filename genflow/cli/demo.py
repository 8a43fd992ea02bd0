"""genflow demo RUN [RUN]"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from genflow.cli.canvas import Canvas
from genflow.cli.demo_actions import Choice, Player, draw, edit, invert, open_player, strip
from genflow.errors import UserError

SAFE = ["download", "fullscreen"]  # buttons of a picture that send it nowhere


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="one, or two side by side: runs, checkpoints, models")
    parser.add_argument("--port", type=int, default=7860, help="of the page, on this machine alone (7860)")
    parser.add_argument("--no-ema", action="store_true", help="the last weights instead of their average")
    parser.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    parser.set_defaults(batch=64)


def run(args: argparse.Namespace) -> int:
    if len(args.runs) > 2:
        raise UserError(
            f"{len(args.runs)} models are too many for one page; name one or two (genflow compare takes more)"
        )
    page = build_page([open_player(path, args) for path in args.runs])
    try:
        page.launch(server_name="127.0.0.1", server_port=args.port, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise UserError(f"--port {args.port} cannot be had ({error}); name another") from error
    print(f"http://127.0.0.1:{args.port}; stop it by Ctrl-C")
    page.block_thread()
    return 0


def build_page(players: Sequence[Player]) -> Any:
    """The page, a gradio.Blocks, not yet served. Raises UserError where gradio is missing."""
    try:
        import gradio
    except ImportError as error:
        raise UserError('the page needs gradio: pip install "genflow[demo]"') from error
    with gradio.Blocks(title="genflow", analytics_enabled=False) as page:
        gradio.Markdown("# " + " beside ".join(str(player.args.run) for player in players))
        controls = _controls(gradio, players)
        with gradio.Tab("Draw"):
            _tab(gradio, players, "Draw", [], controls, draw)
        pictured = [player for player in players if len(player.flow.shape) == 3]
        moving = [player for player in pictured if hasattr(player.flow, "guided")]
        if moving:
            with gradio.Tab("Step by step"):
                _tab(gradio, moving, "Show the steps", [], controls, strip, told=False)
        if editable := [player for player in pictured if Canvas.of(player.flow)]:
            with gradio.Tab("Edit"):
                image = gradio.Image(type="pil", label="picture", height=220)
                strength = gradio.Slider(0.05, 1, 0.6, label="strength: the more, the freer")
                before = gradio.Textbox(label="what it shows now (then by FlowEdit; empty: image-to-image)")
                _tab(gradio, editable, "Edit", [image, strength, before], controls, edit)
        if pictured:
            with gradio.Tab("Invert"):
                image = gradio.Image(type="pil", label="picture", height=220)
                _tab(gradio, pictured, "To noise and back", [image], controls, invert)
    return page


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
        sampler = own.get("sampler", start.sampler)
        return [
            prompt,
            seed,
            count,
            gradio.Dropdown(names("sampler"), value=sampler, label="sampler", visible="sampler" in takes),
            gradio.Slider(1, 100, own.get("steps", start.steps), step=1, label="steps", visible="steps" in takes),
            gradio.Slider(0, 12, own.get("guidance", 1.0), step=0.1, label="guidance", visible="guidance" in takes),
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
                picture = gradio.Image(label=str(player.args.run), format="png", interactive=False, buttons=SAFE)
                outputs = [picture, gradio.Markdown()] if told else [picture]
            press.click(_shown(gradio, player, action), [*controls, *inputs], outputs, api_visibility="private")


def _shown(gradio: Any, player: Player, action: Callable[..., Any]) -> Callable[..., Any]:
    """An action as gradio calls it: the controls first; a person's mistake is told on the page."""

    def call(prompt: str, seed: float, count: float, sampler: str, steps: float, guidance: float, *more: Any) -> Any:
        choice = Choice(prompt if player.hears else "", int(seed), int(count), sampler, int(steps), guidance)
        try:
            return action(player, choice, *more)
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    return call
