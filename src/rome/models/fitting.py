"""Finding a model's tensors in a file, and checking that names, shapes and number types fit the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rome.core.errors import UserError, some
from rome.core.wrappers import bare_name, bare_state, unwrapped
from rome.experts.more import ModelMixture
from rome.models.classifier import Classifier

TIMM = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys of a checkpoint in the order in which timm's ``load_state_dict`` prefers them: averaged weights first."""
NORMALIZATIONS = {"mean": "std", "mu": "sigma", "new_mean": "new_std"}
"""Last parts of the names of mean and std in other projects' checkpoints (``0.mean``, ``normalizer.new_mean``)."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SHOWN = 3
"""Number of tensors that a message names; the others are counted."""


def backbone_and_prefix(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the part of a model that other projects would save, and the prefix of its names in rome's models."""
    inner = unwrapped(model)
    return (unwrapped(inner.backbone), "backbone.") if isinstance(inner, Classifier) else (inner, "")


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that output the logits: according to timm, otherwise the last Linear layer."""
    backbone, inside = backbone_and_prefix(model)
    networks = {inside: backbone}
    if isinstance(backbone, ModelMixture):
        networks = {f"{inside}networks.{k}.": network for k, network in enumerate(backbone.networks)}
    return tuple(place + name for place, network in networks.items() for name in _head(network))


def _head(network: nn.Module) -> list[str]:
    known = (getattr(network, "pretrained_cfg", None) or {}).get("classifier")
    if known:
        return [known] if isinstance(known, str) else list(known)
    linears = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return [bare_name(network, name) for name in linears[-1:]]


# Finding a model's tensors in a file


class FoundWeights(NamedTuple):
    """The tensors of a file that belong to a model."""

    tensors: dict[str, Tensor]
    """Tensors below the chosen prefix, under the names of the model's backbone, including names it does not have."""
    normalization: tuple[Tensor, Tensor] | None
    """Mean and std, each with one value or one per image channel."""
    remarks: list[str]
    """What a reader of results should know, such as what was left out."""


def find(
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    required: Collection[str],
    *,
    source: str,
    key: str | None = None,
    channels: int | None = None,
) -> FoundWeights:
    """Find a model in a file: the prefix below which the file has all names that the model needs.

    Args:
        tensors: all tensors of the file; a checkpoint's keys are parts of the names (``state_dict.module.fc.weight``).
        own: the model's tensors.
        required: the names in ``own`` that the file must have.
        key: search only below this prefix.
        channels: number of image channels; None for a model that cannot take over a normalisation.

    Returns:
        The tensors below the prefix, or below the prefix with most of the names if none has all. Tensors elsewhere are
        named in the remarks, except for a normalisation near the prefix.

    Raises:
        UserError: several such sets of tensors differ, and the layout is not timm's, or there is nothing below the key.
    """
    counts: Counter[str] = Counter(start for name in tensors for start, rest in _splits(name) if rest in required)
    if key is not None:
        counts = Counter({s: n for s, n in counts.items() if (s.startswith(f"{key}.") if key else not s)})
        if not counts:
            raise UserError(f"{source} holds no tensors of this model under {key!r}; its keys: {_groups(tensors, '')}")
    complete = [start for start, n in counts.items() if n == len(required)]
    fitting = [s for s in complete if all(tensors[s + n].shape == own[n].shape for n in required)] or complete
    start, remarks = max(counts, key=lambda start: (counts[start], -len(start)), default=""), list[str]()
    if fitting:
        start, remarks = _choose(fitting, tensors, own, required, source)
    others = tuple(other for other in complete if len(other) > len(start))
    inside, outside = list[str](), list[str]()
    for name in tensors:
        (inside if name.startswith(start) and not name.startswith(others) else outside).append(name)
    strange = [name for name in inside if name.removeprefix(start) not in own]
    pairs = [] if channels is None else _normalizations(strange + outside, start, tensors, channels)
    taken = {name for pair in pairs for name in pair}
    # tensors of the other fitting prefixes are equal to those taken, or already named in a remark
    known = taken | {other + name for other in fitting if other != start for name in own}
    outside = [name for name in outside if name not in known]
    if outside and fitting:
        place = f"the weights under {start.rstrip('.')}" if start else "the weights"
        remarks.append(f"{source}: {place} are loaded; left out: {_groups(outside, start)}")
    return FoundWeights(
        {name.removeprefix(start): tensors[name] for name in inside if name not in taken},
        _one_normalization(pairs, tensors, source) if pairs else None,
        remarks,
    )


