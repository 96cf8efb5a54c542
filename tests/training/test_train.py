"""Training does what its config says, writes what it did, and stops with a reason."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rome
import rome.training.setup
from helpers.tiny_runs import STEPS, same, tiny, updates, watched, weights, without_times
from rome.core.device import numerics
from rome.core.errors import UserError
from rome.core.randomness import derive_seed, stream
from rome.core.trial import check_attackable
from rome.data import Digits
from rome.methods import Outcome, Random, TrainContext
from rome.models import build_model, read_tensors
from rome.runs.folder import Run
from rome.runs.loggers.tensorboard import TensorBoard
from rome.threats import DIGITS
from rome.training.loop import NonFiniteLossError
from rome.training.setup import check_settings, train

THREATS = {"L1", "L2", "Linf"}
METHODS = ("random", "avg", "max")


def start(config: rome.Config) -> nn.Module:
    """The model as training starts from it."""
    split = config.data.open("train")
    torch.manual_seed(config.seed)
    return build_model(config.model, config.experts, classes=len(split.classes), shape=split.shape)


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in updates(run.log())]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of RoME+RANDOM."""
    return train(tiny(), tmp_path_factory.mktemp("runs") / "rome-random")


# Determinism


def test_the_same_seed_gives_the_same_bits_whatever_was_drawn_before(trained: Run, tmp_path: Path) -> None:
    torch.rand(7)
    again = train(tiny(), tmp_path / "again")
    assert same(weights(again.folder), weights(trained.folder))
    assert without_times(again.log()) == without_times(trained.log())


def test_another_seed_gives_another_model(trained: Run, tmp_path: Path) -> None:
    other = train(tiny(seed=1, epochs=1), tmp_path / "other")
    assert not set(losses(other)) & set(losses(trained))


def test_the_examples_come_in_another_order_every_epoch_and_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    loss = Random.loss

    def spy(self: Random, context: TrainContext, x: Tensor, y: Tensor) -> Outcome:
        seen.append(x.flatten(1))
        return loss(self, context, x, y)

    monkeypatch.setattr(Random, "loss", spy)
    train(tiny(data__train_limit=60), tmp_path / "run")
    first, second = torch.cat(seen[:STEPS]), torch.cat(seen[STEPS:])
    assert not torch.equal(first, second)
    everything, _ = Digits(train_limit=60).open("train").first(60)
    for epoch in (first, second):
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, everything.flatten(1).tolist()))


# Methods and their logs


