"""What files hold: every field there, known and within its bounds, or the file is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from rkd_cli.schemas import EpochDone, Exported, Header, Position, Result

HEADER: dict[str, Any] = {
    "format": 1, "base": "resnet18", "embedding_size": 8, "l2normalize": True, "resize": 72, "image_size": 64,
    "fit": "pad", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "bgr255": False, "input_size": None,
    "dataset": "demo", "epoch": 3, "train_recall": {"1": 0.5}, "eval_recall": {"1": 0.25, "10": 0.5},
    "select_on": "val", "seen_classes": ["0a1b2c-", "0a1b2d-12-ff"], "version": "1.2.3",
}  # fmt: skip
ROW: dict[str, Any] = {
    "epoch": 2, "losses": {"dist": 0.25}, "learning_rate": 1e-4, "seconds": 3.5, "images_per_second": 10.0,
    "figures": {"train": {"R@1": 0.5}, "val": {"R@1": 0.75}, "eval": {"R@1": 0.25, "R@100": 1.0}}, "is_best": True,
}  # fmt: skip
POSITION: dict[str, Any] = {
    "format": 2, "epoch": 3, "step": 7, "sums": {"dist": 0.5}, "epoch_seconds": 1.0, "seconds": 9.0, "rows": [ROW],
    "figures": {"train": {"R@1": 0.5}, "eval": {"R@2": 0.5}}, "inputs": {"images": "abc"},
}  # fmt: skip
RESULT: dict[str, Any] = {
    "selected_on": "eval", "best_epoch": 2, "best": {"eval": {"R@1": 0.5, "R@2": 0.75}}, "seconds": 9.5,
    "final": {"train": {"R@1": 0.5}, "eval": {"R@1": 0.25}}, "best_train": {"R@1": 0.5},
}  # fmt: skip
FILES: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "header": (Header, HEADER), "row": (EpochDone, ROW), "position": (Position, POSITION), "result": (Result, RESULT),
}  # fmt: skip
REQUIRED = {
    "header": {"base", "embedding_size", "l2normalize", "resize", "image_size", "mean", "std", "dataset", "epoch",
               "train_recall", "eval_recall"},
    "row": {"epoch", "seconds", "is_best"},
    "position": set(),
    "result": {name for name in RESULT if name != "best_train"},
}  # fmt: skip


def read(model: type[BaseModel], facts: dict[str, Any]) -> BaseModel:
    return model.model_validate_json(json.dumps(facts))


def refused(model: type[BaseModel], facts: dict[str, Any]) -> str:
    """The field that a file is refused for."""
    with pytest.raises(ValidationError) as caught:
        read(model, facts)
    return str(caught.value.errors()[0]["loc"][0])


IN_SPACE: dict[str, Any] = {"teacher_space": "unit", "teacher_size": 5, "projections": [4, 8]}


def test_a_file_without_a_teachers_space_is_as_before() -> None:
    """So that earlier versions, which know no such fields, read it."""
    for header in (HEADER, HEADER | IN_SPACE):
        assert json.loads(read(Header, header).model_dump_json()) == header
        facts = {"format": 1, "header": header, "parameters": 7, "weights": "float"}
        assert json.loads(read(Exported, facts).model_dump_json()) == facts


@pytest.mark.parametrize(
    "changes",
    [{"teacher_space": None}, {"teacher_size": None}, {"projections": [9]}, {"projections": [0]},
     {"teacher_space": None, "teacher_size": None}, {"teacher_space": "other"}],
    ids=str,
)  # fmt: skip
def test_a_projection_is_of_a_teacher_and_of_leading_dimensions(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        read(Header, HEADER | IN_SPACE | changes)


@pytest.mark.parametrize("name", FILES)
def test_what_is_written_is_what_is_read(name: str) -> None:
    model, facts = FILES[name]
    found = read(model, facts)
    assert json.loads(found.model_dump_json()) == facts
    assert read(model, json.loads(found.model_dump_json())) == found


@pytest.mark.parametrize("name", FILES)
def test_unknown_fields_are_refused(name: str) -> None:
    model, facts = FILES[name]
    assert refused(model, facts | {"surprise": 1}) == "surprise"


@pytest.mark.parametrize("name", FILES)
def test_fields_without_a_default_are_required(name: str) -> None:
    model, facts = FILES[name]
    for field in facts:
        rest = {key: value for key, value in facts.items() if key != field}
        if field in REQUIRED[name]:
            assert refused(model, rest) == field
        else:
            read(model, rest)


def test_the_keys_of_recalls_are_numbers_again() -> None:
    assert Header.model_validate_json(json.dumps(HEADER)).eval_recall == {1: 0.25, 10: 0.5}


def test_the_score_is_of_the_validation_split_where_there_is_one() -> None:
    row = EpochDone.model_validate_json(json.dumps(ROW))
    assert row.score() == 0.75
    assert row.model_copy(update={"figures": {"eval": {"R@1": 0.25}}}).score() == 0.25


def test_the_score_without_labels_is_the_overlap() -> None:
    figures = {"eval": {"overlap@10": 0.25, "asymmetric@1": 1.0}}
    row = EpochDone.model_validate_json(json.dumps(ROW | {"figures": figures}))
    assert row.score() == 0.25
    assert row.model_copy(update={"figures": figures | {"val": {"overlap@10": 0.75}}}).score() == 0.75


ROW_0_1: dict[str, Any] = {name: value for name, value in ROW.items() if name != "figures"} | {
    "train_recall": {"1": 0.5}, "eval_recall": {"1": 0.25, "100": 1.0}, "val_recall": {"1": 0.75},
}  # fmt: skip
RESULT_0_1: dict[str, Any] = {
    "selected_on": "eval", "best_epoch": 2, "best_train_recall": 0.5, "best_eval_recall": 0.5,
    "final_train_recall": 0.5, "final_eval_recall": 0.25, "best_eval_recalls": {"1": 0.5, "2": 0.75}, "seconds": 9.5,
}  # fmt: skip


def test_files_of_version_0_1_are_read() -> None:
    row, result = read(EpochDone, ROW_0_1), read(Result, RESULT_0_1)
    assert (row, result) == (read(EpochDone, ROW), read(Result, RESULT))
    teacher = {"teacher_train_recall": {"1": 0.5}, "teacher_eval_recall": {"2": 0.5}}
    position = {name: value for name, value in POSITION.items() if name != "figures"} | {"rows": [ROW_0_1]}
    assert read(Position, position | teacher) == read(Position, POSITION)


def test_files_of_agreement_of_version_0_1_are_read() -> None:
    found = {"overlap@10": 0.25, "asymmetric@1": 1.0}
    before = {name: value for name, value in ROW_0_1.items() if "recall" not in name} | {"eval_agreement": found}
    assert read(EpochDone, before) == read(EpochDone, ROW | {"figures": {"eval": found}})
    before = {name: None if "_recall" in name else value for name, value in RESULT_0_1.items()} | {
        "best_eval_recalls": {}, "best_eval_agreement": found, "final_eval_agreement": {"overlap@10": 0.5},
        "best_train_agreement": {"overlap@10": 0.75},
    }  # fmt: skip
    now = {"best": {"eval": found}, "final": {"eval": {"overlap@10": 0.5}}, "best_train": {"overlap@10": 0.75}}
    assert read(Result, before) == read(Result, RESULT | now)


@pytest.mark.parametrize("damage", [{"eval_recall": 5}, {"eval_recall": [0.5]}, {"val_agreement": None}], ids=str)
def test_a_damaged_file_of_version_0_1_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        read(EpochDone, ROW_0_1 | damage)
    with pytest.raises(ValidationError):
        read(Result, RESULT_0_1 | {"best_eval_recalls": 5})


WRONG: dict[str, list[tuple[str, object]]] = {
    "header": [
        ("format", 2), ("base", "resnet 18"), ("base", ""), ("base", "resnet18\n"), ("base", "a" * 201),
        ("embedding_size", 0), ("embedding_size", 65537), ("embedding_size", "8"), ("embedding_size", 8.5),
        ("l2normalize", 1), ("resize", 0), ("resize", 8193), ("image_size", 0), ("image_size", 8193),
        ("fit", "auto"), ("fit", None),
        ("mean", [0.0, 0.0]), ("mean", [0.0, 0.0, float("nan")]), ("std", [0.0, 1.0, 1.0]), ("std", [-1.0, 1.0, 1.0]),
        ("std", [1.0, 1.0, float("inf")]), ("input_size", 0), ("input_size", 8193), ("bgr255", None),
        ("dataset", "a" * 201), ("dataset", None), ("epoch", -1), ("epoch", 10**9 + 1), ("epoch", True),
        ("eval_recall", {"1": 1.01}), ("eval_recall", {"1": -0.01}), ("eval_recall", {"one": 0.5}),
        ("train_recall", {str(k): 0.5 for k in range(101)}), ("train_recall", None), ("select_on", "train"),
        ("seen_classes", ["a" * 65]), ("seen_classes", [1]), ("seen_classes", "abc"), ("version", "1" * 51),
    ],
    "row": [
        ("epoch", -1), ("epoch", 1.5), ("losses", {"dist": "0.5"}), ("losses", [0.5]), ("learning_rate", None),
        ("figures", {"train": {"R@1": 2}}), ("figures", {"eval": {"R@1": None}}), ("figures", [0.5]), ("seconds", -0.1),
        ("seconds", float("inf")), ("seconds", float("nan")), ("images_per_second", -1.0), ("is_best", "yes"),
    ],
    "position": [
        ("format", 1), ("epoch", -1), ("step", -1), ("step", "7"), ("sums", {"dist": None}), ("epoch_seconds", -1.0),
        ("seconds", float("inf")), ("rows", [ROW | {"surprise": 1}]), ("rows", [{}]), ("inputs", {"images": 5}),
        ("figures", {"eval": {"R@1": 1.5}}),
    ],
    "result": [("selected_on", "train"), ("best_epoch", "2"), ("best", {"eval": 0.5}),
               ("final", {"eval": {"overlap@10": 1.5}}), ("best_train", {"R@1": 2.0})],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "field", "value"), [(name, *wrong) for name, cases in WRONG.items() for wrong in cases]
)
def test_values_out_of_bounds_are_refused(name: str, field: str, value: object) -> None:
    model, facts = FILES[name]
    assert refused(model, facts | {field: value}) == field


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("header", "base", "timm:convnext_tiny.fb_in1k"), ("header", "embedding_size", 65536),
        ("header", "resize", 8192), ("header", "image_size", 1), ("header", "eval_recall", {"1": 0, "2": 1}),
        ("header", "epoch", 10**9), ("header", "train_recall", {str(k): 0.5 for k in range(100)}),
        ("header", "select_on", None), ("header", "seen_classes", ["a" * 64]), ("row", "seconds", 0),
    ],
)  # fmt: skip
def test_values_at_their_bounds_are_taken(name: str, field: str, value: object) -> None:
    model, facts = FILES[name]
    read(model, facts | {field: value})


def test_a_description_cannot_be_changed() -> None:
    header = Header.model_validate_json(json.dumps(HEADER))
    with pytest.raises(ValidationError):
        header.epoch = 4  # type: ignore[misc]