def _choose(
    fitting: list[str],
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    required: Collection[str],
    source: str,
) -> tuple[str, list[str]]:
    """Choose one of the prefixes below which a model is complete: the one that timm would take if their tensors differ.
    Return it with remarks."""

    def strangers(start: str) -> int:
        return sum(name.startswith(start) and name.removeprefix(start) not in own for name in tensors)

    fitting = sorted(fitting, key=lambda start: (strangers(start), len(start)))
    different = [fitting[0]]
    for start in fitting[1:]:
        if not any(all(_equal(tensors[start + n], tensors[one + n]) for n in required) for one in different):
            different.append(start)
    if len(different) == 1:
        return different[0], []
    by_key = {start.split(".")[0]: start for start in different}
    names = [start.rstrip(".") or '""' for start in different]
    how = "set model.weights_key (--weights-key, weights_key=)"
    preferred = next((by_key[key] for key in TIMM if key in by_key), "")
    if len(by_key) < len(different) or not by_key.keys() <= set(TIMM) or not preferred.startswith(TIMM[:2]):
        raise UserError(
            f"{source} holds {len(different)} sets of weights that fit the model and differ: {', '.join(names)}; {how} "
            "to the one to load"
        )
    taken = preferred.rstrip(".")
    rest = ", ".join(name for name in names if name != taken)
    remark = f"{source}: the averaged weights ({taken}) are loaded, as in timm; {how} to {rest} for the others"
    return preferred, [remark]


def _normalizations(
    names: Collection[str], start: str, tensors: Mapping[str, Tensor], channels: int
) -> list[tuple[str, str]]:
    """Names of mean and std next to a prefix or one module away from it; only the nearest pairs."""
    near: dict[int, list[tuple[str, str]]] = {}
    for name in names:
        place, dot, leaf = name.rpartition(".")
        partner = f"{place}{dot}{NORMALIZATIONS.get(leaf, '')}"
        scopes = (f"{place}{dot}", f"{place.rpartition('.')[0]}." if "." in place else "")
        scope = next((scope for scope in scopes if start.startswith(scope)), None)
        sizes = {tensors[each].numel() for each in (name, partner) if each in tensors}
        if leaf in NORMALIZATIONS and partner in names and scope is not None and sizes <= {1, channels}:
            near.setdefault(len(scope), []).append((name, partner))
    return near[max(near)] if near else []


def _one_normalization(
    pairs: list[tuple[str, str]], tensors: Mapping[str, Tensor], source: str
) -> tuple[Tensor, Tensor]:
    mean, std = (tensors[name] for name in pairs[0])
    if not all(_equal(mean, tensors[m]) and _equal(std, tensors[s]) for m, s in pairs):
        raise UserError(f"{source} holds several normalisations: {', '.join(m for m, _ in pairs)}; save one of them")
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all() and (mean.abs() <= 1).all()):
        raise UserError(
            f"{source} normalises with mean {numbers(mean)} and std {numbers(std)}, which is not for images in [0, 1]; "
            "save it without them, and set mean and std (model.mean, --mean)"
        )
    return mean, std