@pytest.mark.parametrize("experts", [None, {"experts": 2, "rank": 2}], ids=["plain", "experts"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_logs_its_loss_and_the_accuracy_under_every_threat(
    method: str, experts: Any, tmp_path: Path
) -> None:
    config = tiny(method=method, experts=experts, data__train_limit=24, epochs=1)
    run = train(config, tmp_path / "run")
    lines = updates(run.log())
    assert [line["update"] for line in lines] == [1, 2]
    for line in lines:
        assert set(line["accuracy"]) == THREATS
        assert all(0 <= share <= 1 for share in line["accuracy"].values())
        assert line["loss"] == pytest.approx(line["cross_entropy"] + line.get("regularizer", 0.0), abs=1e-5)
        assert ("regularizer" in line) == (experts is not None)
        # 12 examples, each under every threat, or 4 of them under each
        examples = 4 if method == "random" else 12
        assert all((share * examples) % 1 == pytest.approx(0, abs=1e-5) for share in line["accuracy"].values())
    assert not same(weights(run.folder), dict(start(config).state_dict()))


def test_without_perturbation_avg_and_max_are_the_clean_cross_entropy(tmp_path: Path) -> None:
    found, accuracies = {}, []
    for method in METHODS:
        config = tiny(
            method=method,
            experts=None,
            epochs=1,
            batch_size=48,
            data__train_limit=48,
            attack={"steps": 0, "random_start": False},
        )
        run = train(config, tmp_path / method)
        found[method] = losses(run)
        if method != "random":  # there, a threat has the accuracy of its third of the examples
            accuracies += updates(run.log())[0]["accuracy"].values()
    model = start(config)
    x, y = config.data.open("train").first(48)
    with torch.no_grad():
        logits = model(x)
    clean = F.cross_entropy(logits, y).item()
    assert {method: pytest.approx(loss) for method, loss in found.items()} == {method: [clean] for method in METHODS}
    share = (logits.argmax(1) == y).float().mean().item()
    assert 0 < share < 0.5
    assert accuracies == pytest.approx([share] * 6)


def test_max_is_at_least_avg_on_the_same_adversarial_examples(tmp_path: Path) -> None:
    def first_loss(method: str) -> float:
        config = tiny(method=method, experts=None, epochs=1, data__train_limit=12, attack__steps=2)
        return losses(train(config, tmp_path / method))[0]

    assert first_loss("max") > first_loss("avg") + 1e-4


def test_random_per_batch_meets_one_threat_an_update(tmp_path: Path) -> None:
    run = train(tiny(method={"kind": "random", "per": "batch"}), tmp_path / "run")
    met = [set(line["accuracy"]) for line in updates(run.log())]
    assert all(len(names) == 1 for names in met)
    assert len(set().union(*met)) > 1
    epochs = [line for line in run.log() if line["event"] == "epoch"]
    assert set(epochs[0]["accuracy"]) == set().union(*met[:STEPS])


def test_an_epoch_line_holds_the_means_of_its_updates(trained: Run) -> None:
    log = trained.log()
    epochs = [line for line in log if line["event"] == "epoch"]
    assert [line["update"] for line in epochs] == [STEPS, 2 * STEPS]
    for number, line in enumerate(epochs):
        own = updates(log)[number * STEPS : (number + 1) * STEPS]
        for name in ("loss", "cross_entropy", "regularizer"):
            assert line[name] == pytest.approx(sum(update[name] for update in own) / STEPS)
        for name in THREATS:
            assert line["accuracy"][name] == pytest.approx(sum(update["accuracy"][name] for update in own) / STEPS)


def test_the_learning_rate_follows_the_schedule(trained: Run, tmp_path: Path) -> None:
    config = trained.config
    shares = [(n + 1) / (2 * STEPS) for n in range(2 * STEPS)]
    expected = [config.optimizer.lr * config.schedule.factor(share) for share in shares]
    assert [line["lr"] for line in updates(trained.log())] == pytest.approx(expected)
    assert max(expected) == config.optimizer.lr
    still = train(tiny(schedule={"points": [[0, 0], [1, 0]]}, epochs=1), tmp_path / "still")
    initial = dict(start(tiny()).state_dict())
    assert same(weights(still.folder), initial), "without a learning rate nothing moves"


@pytest.mark.parametrize("method", ["avg", "max"])
def test_accumulation_does_not_change_the_update(method: str, tmp_path: Path) -> None:
    """Without group means; the random starts of an example do not depend on the micro-batch it is in."""
    runs = [
        train(tiny(method=method, experts=None, epochs=1, accumulate=parts), tmp_path / str(parts)) for parts in (1, 3)
    ]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), abs=1e-5)
    one, other = weights(runs[0].folder), weights(runs[1].folder)
    for name in one:
        torch.testing.assert_close(other[name], one[name], atol=1e-4, rtol=1e-3)


# Natural epochs


def test_natural_epochs_meet_no_attack_and_nothing_to_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rome.attacks.lp.pgd as pgd

    gradients: list[int] = []
    met: list[int] = []
    compute = pgd.loss_and_gradient

    def counted(*arguments: Any) -> Any:
        gradients.append(1)
        return compute(*arguments)

    monkeypatch.setattr(pgd, "loss_and_gradient", counted)
    run = train(
        tiny(natural_epochs=1, method="avg"), tmp_path / "run", progress=watched(lambda n: met.append(len(gradients)))
    )
    assert met == [0] * STEPS + list(range(1, STEPS + 1))
    lines = updates(run.log())
    for line in lines[:STEPS]:
        assert set(line["accuracy"]) == {"clean"}
        assert line["loss"] == line["cross_entropy"]
        assert line["regularizer"] == 0, "one threat alone has none to be parted from"
    for line in lines[STEPS:]:
        assert set(line["accuracy"]) == THREATS
        assert line["regularizer"] < 0


def test_the_first_natural_loss_is_that_of_clean_images(tmp_path: Path) -> None:
    config = tiny(natural_epochs=1, epochs=2, experts=None)
    first = losses(train(config, tmp_path / "run"))[0]
    split = config.data.open("train")
    order = stream(config.seed, "order:0").permutation(len(split))
    ((x, y),) = split.batches([order[: config.batch_size]])
    torch.manual_seed(derive_seed(config.seed, "model", 0, 0))
    with torch.no_grad():
        assert first == pytest.approx(F.cross_entropy(start(config)(x), y).item(), abs=1e-6)


# What training changes and what it saves


