"""Validation while training: what is held out, what is measured, and that a kill changes none of it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.problems import rest_slow
from helpers.tiny_runs import Moment, changed, rome, same, tiny, two_processes, weights, without_times, write_yaml
from rome.attacks import APGD
from rome.core.errors import UserError
from rome.data.base import Split
from rome.data.memory import Digits
from rome.evaluation.run import evaluate_saved
from rome.models import load_model
from rome.runs.config import Config
from rome.runs.folder import Run
from rome.training.setup import train
from rome.training.validation import Validator, hold_out

HELD = {"n": 10, "every": 1, "steps": 2}


def validations(run: Run) -> list[dict[str, Any]]:
    return [line for line in run.log() if line["event"] == "validation"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny(validation=HELD, epochs=3), tmp_path_factory.mktemp("undisturbed") / "run")


class One:
    """Stands for one process."""

    global_rank, world_size, device = 0, 1, torch.device("cpu")


# What is held out


def test_held_out_examples_and_the_others_are_the_training_set() -> None:
    whole = Digits(train_limit=50).open("train")
    kept, held = hold_out(whole, 12, seed=3)
    assert (len(kept), len(held)) == (38, 12)
    (images, labels), (x, y), (everything, every_label) = kept.first(38), held.first(12), whole.first(50)
    together = torch.cat([images, x]).flatten(1)
    order = [int((together == row.flatten()).all(dim=1).nonzero()[0]) for row in everything]
    assert sorted(order) == list(range(50))
    assert torch.equal(torch.cat([labels, y])[order], every_label)
    assert torch.equal(kept.labels, labels)
    assert torch.equal(hold_out(whole, 12, seed=3)[1].first(12)[0], x)
    assert not torch.equal(hold_out(whole, 12, seed=4)[1].first(12)[0], x)


def test_a_kept_example_is_augmented_as_in_the_whole_set() -> None:
    whole = Digits(train_limit=50, augment=True).open("train")
    kept, _ = hold_out(whole, 20, seed=0)
    ((x, _),) = kept.batches([torch.tensor([4, 7])], augment_seed=9)
    numbers = kept.numbers[torch.tensor([4, 7])]  # type: ignore[attr-defined]
    ((expected, _),) = whole.batches([numbers], augment_seed=9)
    assert torch.equal(x, expected)


def test_no_batch_of_training_holds_a_held_out_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    batches = Split.batches

    def watched(self: Split, order: Any, **options: Any) -> Any:
        for x, y in batches(self, order, **options):
            if "augment_seed" in options:  # validation asks for none
                seen.append(x.clone())
            yield x, y

    monkeypatch.setattr(Split, "batches", watched)
    config = tiny(validation=HELD)
    train(config, tmp_path / "run")
    held = hold_out(config.data.open("train"), 10, config.seed)[1].first(10)[0].flatten(1)
    trained = torch.cat(seen).flatten(1)
    assert len(trained) == 2 * 48  # 54 of the 64 examples make four batches of 12
    assert not (trained[:, None] == held).all(dim=2).any()


@pytest.mark.parametrize(("n", "words"), [(64, "takes all 64"), (60, "exceeds the 4 training")])
def test_too_many_held_out_are_refused(n: int, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        train(tiny(validation={"n": n}), tmp_path / "run")


# What is measured


def test_the_shares_are_those_of_each_attack_alone(undisturbed: Run) -> None:
    """The last validation is of the weights that were saved, attacked one threat after the other."""
    config = undisturbed.config
    x, y = hold_out(config.data.open("train"), 10, config.seed)[1].first(10)
    model = load_model(undisturbed.folder)
    clean = model(x).argmax(dim=1) == y
    robust = {t.name: APGD(steps=2).run(model, x, y, t).robust & clean for t in config.threats}
    last = validations(undisturbed)[-1]
    assert last["clean"] == pytest.approx(float(clean.float().mean()))
    assert last["robust"] == pytest.approx({name: float(right.float().mean()) for name, right in robust.items()})
    assert last["union"] == pytest.approx(float(torch.stack(list(robust.values())).all(dim=0).float().mean()))


def test_measuring_leaves_flags_statistics_and_random_state(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 10))
    model.train()
    model[3].eval()
    model[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    config = tiny(validation={"n": 10, "steps": 2}, precision="bf16")
    held = hold_out(config.data.open("train"), 10, 0)[1]
    validator = Validator(config, held, Run(tmp_path), One())
    assert validator.measure(model) == validator.measure(model)
    assert same(dict(model.state_dict()), before)
    assert [part.training for part in model] == [True, True, True, False, True]
    assert [p.requires_grad for p in model.parameters()] == [False, *[True] * 5]
    assert torch.equal(torch.get_rng_state(), state)


def test_validation_changes_nothing_but_which_examples_are_trained_on(undisturbed: Run, tmp_path: Path) -> None:
    """However often it looks, and with however many steps, the weights are the same."""
    seldom = train(tiny(validation={"n": 10, "every": 2, "steps": 1}, epochs=3), tmp_path / "seldom")
    assert same(weights(seldom.folder), weights(undisturbed.folder))
    assert [line["epoch"] for line in validations(seldom)] == [2, 3]  # the last epoch always
    assert [line["epoch"] for line in validations(undisturbed)] == [1, 2, 3]
    epochs = [line for line in undisturbed.log() if line["event"] == "epoch"]
    for line, epoch in zip(validations(undisturbed), epochs, strict=True):
        assert line["seconds"] == epoch["seconds"], "the time of validation is not training"


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    """The largest union, then the largest mean over threats, then the earlier epoch."""
    model = nn.Linear(1, 1)
    validator = Validator(tiny(validation=HELD), Digits().open("train"), Run(tmp_path), One())
    for epoch, (union, robust, best) in enumerate([(0.2, 0.3, True), (0.1, 0.9, False), (0.2, 0.3, False)], 1):
        found = {"union": union, "average": robust}
        assert validator.save_if_best(model, epoch, found) is best
    nn.init.constant_(model.weight, 7.0)
    assert validator.save_if_best(model, 4, {"union": 0.2, "average": 0.35})
    nn.init.constant_(model.weight, 8.0)  # training goes on
    assert validator.best is not None
    assert validator.best["epoch"] == 4
    assert weights(tmp_path / "best.safetensors")["weight"].item() == 7.0
    assert validator.best["model"]["weight"].item() == 7.0


@pytest.mark.slow
def test_the_best_weights_can_be_evaluated_beside_the_last(undisturbed: Run) -> None:
    best = max(validations(undisturbed), key=lambda line: (line["union"], sum(line["robust"].values()), -line["epoch"]))
    assert [line["epoch"] for line in validations(undisturbed) if line["best"]][-1] == best["epoch"]
    _, last = evaluate_saved(undisturbed.folder, n=4, checks=False)
    report, folder = evaluate_saved(undisturbed.best_file, n=4, checks=False)
    assert folder == undisturbed.folder / "evaluation-best" / last.name
    assert report.settings["provenance"]["checkpoint"] == "best.safetensors"


# Kills and processes


MOMENTS = (Moment("writing", 2), Moment("update", 6), Moment("model", 2))


@pytest.mark.parametrize(
    "moment",
    rest_slow({f"{each.place}-{each.number}": each for each in MOMENTS}, 1),
)
@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(moment: Moment, tmp_path: Path, undisturbed: Run) -> None:
    """Also where the kill hits the file of the best weights (``model``), or leaves them newer than the checkpoint."""
    settings = changed(name="run", validation=HELD, epochs=3)
    run = Run(tmp_path / "run")
    config = write_yaml(tmp_path / "tiny.yaml", settings)
    ended = rome("train", config, "--out", run.folder, logs=tmp_path / "logs", at=moment).wait()
    assert ended.code == -signal.SIGKILL
    run.best_file.unlink(missing_ok=True)  # the checkpoint must suffice
    train(tiny(validation=HELD, epochs=3), run.folder, resume=True)
    assert same(weights(run.folder), weights(undisturbed.folder))
    assert same(weights(run.best_file), weights(undisturbed.best_file))
    assert without_times(run.log()) == without_times(undisturbed.log())


def test_a_changed_validation_is_another_run(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.prepare(tiny(validation=HELD), resume=False, overwrite=False)
    run.release()
    with pytest.raises(UserError, match=r"validation.n was 10, now 11"):
        train(tiny(validation={**HELD, "n": 11}), run.folder, resume=True)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    """Also where the held-out examples do not divide among them."""
    settings = changed(name="run", validation={"n": 7, "steps": 2}, natural_epochs=1, epochs=2)
    config = write_yaml(tmp_path / "tiny.yaml", settings)
    ended = [c.wait() for c in two_processes("train", config, "--out", tmp_path / "two", logs=tmp_path / "logs")]
    assert [process.code for process in ended] == [0, 0], ended
    one = train(tiny(validation={"n": 7, "steps": 2}, natural_epochs=1, epochs=2), tmp_path / "one")
    for found, expected in zip(validations(Run(tmp_path / "two")), validations(one), strict=True):
        assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    assert "held out after 2/2  clean" in ended[0].err
    assert "held out" not in ended[1].err


METHODS: dict[str, dict[str, Any]] = {
    "max": {"method": "max", "experts": None},
    "eat": {"method": "eat", "attack": {"kind": "apgd", "steps": 1}},
    "ramp": {"method": "ramp"},
    "more": {"method": "more", "experts": {"kind": "more"}},
    "pat": {"method": {"kind": "pat", "steps": 1, "features": ["self"]}, "experts": None},
    "batchnorm": {"model": {"name": "wide_resnet", "args": {"depth": 10, "width": 1}}, "experts": None},
}


@pytest.mark.parametrize("kind", rest_slow(METHODS.keys(), 1))
def test_every_method_can_be_validated_and_resumed(kind: str, tmp_path: Path) -> None:
    """Stages, second models and counts: a stop after the first epoch leads to the same best and last weights."""
    config: Config = tiny(validation={"n": 6, "steps": 1}, **METHODS[kind])
    one = train(config, tmp_path / "one")
    assert [line["epoch"] for line in validations(one)] == [1, 2]
    two = Run(tmp_path / "two")
    settings = write_yaml(tmp_path / "c.yaml", {**config.dump(), "name": "c"})
    rome("train", settings, "--out", two.folder, logs=tmp_path / "logs", at=Moment("logged", 2)).wait()
    train(config, two.folder, resume=True)
    assert same(weights(two.folder), weights(one.folder))
    assert same(weights(two.best_file), weights(one.best_file))
    assert without_times(two.log()) == without_times(one.log())
