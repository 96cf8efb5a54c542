"""Routing in numbers: closed forms of information and distance, and a probe that cannot know the image."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from rome.core.errors import UserError
from rome.report.gates import GateSample
from rome.report.routing import Probe, jensen_shannon, linear_probe, mutual_information, routing_numbers

GROUPS = ("natural", "L1", "L2", "Linf")


def relative_entropy(weights: np.ndarray) -> np.ndarray:
    safe = np.where(weights > 0, weights, 1)
    return -(weights * np.log(safe)).sum(axis=-1) / math.log(weights.shape[-1])


def sample_of(weights: np.ndarray, groups: tuple[str, ...] = GROUPS) -> GateSample:
    """Gates (G, L, n, K), the same at all tokens."""
    layers = tuple(f"layer{i}" for i in range(weights.shape[1]))
    return GateSample(groups, layers, weights, weights, weights, relative_entropy(weights))


def one_hot(experts: np.ndarray, K: int) -> np.ndarray:
    return np.eye(K)[experts]


def random_gates(G: int = 4, L: int = 2, n: int = 120, K: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(K), size=(G, L, n))


def test_threats_that_are_routed_alike_give_no_information() -> None:
    weights = np.repeat(random_gates(G=1), 4, axis=0)
    found = routing_numbers(sample_of(weights))
    assert found.information == pytest.approx((0, 0), abs=1e-12)
    assert found.distance_mean == pytest.approx(0, abs=1e-6)
    assert all(each.mean == pytest.approx(0, abs=1e-6) for each in found.distances)


def test_an_expert_for_each_threat_gives_all_there_is_to_know() -> None:
    weights = np.broadcast_to(one_hot(np.array([3, 0, 1, 2]), 4)[:, None, None], (4, 2, 10, 4))
    found = routing_numbers(sample_of(weights))
    assert found.information == pytest.approx((math.log2(3), math.log2(3)))
    assert found.information_mean == pytest.approx(found.most_information)
    assert found.information_share == pytest.approx(1)
    assert [each.mean for each in found.distances] == pytest.approx([1] * 6)
    assert found.entropy_mean == 0
    assert found.usage_mean == pytest.approx(math.log(3) / math.log(4))
    assert found.gates_probe.accuracy == 1


def test_information_and_distance_by_hand() -> None:
    means = np.array([[1.0, 0.0], [0.5, 0.5]])
    # H(.75, .25) = .8112781 bits; the mean of H(1, 0) = 0 and H(.5, .5) = 1 is .5
    assert mutual_information(means) == pytest.approx(0.3112781, abs=1e-7)
    assert jensen_shannon(*means) == pytest.approx(math.sqrt(0.3112781), abs=1e-7)


def test_the_distance_is_a_metric_between_0_and_1() -> None:
    rng = np.random.default_rng(1)
    for a, b, c in rng.dirichlet(np.full(4, 0.3), size=(200, 3)):
        assert 0 <= jensen_shannon(a, b) <= 1
        assert jensen_shannon(a, b) == jensen_shannon(b, a)
        assert jensen_shannon(a, c) <= jensen_shannon(a, b) + jensen_shannon(b, c) + 1e-12
    assert jensen_shannon(np.array([1.0, 0]), np.array([0, 1.0])) == 1


def test_information_is_the_plug_in_estimate_of_the_joint_distribution() -> None:
    weights = random_gates(seed=3)
    found = routing_numbers(sample_of(weights))
    for layer, value in enumerate(found.information):
        joint = weights[1:, layer].mean(axis=1) / 3  # p(threat) p(expert | threat)
        apart = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
        assert value == pytest.approx(float((joint * np.log2(joint / apart)).sum()))


def test_natural_images_count_in_distances_alone() -> None:
    weights = random_gates()
    other = weights.copy()
    other[0] = random_gates(G=1, seed=9)[0]
    one, two = (asdict(routing_numbers(sample_of(each))) for each in (weights, other))
    with_natural = [pair for pair in one.pop("distances") if pair["a"] == "natural"]
    assert with_natural != [pair for pair in two.pop("distances") if pair["a"] == "natural"]
    assert one == two


def test_entropy_of_the_load_tells_collapse_from_specialisation() -> None:
    collapsed = one_hot(np.zeros((4, 1, 12), dtype=int), 3)
    specialised = one_hot(np.broadcast_to(np.arange(12) % 3, (4, 1, 12)), 3)
    for weights, usage in ((collapsed, 0), (specialised, 1)):
        found = routing_numbers(sample_of(weights))
        assert (found.entropy_mean, found.usage_mean) == (0, pytest.approx(usage))


def test_two_threats_two_experts_and_one_layer() -> None:
    weights = random_gates(G=3, L=1, K=2)
    found = routing_numbers(sample_of(weights, ("natural", "L2", "Linf")))
    assert found.threats == ("L2", "Linf")
    assert found.most_information == 1
    assert found.gates_probe.chance == 0.5
    assert found.between == (found.distances[-1].mean,)
    assert found.information[0] == pytest.approx(found.between[0] ** 2)  # two groups: the divergence itself


def test_one_expert_has_nothing_to_tell() -> None:
    found = routing_numbers(GateSample(GROUPS, ("only",), *[np.ones((4, 1, 8, 1))] * 3, np.ones((4, 1, 8))))
    assert (found.most_information, found.information_share, found.entropy_mean, found.usage_mean) == (0, 0, 1, 1)
    assert found.gates_probe.accuracy == pytest.approx(1 / 3)


@pytest.mark.parametrize("size", [{"G": 2}, {"n": 1}])
def test_too_little_to_compare_is_said(size: dict[str, int]) -> None:
    weights = random_gates(**size)
    with pytest.raises(UserError, match=r"two|increase n"):
        routing_numbers(sample_of(weights, GROUPS[: len(weights)]))


def test_a_probe_of_noise_is_at_chance_and_of_separated_groups_certain() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(3, 200, 6))
    assert abs(linear_probe(noise).accuracy - 1 / 3) < 4 * math.sqrt(2 / 9 / 600)
    apart = noise + 20 * np.eye(6)[:3, None]
    assert linear_probe(apart) == Probe(1, 0, 1 / 3)


def test_a_probe_never_meets_an_image_twice() -> None:
    """Versions that are all alike get one answer, right for one of the three: exactly chance. If some of an image's
    versions were fitted to, knowing them would move the answer for the others away from chance."""
    images = np.random.default_rng(0).normal(size=(1, 40, 30))
    found = linear_probe(np.repeat(images, 3, axis=0))
    assert (found.accuracy, found.spread) == (pytest.approx(1 / 3), pytest.approx(0, abs=1e-12))


def test_the_seed_draws_the_folds_and_nothing_else_does() -> None:
    inputs = np.random.default_rng(0).normal(size=(3, 30, 4)) + np.eye(4)[:3, None]
    state = np.random.get_state()[1].copy()
    assert linear_probe(inputs, seed=1) == linear_probe(inputs, seed=1)
    assert len({linear_probe(inputs, seed=seed).accuracy for seed in range(5)}) > 1
    assert np.array_equal(np.random.get_state()[1], state)


def test_the_features_probe_reads_the_threats_alone() -> None:
    features = np.random.default_rng(0).normal(size=(4, 60, 5))
    features[1:] += 20 * np.eye(5)[:3, None]
    found = routing_numbers(sample_of(random_gates(n=60)), features=features)
    assert found.features_probe == Probe(1, 0, 1 / 3)
    assert routing_numbers(sample_of(random_gates(n=60))).features_probe is None


def test_numbers_go_into_json_and_back() -> None:
    dumped: dict[str, Any] = asdict(routing_numbers(sample_of(random_gates())))
    back = json.loads(json.dumps(dumped, allow_nan=False))
    assert back["gates_probe"]["chance"] == pytest.approx(1 / 3)
    assert len(back["distances"]) == 6
    assert set(back["distances"][0]) == {"a", "b", "layers", "mean"}
