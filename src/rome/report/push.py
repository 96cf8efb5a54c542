"""Share a run on the Hugging Face Hub: its weights, model card and results, and nothing else from its folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import yaml

from rome.core import trust
from rome.core.console import say
from rome.core.errors import UserError
from rome.core.files import file_hash, flatten, make_folder, replace_file
from rome.core.private import cleaner
from rome.data import Data
from rome.data.resized import Resized
from rome.evaluation.store import MATRIX, RESULT, SETTINGS, read_json
from rome.models import Classifier, load_model, read_tensors
from rome.models.files import copy_with
from rome.models.hub import TIMM_CONFIG, WEIGHTS, HubModel, hub_errors
from rome.report.card import eval_results, model_card
from rome.report.compared import is_preferred
from rome.report.evaluated import LEARNED, Evaluated, evaluations
from rome.runs.config import Config, parse
from rome.runs.folder import Run

CARD, CONFIG, EVALUATIONS, EVAL_RESULTS = "README.md", "config.yaml", "evaluation", ".eval_results/rome.yaml"
OURS = (f"{EVALUATIONS}/", TIMM_CONFIG, EVAL_RESULTS)
"""Files of an earlier push that are deleted from the repository if the new push does not have them."""
_OF_PRETRAINED = ("tag", "license", "origin_url", "paper_", "notes", "url", "hf_hub", "file", "description")
"""Prefixes of timm's settings that describe an architecture's pretrained weights and do not apply to a run's."""
_PATH_KEYS = {"path", "weights", "features", "name"}
"""Settings that may hold a path."""


@trust.opens_files
def push(
    run: str | Path,
    repo: str,
    *,
    dry_run: str | Path | None = None,
    public: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    license: str | None = None,
    trust_code: bool = False,
) -> str:
    """Share an evaluated run on the Hub: the files that :func:`prepare` writes, in one commit.

    Args:
        run: folder of a finished run with at least one evaluation.
        repo: ``USER/NAME``; created if it does not exist.
        dry_run: empty or new folder to write the files into instead of sending them.
        public: whether everybody may see the repository. By default, a new repository is private and an existing public
            one is refused.
        revision: branch to commit to, created if it does not exist; the main branch by default.
        tag: tag for the commit.
        license: licence of the weights, by the Hub's identifier (``mit``, ``cc-by-4.0``).
        trust_code: whether the run's files may name code (:mod:`rome.core.trust`).

    Returns:
        The address of the commit, or the folder of a dry run.

    Raises:
        UserError: :func:`prepare` raises it, or the Hub refuses.
    """
    where, folder = HubModel.parse(repo), Run(run)
    if where.revision is not None:
        raise UserError(f"{repo}: give a branch with --revision and a tag with --tag")
    if dry_run is not None:
        out = Path(dry_run).expanduser()
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} is not an empty folder; --dry-run writes into one that is empty or new")
        make_folder(out)
        prepare(folder, where, out, license=license)
        return str(out)
    with TemporaryDirectory() as temporary:
        prepare(folder, where, Path(temporary), license=license)
        _check_token(where)
        return _send(where, Path(temporary), folder.config.name, public=public, revision=revision, tag=tag)


def prepare(run: Run, repo: HubModel, out: Path, *, license: str | None = None) -> None:
    """Write the files of a run that are shared: ``model.safetensors`` with the config inside, ``config.yaml``,
    ``README.md``, the result, settings and matrix of every evaluation, timm's ``config.json`` for a timm model without
    experts, and ``.eval_results`` if the Hub has the data set. Paths and the name of this machine are removed.

    Raises:
        UserError: the run is not finished or not evaluated, or its evaluations are of other weights.
    """
    found, own = sorted(evaluations(run).values(), key=_rank), run.config
    if not run.finished:
        raise UserError(f"{run.folder} holds no finished model ({WEIGHTS}); finish its training first")
    if not found or found[0].key[0] != LEARNED:
        of = " with its own gates" if found else ""
        raise UserError(
            f"{run.folder} has no evaluation{of}, and a model is shared with its numbers: run `rome evaluate "
            f"{run.folder}` first"
        )
    for one in found:
        one.check_fresh()
    clean = cleaner([run.folder, *_paths(own)])
    config = parse(clean(own.dump()))
    plain = own.experts is None and timm.is_model(own.model.name)
    classes, changed = run.classes, clean(run.origin.get("changed", []))
    if plain:
        _write_timm_config(run, own.data, classes, out)

    def described(metadata: dict[str, Any]) -> dict[str, Any]:
        return {**clean(metadata), "classes": classes}

    copy_with(described, run.model_file, out / WEIGHTS, bare=plain)
    replace_file(out / CONFIG, yaml.safe_dump(config.dump(), sort_keys=False).encode())
    trust.record(out / CONFIG, {"config": config.dump()})
    for one in found:
        _copy_evaluation(one, out, clean)
    shared = sorted(evaluations(Run(out)).values(), key=_rank)
    facts = {**read_tensors(out / WEIGHTS)[0], "changed": changed}
    usage = _timm_usage(repo) if plain else ""
    card = model_card(config, shared, repo, facts=facts, usage=usage, license=license)
    replace_file(out / CARD, card.encode())
    if entries := eval_results(config, shared[0], repo):
        replace_file(out / EVAL_RESULTS, yaml.safe_dump(entries, sort_keys=False, allow_unicode=True).encode())