def numbers(values: Tensor) -> str:
    """Format values as ``0.5, 0.25``."""
    return ", ".join(f"{value:.4g}" for value in values.flatten().tolist())


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Yield the splits of a name into prefix and rest: an empty prefix, and one ending at each dot."""
    for at in (0, *(i + 1 for i, letter in enumerate(name) if letter == ".")):
        yield name[:at], name[at:]


def _groups(names: Collection[str], start: str) -> str:
    """Summarise names by their first part outside the prefix: ``optimizer (62 tensors), criterion.weight``."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(parts, start.split("."), strict=False))))
        groups.setdefault(".".join(parts[: shared + 1]), []).append(name)
    lines = [own[0] if len(own) == 1 else f"{group} ({len(own)} tensors)" for group, own in groups.items()]
    return some(lines, 2 * SHOWN)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


# Checking and copying tensors


def fit(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    expected: Collection[str],
    path: object,
    head: tuple[str, ...] = (),
    hint: str = "",
) -> None:
    """Copy tensors into a model, all or none.

    Args:
        tensors: tensors under the model's names, as returned by :func:`bare_state`; all of them must be in the model.
        expected: names that must be in ``tensors``.
        path: of the file, for the message.
        head: prefixes of the last layer's names; if only these do not fit and there is no hint, the message says how to
            drop the layer.
        hint: end of the message.

    Raises:
        UserError: a tensor is missing, unexpected, not finite, or of a different shape or number type.
    """
    own = bare_state(model)
    both = sorted(set(tensors) & set(own))
    missing = sorted(set(expected) - set(tensors))
    unexpected = sorted(set(tensors) - set(own))
    resized = [name for name in both if tensors[name].shape != own[name].shape]
    others = [name for name in both if _kind(tensors[name]) != _kind(own[name])]
    broken = [name for name in both if name not in others and not _sound(tensors[name], own[name])]
    problems = [f"{_some(missing)} missing in the file"] if missing else []
    problems += [f"{_some(unexpected)} not in the model"] if unexpected else []
    problems += _each(
        "shapes", [f"{n} is {tuple(tensors[n].shape)} in the file, {tuple(own[n].shape)} in the model" for n in resized]
    )
    problems += _each("types", [f"{n} holds {_kind(tensors[n])}, in the model {_kind(own[n])}" for n in others])
    problems += [f"{_some(broken)} not finite (NaN, infinity)"] if broken else []
    if problems:
        only = head and not others and all(n.startswith(head) for n in (*missing, *unexpected, *resized, *broken))
        if only and not hint:
            hint = "; only the head differs: set model.drop_head=true (drop_head=True) to start with a new one"
        raise UserError(f"{path} does not fit the model: {'; '.join(problems)}{hint}")
    with torch.no_grad():
        for name in both:
            own[name].copy_(tensors[name])


def _kind(tensor: Tensor) -> str:
    """Number type of a tensor: tensors of the same type are converted to the model's precision, others are refused."""
    if tensor.is_meta or tensor.layout is not torch.strided:
        return "no numbers" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
    if tensor.dtype in FLOATS:
        return "real numbers"
    return "integers" if tensor.dtype in INTEGERS else str(tensor.dtype).removeprefix("torch.")


def _sound(tensor: Tensor, own: Tensor) -> bool:
    """Whether all numbers are finite in the model's precision, or equal to the model's, such as a mask of -inf."""
    if tensor.dtype not in FLOATS:
        return True
    cast = tensor.to(own.dtype)
    return bool(cast.isfinite().all()) or (not own.is_meta and torch.equal(cast, own.to(cast.device)))


def _each(what: str, lines: list[str]) -> list[str]:
    return lines[:SHOWN] + ([f"and {len(lines) - SHOWN} more of other {what}"] if len(lines) > SHOWN else [])


def _some(names: list[str]) -> str:
    """Format names as ``a is``, ``a, b are`` or ``a, b, c and 7 more are``."""
    return f"{some(names, SHOWN)} {'is' if len(names) == 1 else 'are'}"
