"""``rome push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rome.cli import options
from rome.cli.app import app
from rome.core.console import say


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="Folder of a finished and evaluated run.")],
    repo: Annotated[str, typer.Argument(help="USER/NAME on the Hugging Face Hub; created if it does not exist.")],
    dry_run: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write what would be sent into this empty folder; send nothing.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository public; private otherwise.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; main if not given.")] = None,
    tag: Annotated[str | None, typer.Option(help="Tag for this version, such as v1.")] = None,
    license: Annotated[
        str | None, typer.Option(help="Licence of the weights, as the Hub spells it: mit, apache-2.0, cc-by-4.0.")
    ] = None,
    trust_code: options.TrustCode = False,
) -> None:
    """Share a run on the Hugging Face Hub: its weights, a model card made from the run, and its evaluations.

    Data, checkpoints, logs and this machine's paths are not sent.
    """
    from rome.report.push import push as push_run

    where = push_run(
        run, repo, dry_run=dry_run, public=public, revision=revision, tag=tag, license=license, trust_code=trust_code
    )
    if license is None:
        say("the model card says that no licence is named; name one with --license, such as --license mit")
    if dry_run is None:
        say(f"{where}\nnext: rome evaluate hf://{repo}")
    else:
        say(f"written to {where}; nothing was sent")