def _rank(one: Evaluated) -> tuple[Any, ...]:
    """Sort key that puts the most informative evaluation first: learned gates, AutoAttack, more examples."""
    routing, suite, n = one.key
    return routing != LEARNED, not is_preferred(suite), -n, suite, routing


def _paths(config: Config) -> list[str]:
    """Return the values of a config that may be paths: of data, weights or code."""
    dumped = flatten(config.dump())
    values = [value for key, value in dumped.items() if _PATH_KEYS & set(key.split("."))]
    texts = [
        text for value in values for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)
    ]
    return [text for text in texts if "://" not in text]


def _copy_evaluation(one: Evaluated, out: Path, clean: Callable[[Any], Any]) -> None:
    folder = out / EVALUATIONS / one.folder.name
    settings, result = clean(read_json(one.folder / SETTINGS)), clean(read_json(one.folder / RESULT))
    settings["provenance"] |= {"checkpoint": WEIGHTS, "checkpoint_sha256": file_hash(out / WEIGHTS)}
    result["settings"] = settings
    for name, contents in ((SETTINGS, settings), (RESULT, result)):
        replace_file(folder / name, json.dumps(contents, indent=2).encode())
    shutil.copyfile(one.folder / MATRIX, folder / MATRIX)


def _write_timm_config(run: Run, data: Data, classes: list[str] | None, out: Path) -> None:
    """Write timm's ``config.json``: architecture, arguments, normalisation, and how images are resized."""
    model = load_model(run.model_file)
    assert isinstance(model, Classifier)
    recipe, backbone = dict(model.recipe or {}), model.backbone
    arguments = {key: value for key, value in recipe.items() if key not in ("name", "num_classes", "mean", "std")}
    side, channels = arguments.get("img_size"), recipe["in_chans"]
    known: dict[str, Any] = dict(backbone.pretrained_cfg)  # type: ignore[arg-type]
    known |= {
        "mean": model.mean.flatten().tolist(),
        "std": model.std.flatten().tolist(),
        "num_classes": recipe["num_classes"],
    }
    if isinstance(data, Resized):
        side = data.size  # type: ignore[attr-defined]
        known |= {"crop_pct": data.crop_pct, "crop_mode": data.crop_mode, "interpolation": data.interpolation}
    known["input_size"] = (channels, *((side, side) if side else known["input_size"][1:]))
    known = {key: value for key, value in known.items() if not key.startswith(("test_", *_OF_PRETRAINED))}
    backbone.pretrained_cfg = known  # type: ignore[assignment]
    extra = {"label_names": classes} if classes else {}
    timm.models.save_for_hf(backbone, str(out), model_config=extra, model_args=arguments, safe_serialization=True)


def _timm_usage(repo: HubModel) -> str:
    return (
        f'import timm, torch\nmodel = timm.create_model("hf-hub:{repo.repository}", pretrained=True).eval()\n'
        "config = timm.data.resolve_model_data_config(model)  # mean and std\n"
        'mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))\n'
        "logits = model((images - mean) / std)"
    )


def _check_token(repo: HubModel) -> None:
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(
            f"{repo.repository}: there is no token for the Hub; create one with write access "
            "(https://huggingface.co/settings/tokens), then run `hf auth login` or set HF_TOKEN; --dry-run needs none"
        )


def _send(repo: HubModel, folder: Path, name: str, *, public: bool, revision: str | None, tag: str | None) -> str:
    """Send all files of a folder in one commit; return its address."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, at = HfApi(library_name="rome"), repo.repository
    with hub_errors(repo):
        api.create_repo(at, private=not public, exist_ok=True)
        info = api.model_info(at)
        if public == bool(info.private):
            if not public:
                raise UserError(
                    f"{at} is public, and nothing is published without --public: add --public, or make {at} private"
                )
            say(f"{at} is private and stays private; change that in its settings on the Hub")
        if tag is not None and tag in {each.name for each in api.list_repo_refs(at).tags}:
            raise UserError(f"{at} already has a tag {tag}; choose another --tag")
        if revision is not None:
            api.create_branch(at, branch=revision, exist_ok=True)
        new = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        there = api.list_repo_files(at, revision=revision)
        old = [path for path in there if path.startswith(OURS) and path not in new]
        operations = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=file) for path, file in new.items()]
        commit = api.create_commit(
            at,
            [*operations, *map(CommitOperationDelete, old)],
            commit_message=f"{name}: weights, card and evaluations",
            revision=revision,
        )
        if tag is not None:
            api.create_tag(at, tag=tag, revision=commit.oid)
    return str(commit.commit_url)