def test_frozen_projections_stay_and_all_other_parameters_move(trained: Run) -> None:
    before, after = dict(start(trained.config).state_dict()), weights(trained.folder)
    stay = {name for name in after if torch.equal(before[name], after[name])}
    assert {name for name in after if "projection." in name} | {"mean", "std"} == stay
    assert {name.rpartition(".")[2] for name in after if ".attn.qkv." in name} == {"weight", "bias", "A", "B"}


def test_a_trainable_projection_is_trained(tmp_path: Path) -> None:
    config = tiny(experts={"experts": 2, "rank": 2, "projection": "trainable"}, epochs=1)
    before, after = dict(start(config).state_dict()), weights(train(config, tmp_path / "run").folder)
    projections = [name for name in after if name.endswith("projection.weight")]
    assert len(projections) == 4
    assert not any(torch.equal(before[name], after[name]) for name in projections)


def test_the_saved_model_is_the_trained_one_and_builds_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[dict[str, Tensor]] = []
    save = rome.training.setup.save_model

    def spy(model: nn.Module, *arguments: Any, **options: Any) -> None:
        ends.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        save(model, *arguments, **options)

    monkeypatch.setattr(rome.training.setup, "save_model", spy)
    config = tiny(epochs=1)
    run = train(config, tmp_path / "run")
    model = rome.load_model(run.model_file)
    assert same(dict(model.state_dict()), ends[0])
    assert not model.training
    assert read_tensors(run.folder)[0]["config"] == config.dump()
    assert run.finished
    assert run.config == config
    assert not run.checkpoint_file.exists()


def test_tensorboard_shows_what_the_log_says(trained: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained.tensorboard)).Reload()
    lines = updates(trained.log())
    for tag, values in {
        "update/loss": [line["loss"] for line in lines],
        "update/lr": [line["lr"] for line in lines],
        "update/accuracy/Linf": [line["accuracy"]["Linf"] for line in lines],
    }.items():
        shown = events.Scalars(tag)
        assert [point.step for point in shown] == list(range(1, 2 * STEPS + 1))
        assert [point.value for point in shown] == pytest.approx(values, rel=1e-6)
    assert {"epoch/loss", "epoch/accuracy/L1"} <= set(events.Tags()["scalars"])


# Precision and compiling


def test_bf16_trains_fp32_weights_to_a_nearby_loss(trained: Run, tmp_path: Path) -> None:
    run = train(tiny(precision="bf16"), tmp_path / "run")
    exact = losses(trained)
    assert losses(run) != exact
    assert losses(run) == pytest.approx(exact, rel=0.02)
    saved = weights(run.folder)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in saved.values())


