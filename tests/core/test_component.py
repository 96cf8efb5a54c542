"""Components: named by kind, validated, plain data; mistakes answer with their place and the nearest name."""

from __future__ import annotations

import re
from abc import abstractmethod
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, Field, ValidationError

from rome.attacks import APGD, PGD, Attack
from rome.core.component import Component, Number, Settings
from rome.core.errors import UserError
from rome.threats import CIFAR10, LpBall, Threat


class Fruit(Component):
    """A family for these tests.

    With a second paragraph.
    """

    @abstractmethod
    def taste(self) -> str: ...


class Apple(Fruit):
    """Crisp
    and sweet.
    """

    kind = "apple"
    weight: Number = Field(default=0.2, gt=0)

    def taste(self) -> str:
        return "sweet"


class Cider(Apple):
    kind = "cider"
    strength: Number = 0.05


class Basket(Fruit):
    kind = "basket"
    size: int
    first: Fruit
    others: tuple[Fruit, ...] = ()
    by_name: dict[str, Fruit] = Field(default_factory=dict)

    def taste(self) -> str:
        return "mixed"


class Market(Settings):
    stall: Fruit
    apple: Apple = Apple()


def mistakes(model: type[BaseModel], data: Any) -> dict[str, str]:
    """Every error by its dotted place."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(data)
    return {".".join(map(str, error["loc"])): error["msg"] for error in caught.value.errors()}


def test_a_subclass_is_the_registration() -> None:
    assert Fruit.members() == {"apple": Apple, "basket": Basket, "cider": Cider}
    assert Apple.members() == {"apple": Apple, "cider": Cider}
    assert {"pgd", "apgd"} <= set(Attack.members())
    assert Attack.of_kind("pgd") is PGD
    assert PGD.family() is Attack
    assert Cider.family() is Fruit
    assert LpBall.family() is Threat


@pytest.mark.parametrize(
    ("data", "value"),
    [
        ({"kind": "apgd", "steps": 5}, APGD(steps=5)),
        ({"kind": "pgd"}, PGD()),
        ("pgd", PGD()),
        (PGD(steps=3), PGD(steps=3)),
        (
            {"kind": "pgd", "steps": {"linf": 3, 1: 4}, "step_size": "2/255"},
            PGD(steps={"Linf": 3, "L1": 4}, step_size=2 / 255),
        ),
    ],
)
def test_a_family_is_chosen_by_kind(data: Any, value: Attack) -> None:
    assert Attack.model_validate(data) == value


def test_a_member_needs_no_kind_and_accepts_its_own() -> None:
    assert (
        Apple.model_validate({"weight": 1}) == Apple.model_validate({"kind": "apple", "weight": 1}) == Apple(weight=1)
    )
    assert Apple.model_validate({"kind": "cider", "strength": "1/20"}) == Cider()
    assert Market.model_validate({"stall": {"kind": "cider"}}).stall == Cider()


def test_a_member_is_refused_where_another_is_wanted() -> None:
    assert "unknown fruit kind 'basket'" in mistakes(Apple, {"kind": "basket"})[""]
    assert "apple" in mistakes(Market, {"stall": "apple", "apple": {"kind": "basket"}})


@pytest.mark.parametrize(
    ("kind", "hint"),
    [("appel", "Did you mean 'apple'?"), ("zzz", "Valid: apple, basket, cider."), (3, "unknown fruit kind '3'"),
     (["apple"], "unknown fruit kind")],
)  # fmt: skip
def test_an_unknown_kind_answers_with_the_nearest(kind: Any, hint: str) -> None:
    assert hint in mistakes(Fruit, {"kind": kind})[""]


@pytest.mark.parametrize("data", [{}, {"weight": 1}, {"kind": None}, {"kind": ""}])
def test_a_missing_kind_lists_what_there_is(data: Any) -> None:
    assert "needs a kind. Valid: apple, basket, cider." in mistakes(Fruit, data)[""]


@pytest.mark.parametrize("data", [3, None, [], ["apple"]])
def test_other_things_are_no_component(data: Any) -> None:
    assert mistakes(Fruit, data)
    assert mistakes(Apple, data)


def test_an_unknown_key_is_refused() -> None:
    assert "wieght" in mistakes(Apple, {"wieght": 3})
    assert "extra" in mistakes(Attack, {"kind": "pgd", "extra": 3})
    with pytest.raises(UserError, match="step"):
        PGD(step=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: PGD(step=10), r"PGD: step: unknown key\. Did you mean 'steps'\? Valid: .*"),
        (lambda: Apple(weight=-1), "Apple: weight: input should be greater than 0, not -1"),
        (lambda: Apple(weight="x/y", colour=1), "Apple: weight: .* fraction .*; Apple: colour: unknown key.*"),
        (lambda: Apple(weight=f"1{'0' * 400}/1"), "Apple: weight: .* fraction .*"),
        (lambda: Basket(first=Apple()), "Basket: size: is missing"),
        (lambda: Basket(size=1, first={"kind": "cider", "strenth": 1}),
         "Basket: first.strenth: unknown key. Did you mean 'strength'.*"),
        (lambda: Basket(size=1, first="aple"), "Basket: first: unknown fruit kind 'aple'. Did you mean 'apple'.*"),
        (lambda: Market(stall="apple", apple=Cider(strength=[])), "Cider: strength: .*"),
    ],
)  # fmt: skip
def test_mistakes_in_python_are_one_line(make: Any, line: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert re.fullmatch(line, str(caught.value))
    assert caught.value.__suppress_context__


def test_every_mistake_is_reported_at_once_with_its_place() -> None:
    found = mistakes(
        Market,
        {
            "stall": {
                "kind": "basket",
                "size": "many",
                "first": {"kind": "aple"},
                "others": ["apple", {"kind": "apple", "weight": -1, "colour": "red"}, {}],
                "by_name": {"b": {"kind": "basket", "size": 1, "first": {"kind": "cider", "strength": "1/0"}}},
            },
            "apple": {"weight": "x/y"},
            "till": 1,
        },
    )
    assert set(found) == {
        "stall.size", "stall.first", "stall.others.1.weight", "stall.others.1.colour", "stall.others.2",
        "stall.by_name.b.first.strength", "apple.weight", "till",
    }  # fmt: skip
    assert "Did you mean 'apple'?" in found["stall.first"]
    assert found["apple.weight"] == "'x/y' is not a fraction such as 8/255"


@pytest.mark.parametrize(
    ("text", "value"),
    [("8/255", 8 / 255), ("8 / 255", 8 / 255), ("0.5", 0.5), (3, 3.0), ("1e-3", 1e-3)],
)
def test_numbers_may_be_fractions(text: Any, value: float) -> None:
    assert Apple(weight=text).weight == value


@pytest.mark.parametrize("text", ["8/", "/", "a/b", "1/0", "1/2/3", "eight", "nan", "inf", "-1/2"])
def test_other_texts_are_no_numbers(text: str) -> None:
    assert "weight" in mistakes(Apple, {"weight": text})


@pytest.mark.parametrize(
    "value",
    [Apple(weight="1/3"), Basket(size=2, first=Cider(), others=(Apple(), Basket(size=0, first=Apple()))),
     PGD(), CIFAR10[2], APGD(steps={"L1": 3}), PGD(steps={"L1": 3}, step_size="2/255")],
    ids=lambda value: value.kind,
)  # fmt: skip
def test_a_dump_is_plain_data_that_reads_back(value: Component) -> None:
    data = value.dump()
    assert next(iter(data)) == "kind"
    assert type(value).family().model_validate(yaml.safe_load(yaml.safe_dump(data, sort_keys=False))) == value
    assert type(value).model_validate_json(value.model_dump_json()) == value


def test_a_dump_without_defaults_says_what_was_set() -> None:
    assert PGD(steps=7).model_dump(mode="json", exclude_defaults=True) == {"kind": "pgd", "steps": 7}
    assert PGD().model_dump(mode="json", exclude_defaults=True) == {"kind": "pgd"}


def test_a_component_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Apple().weight = 3


def test_the_summary_is_the_first_paragraph() -> None:
    assert Fruit.summary() == "A family for these tests."
    assert Apple.summary() == "Crisp and sweet."
