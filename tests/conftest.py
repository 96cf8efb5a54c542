"""Shared fixtures: the digits, small models, and noise that a test chooses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.manifold import TSNE
from torch import Tensor, nn

from helpers.problems import RADII, Digits, Problem
from helpers.small_models import THREADS, drawn, knowing
from helpers.tiny_runs import Ended, no_traceback
from rome.cli.app import main
from rome.threats import LpBall

torch.set_num_threads(THREADS)


@pytest.fixture(scope="session", autouse=True)
def _own_record(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests write is not remembered as the user's; embeddings, whose quality no test judges, take few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROME_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.setenv("ROME_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("rome.report.separability.TSNE", partial(TSNE, max_iter=250))  # the least; it makes 1000 steps
        yield


@pytest.fixture
def rome(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Call ``rome ARGUMENTS`` in this process. Anything but an exit would be a traceback, and fails the test."""

    def call(*arguments: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert no_traceback(out + err)
        return Ended(ended.value.code, out, err)

    return call


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of the local launcher come from the fork server."""
    from helpers.forked_jobs import Forked

    monkeypatch.setattr("rome.runs.launchers.local.start_process", Forked)


@pytest.fixture(scope="session")
def digits() -> Digits:
    """1,437 training and 360 test images, in the order of the file."""
    raw, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(raw / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels, dtype=torch.int64)
    return Digits((x[:1437], y[:1437]), (x[1437:], y[1437:]))


@pytest.fixture(scope="session")
def digits_model(digits: Digits) -> nn.Module:
    """A small CNN whose robust accuracy is in mid-range."""
    model = nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(48 * 16, 10),
    )  # fmt: skip
    images, labels = digits.train
    return knowing(drawn(model).double(), model[5], images.double(), labels).float().requires_grad_(False)


@pytest.fixture(scope="module")
def digits64(digits: Digits, digits_model: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    """40 digits in float64, one of them classified wrongly before any attack."""
    model = copy.deepcopy(digits_model).double()
    x, y = digits.test[0][:40].double(), digits.test[1][:40].clone()
    y[model(x).argmax(1) != y] = model(x).argmax(1)[model(x).argmax(1) != y]
    y[7] = (y[7] + 1) % 10
    return model, x, y


@pytest.fixture(params=["L1", "L2", "Linf"])
def norm(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def ball(norm: str) -> LpBall:
    """A ball of middling radius for the small images of :func:`problem`."""
    return LpBall(norm=norm, eps=RADII[norm])


@pytest.fixture(scope="session")
def problem() -> Problem:
    """24 images 3x4x4, five classes. float64, so that batching changes no digit that an attack could amplify."""
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 5)).double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=p.dtype) * (0.6 if p.ndim > 1 else 0.1)
    x = torch.rand(24, 3, 4, 4, generator=g, dtype=torch.float64)
    x = (1.6 * x - 0.3).clamp(0, 1)
    return Problem(model.eval().requires_grad_(False), x, model(x).argmax(1))
