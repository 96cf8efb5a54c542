"""Options that several commands share, among them how a model that no run made is named."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Overwrite = Annotated[bool, typer.Option(help="Replace what an earlier call left there.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or mps; the best there is if not given.")]

TrustCode = Annotated[
    bool, typer.Option("--trust-code", help="Let files that others made run the code that they name (SECURITY.md).")
]

_PANEL = "A model that no run made"

_Model = Annotated[
    str | None,
    typer.Option(
        "--model", help="A timm name, path.py:function, TorchScript or torch.export file.", rich_help_panel=_PANEL
    ),
]
_Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="digits, cifar10:PATH, a folder of images or of Parquet files, or a .parquet file. With a run: where its "
        "data lies now.",
        rich_help_panel=_PANEL,
    ),
]
_Weights = Annotated[
    str | None, typer.Option(help="A file of weights; timm's own if not given.", rich_help_panel=_PANEL)
]
_Key = Annotated[
    str | None,
    typer.Option(help="Where in --weights, if it holds several models: state_dict.", rich_help_panel=_PANEL),
]
_Budgets = Annotated[
    str | None, typer.Option(help="cifar10, imagenet, digits, or balls: L2=0.5,Linf=8/255.", rich_help_panel=_PANEL)
]
_Classes = Annotated[
    int | None, typer.Option(min=2, help="Its logits; the data's classes if not given.", rich_help_panel=_PANEL)
]
_ImageSize = Annotated[int | None, typer.Option(min=1, help="Side of the images, in pixels.", rich_help_panel=_PANEL)]
_PatchSize = Annotated[int | None, typer.Option(min=1, help="Of timm's transformers.", rich_help_panel=_PANEL)]
_Mean = Annotated[str | None, typer.Option(help="Normalisation it lacks: 0.49,0.48,0.45.", rich_help_panel=_PANEL)]
_Std = Annotated[str | None, typer.Option(help="Goes with --mean.", rich_help_panel=_PANEL)]

_NAMED: dict[str, Any] = {
    "model": _Model,
    "data": _Data,
    "weights": _Weights,
    "weights_key": _Key,
    "budgets": _Budgets,
    "num_classes": _Classes,
    "img_size": _ImageSize,
    "patch_size": _PatchSize,
    "mean": _Mean,
    "std": _Std,
}
"""What :func:`rome.evaluation.named.named_config` reads."""


def names_model(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that name a model that no run made. It gets what was said as ``named``, by field."""
    own = inspect.signature(command, eval_str=True)
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_NAMED[name])
        for name in _NAMED
    ]
    parameters = [*(each for each in own.parameters.values() if each.name != "named"), *shared]

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        named = {name: values.pop(name) for name in _NAMED}
        command(**values, named=named)

    wrapped.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]  # what typer reads
    wrapped.__annotations__ = {each.name: each.annotation for each in parameters}
    return wrapped


def names_in(text: str | None) -> list[str]:
    """The names in ``a,b``."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]