@pytest.mark.slow
def test_a_compiled_run_computes_what_an_eager_one_does(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a backend that traces and does not generate code: graph breaks and gates are what could go wrong."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    def compile(self: nn.Module) -> None:
        self._compiled_call_impl = torch.compile(self._call_impl, backend=backend)

    monkeypatch.setattr(nn.Module, "compile", compile)
    run = train(tiny(compile=True), tmp_path / "run")
    torch._dynamo.reset()
    assert graphs
    assert losses(run) == pytest.approx(losses(trained), abs=1e-4)
    assert weights(run.folder).keys() == weights(trained.folder).keys()


# Losses that are not finite


def spike(update: int, factor: float) -> dict[str, Any]:
    """A schedule of 1 but for one update out of ten."""
    share = update / (2 * STEPS)
    points = [[0, 1], [share - 0.02, 1], [share - 0.01, factor], [share + 0.01, factor], [share + 0.02, 1], [2, 1]]
    inside = [point for point in points if point[0] < 1]
    return {"points": [*inside, [1, inside[-1][1]]]}


@pytest.mark.parametrize("method", ["random", "max"])
@pytest.mark.parametrize("natural", [0, 1], ids=["attacked", "natural"])
def test_a_diverging_run_stops_with_a_reason(method: str, natural: int, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError) as stopped:
        train(tiny(optimizer={"lr": 1e30}, method=method, natural_epochs=natural), tmp_path / "run")
    message = str(stopped.value)
    assert "of epoch 1" in message
    assert "Lower optimizer.lr" in message
    assert "checkpoint" not in message, "there is none yet"
    assert not Run(tmp_path / "run").finished


def good(folder: Path, epoch: int) -> bool:
    """Whether the folder holds a finite checkpoint of the end of that epoch."""
    state = Run(folder).load_checkpoint()
    return state["epoch"] == epoch and state["step"] == 0 and all(t.isfinite().all() for t in state["model"].values())


def test_the_checkpoint_from_before_is_kept(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=r"update \d+ of epoch 2 .* the last good checkpoint is kept in .*run"):
        train(tiny(schedule=spike(STEPS + 2, 1e30)), tmp_path / "run")
    assert good(tmp_path / "run", 1)


def test_a_loss_of_nan_is_not_stepped_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, loss = [], Random.loss

    def poisoned(self: Random, context: TrainContext, x: Tensor, y: Tensor) -> Outcome:
        calls.append(1)
        outcome = loss(self, context, x, y)
        return Outcome(outcome.loss * (math.nan if len(calls) == STEPS + 2 else 1), outcome.labels, outcome.correct)

    monkeypatch.setattr(Random, "loss", poisoned)
    with pytest.raises(NonFiniteLossError, match=f"the loss became nan at update {STEPS + 2} of epoch 2"):
        train(tiny(), tmp_path / "run")
    assert good(tmp_path / "run", 1)
    assert len(updates(Run(tmp_path / "run").log())) == STEPS + 1


@pytest.mark.parametrize(("update", "kept"), [(STEPS, None), (2 * STEPS, 1)])
def test_weights_that_are_not_finite_never_become_a_checkpoint_or_a_model(
    update: int, kept: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last update of an epoch can ruin the weights with a loss that is fine and a gradient that is not."""
    calls, loss = [], Random.loss

    def ruinous(self: Random, context: TrainContext, x: Tensor, y: Tensor) -> Outcome:
        calls.append(1)
        outcome = loss(self, context, x, y)
        weight = next(p for p in context.attacked.parameters() if p.requires_grad)
        zero = (0 * weight.sum()).sqrt() if len(calls) == update else 0
        return Outcome(outcome.loss + zero, outcome.labels, outcome.correct, outcome.parts)

    monkeypatch.setattr(Random, "loss", ruinous)
    with pytest.raises(NonFiniteLossError, match="weights became infinite or NaN"):
        train(tiny(), tmp_path / "run")
    run = Run(tmp_path / "run")
    assert not run.finished
    assert run.checkpoint_file.exists() == (kept is not None)
    if kept is not None:
        assert good(run.folder, kept)


# Settings that cannot be trained


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 65}, "batch_size 65 exceeds the 64 training examples"),
        ({"model__args": {"depth": 2, "img_size": 8}}, "img_size is a setting of the model itself"),
        ({"model__args": {"embed_dim": 16, "num_heads": 0}}, "cannot be built"),
        ({"model__name": "vit_tinny"}, "unknown model"),
        ({"model__num_classes": 7}, "the data has 10 classes"),
        ({"experts": {"layers": ["q_proj"]}}, "no Linear or Conv2d layer matches 'q_proj'"),
        ({"data__train_limit": 5000}, "train_limit=5000 asks for more"),
    ],
)
def test_what_cannot_be_trained_is_said_before_a_folder_is_made(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 4, "accumulate": 4}])
def test_batchnorm_on_one_value_is_said_before_a_folder_is_made(settings: dict[str, Any], tmp_path: Path) -> None:
    layers = "nn.Conv2d(1, 8, 8), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, num_classes)"
    (tmp_path / "net.py").write_text(f"from torch import nn\ndef build(num_classes): return nn.Sequential({layers})\n")
    config = tiny(model={"name": f"{tmp_path}/net.py:build"}, experts=None, **settings)
    with pytest.raises(UserError, match=r"on one image at a time .*Expected more than 1 value per channel"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no CUDA device; use auto or cpu"):
        train(tiny(device="cuda"), tmp_path / "run")


def test_all_that_this_machine_lacks_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(logger: TensorBoard) -> None:
        raise UserError("loggers: tensorboard is missing")

    monkeypatch.setattr(TensorBoard, "check", missing)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError) as caught:
        check_settings(tiny(device="mps", graphs=True, loggers=["tensorboard"]))
    assert str(caught.value).splitlines() == [
        "loggers: tensorboard is missing",
        "device: mps, but torch sees no MPS device; use auto or cpu",
    ]


def test_the_default_threats_are_those_of_the_data() -> None:
    assert tiny().threats == tuple(DIGITS)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_only_tf32_computes_in_tf32(precision: str) -> None:
    """torch convolves in TF32 on CUDA unless it is told not to."""
    conv, matmul = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    with numerics(precision):
        assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")
        assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")
    assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (conv, matmul)


def test_a_model_is_tried_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rounding would be taken for a dependence on the other images of a batch."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = set()

    class Watching(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.add((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
            return super().forward(x.flatten(1))

    check_attackable(Watching(12, 3), torch.rand(3, 3, 2, 2))
    assert seen == {(False, "highest")}
    assert torch.backends.cudnn.allow_tf32
