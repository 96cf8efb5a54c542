"""Options shared by several commands, including those that describe a model without a run."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Overwrite = Annotated[bool, typer.Option(help="Replace what an earlier call wrote.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or mps; the best one available if not given.")]

TrustCode = Annotated[
    bool, typer.Option("--trust-code", help="Allow files from others to run the code that they name (see SECURITY.md).")
]

_JOBS = "Parallel jobs"
Launcher = Annotated[
    str | None,
    typer.Option(
        help="Where jobs run: local, submitit (SLURM), or settings such as '{kind: submitit, partition: gpu}'; see "
        "rome list launchers.",
        rich_help_panel=_JOBS,
    ),
]
Jobs = Annotated[int | None, typer.Option(min=1, help="Jobs at the same time; 1 if not given.", rich_help_panel=_JOBS)]
GpusPerJob = Annotated[
    int | None,
    typer.Option(min=0, help="GPUs for each job; 1 if not given and the machine has any.", rich_help_panel=_JOBS),
]


def _model_option(kind: Any, help: str, **more: Any) -> Any:
    panel = "A model without a run"
    return Annotated[kind | None, typer.Option(help=help, rich_help_panel=panel, **more)]


_MODEL_OPTIONS: dict[str, Any] = {
    "model": _model_option(str, "A timm name, hf://USER/NAME, path.py:function, TorchScript or torch.export file."),
    "data": _model_option(
        str,
        "digits, cifar10:PATH, a folder of images or of Parquet files, or a .parquet file. With rome evaluate "
        "RUN: where the run's data is now.",
    ),
    "weights": _model_option(str, "A weights file or hf://USER/NAME; timm's pretrained weights if not given."),
    "weights_key": _model_option(str, "Which model to take if --weights holds several, such as state_dict."),
    "budgets": _model_option(
        str,
        "Threats: cifar10, imagenet, digits, or balls such as L2=0.5,Linf=4/255,Linf=8/255. With rome evaluate RUN: "
        "instead of those in the run's config.",
    ),
    "num_classes": _model_option(int, "Number of logits; the data's number of classes if not given.", min=2),
    "img_size": _model_option(int, "Height and width of the images, in pixels.", min=1),
    "patch_size": _model_option(int, "Patch size of a timm transformer, in pixels.", min=1),
    "mean": _model_option(str, "Channel means, such as 0.49,0.48,0.45, if the model does not normalise by itself."),
    "std": _model_option(str, "Channel standard deviations; go with --mean."),
}
"""Command-line options, by the fields that :func:`rome.evaluation.named.named_config` reads."""


def names_model(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options for a model without a run to a command, which receives their values in the dict ``named``."""
    own = inspect.signature(command, eval_str=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    shared = [inspect.Parameter(name, keyword, default=None, annotation=kind) for name, kind in _MODEL_OPTIONS.items()]
    parameters = [*(each for each in own.parameters.values() if each.name != "named"), *shared]

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        named = {name: values.pop(name) for name in _MODEL_OPTIONS}
        command(**values, named=named)

    wrapped.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]  # what typer reads
    wrapped.__annotations__ = {each.name: each.annotation for each in parameters}
    return wrapped


def names_in(text: str | None) -> list[str]:
    """Split ``a,b`` into its names."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]
