"""Options that several commands share, among them how a model that no run made is named."""

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Overwrite = Annotated[bool, typer.Option(help="Replace what an earlier call left there.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or mps; the best there is if not given.")]

_PANEL = "A model that no run made"

Model = Annotated[
    str | None,
    typer.Option(
        "--model", help="A timm name, path.py:function, TorchScript or torch.export file.", rich_help_panel=_PANEL
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="digits, cifar10:PATH, a folder of images or of Parquet files, or a .parquet file.",
        rich_help_panel=_PANEL,
    ),
]
Weights = Annotated[
    str | None, typer.Option(help="A file of weights; timm's own if not given.", rich_help_panel=_PANEL)
]
Budgets = Annotated[
    str | None, typer.Option(help="cifar10, imagenet, digits, or balls: L2=0.5,Linf=8/255.", rich_help_panel=_PANEL)
]
Classes = Annotated[
    int | None, typer.Option(min=2, help="Its logits; the data's classes if not given.", rich_help_panel=_PANEL)
]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Side of the images, in pixels.", rich_help_panel=_PANEL)]
PatchSize = Annotated[int | None, typer.Option(min=1, help="Of timm's transformers.", rich_help_panel=_PANEL)]
Mean = Annotated[str | None, typer.Option(help="Normalisation it lacks: 0.49,0.48,0.45.", rich_help_panel=_PANEL)]
Std = Annotated[str | None, typer.Option(help="Goes with --mean.", rich_help_panel=_PANEL)]
