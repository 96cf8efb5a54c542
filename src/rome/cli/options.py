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

_WHERE = "Many jobs"
Launcher = Annotated[
    str | None,
    typer.Option(
        help="Where jobs run: local, submitit (SLURM), or settings: '{kind: submitit, partition: gpu}'. "
        "rome list launchers.",
        rich_help_panel=_WHERE,
    ),
]
Jobs = Annotated[int | None, typer.Option(min=1, help="At a time; 1 if not given.", rich_help_panel=_WHERE)]
GpusPerJob = Annotated[
    int | None,
    typer.Option(min=0, help="Of each job; 1 if not given, where there are any.", rich_help_panel=_WHERE),
]


def _naming(kind: Any, help: str, **more: Any) -> Any:
    panel = "A model that no run made"
    return Annotated[kind | None, typer.Option(help=help, rich_help_panel=panel, **more)]


_NAMED: dict[str, Any] = {
    "model": _naming(str, "A timm name, hf://USER/NAME, path.py:function, TorchScript or torch.export file."),
    "data": _naming(
        str,
        "digits, cifar10:PATH, a folder of images or of Parquet files, or a .parquet file. With a run: where its "
        "data lies now.",
    ),
    "weights": _naming(str, "A file of weights or hf://USER/NAME; timm's own if not given."),
    "weights_key": _naming(str, "Where in --weights, if it holds several models: state_dict."),
    "budgets": _naming(
        str,
        "cifar10, imagenet, digits, or balls: L2=0.5,Linf=4/255,Linf=8/255. With a run: instead of its config's.",
    ),
    "num_classes": _naming(int, "Its logits; the data's classes if not given.", min=2),
    "img_size": _naming(int, "Side of the images, in pixels.", min=1),
    "patch_size": _naming(int, "Of timm's transformers.", min=1),
    "mean": _naming(str, "Normalisation it lacks: 0.49,0.48,0.45."),
    "std": _naming(str, "Goes with --mean."),
}
"""What :func:`rome.evaluation.named.named_config` reads."""


def names_model(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that name a model that no run made. It gets what was said as ``named``, by field."""
    own = inspect.signature(command, eval_str=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    shared = [inspect.Parameter(name, keyword, default=None, annotation=kind) for name, kind in _NAMED.items()]
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
