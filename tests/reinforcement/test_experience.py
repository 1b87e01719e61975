"""Rollouts as rows: every token of a completion is trained, its end too, and files are whole or refused."""

import numpy as np
import pytest

from lightning_jax.generation import Completion
from lightning_jax.input_pipeline.prompts import Prompt
from lightning_jax.objectives.policy_gradient import ADVANTAGES, RECORDED
from lightning_jax.reinforcement.experience import (
    ExperienceError,
    as_rows,
    delete_others,
    digest,
    packed,
    path_of,
    read_rows,
    with_advantages,
    write_rows,
)

EOS = 0  # of the same id as padding
PROMPTS = [Prompt((7, 8, 9), (), {}), Prompt((6,), (), {})]
GROUPS = [
    [
        Completion(0, 0, [3, EOS], [-0.1, -0.2], "stop", ""),
        Completion(0, 1, [4, 5, 3], [-0.3, -0.4, -0.5], "length", ""),
    ],
    [Completion(1, 0, [EOS], [-0.6], "stop", ""), Completion(1, 1, [2, EOS], [-0.7, -0.8], "stop", "")],
]


def test_the_end_token_is_trained_whatever_padding_is():
    rows = as_rows(PROMPTS, GROUPS, 8)
    assert [row.sum() for row in rows["loss_mask"]] == [2, 3, 1, 2]
    np.testing.assert_array_equal(rows["targets"][0][rows["loss_mask"][0]], [3, EOS])
    np.testing.assert_allclose(rows[RECORDED][1][rows["loss_mask"][1]], [-0.3, -0.4, -0.5])
    np.testing.assert_array_equal(rows["inputs"][1, :5], [7, 8, 9, 4, 5])
    assert not rows[RECORDED][~rows["loss_mask"]].any()


def test_advantages_stand_at_the_completions_tokens_and_unused_prompts_count_nowhere():
    rows = as_rows(PROMPTS, GROUPS, 8)
    rows = with_advantages(rows, np.array([[0.5, -0.5], [2.0, -2.0]]), np.array([True, False]))
    np.testing.assert_array_equal(rows[ADVANTAGES][0], np.where(rows["loss_mask"][0], 0.5, 0))
    np.testing.assert_array_equal(rows[ADVANTAGES][1], np.where(rows["loss_mask"][1], -0.5, 0))
    assert not rows["loss_mask"][2:].any()
    assert not rows[ADVANTAGES][2:].any()


def test_packed_rows_have_every_completion_once_with_all_that_belongs_to_it():
    rows = as_rows(PROMPTS, GROUPS, 8)  # of 4, 5, 1 and 2 tokens
    rows = with_advantages(rows, np.array([[0.5, -0.5], [2.0, -2.0]]), np.array([True, True]))
    together = packed(rows, multiple=1)
    assert len(together["inputs"]) == 2
    found = []
    for row, ids_T in enumerate(together["segment_ids"]):
        for segment in range(1, ids_T.max() + 1):
            place = np.flatnonzero(ids_T == segment)
            assert np.all(np.diff(place) == 1)
            found.append({name: array[row, place] for name, array in together.items() if name != "segment_ids"})
    expected = [
        {name: array[row, ids_T > 0] for name, array in rows.items() if name != "segment_ids"}
        for row, ids_T in enumerate(rows["segment_ids"])
    ]

    def key(completion):
        return completion["inputs"].tolist()

    for one, other in zip(sorted(found, key=key), sorted(expected, key=key), strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    assert len(packed(rows, multiple=3)["inputs"]) == 3
    assert len(packed(rows, multiple=8)["inputs"]) == 4  # never more than before


def test_rows_come_back_and_others_are_refused(tmp_path):
    rows, path = as_rows(PROMPTS, GROUPS, 8), path_of(tmp_path, "rl", 3)
    write_rows(path, rows)
    again = read_rows(path, digest(rows))
    assert rows.keys() == again.keys()
    for name in rows:
        np.testing.assert_array_equal(rows[name], again[name])
        assert rows[name].dtype == again[name].dtype
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ExperienceError, match="missing, damaged or of another run"):
        read_rows(path, digest(rows))
    with pytest.raises(ExperienceError, match="missing"):
        read_rows(path_of(tmp_path, "rl", 4), digest(rows))


def test_a_digest_sees_values_shapes_and_names():
    rows = {"a": np.zeros((2, 3)), "b": np.ones(4)}
    others = [
        {"a": np.zeros((3, 2)), "b": np.ones(4)},
        {"a": np.zeros((2, 3)), "c": np.ones(4)},
        {"a": np.zeros((2, 3)), "b": np.array([1, 1, 1, 2.0])},
        {"a": np.zeros((2, 3), np.float32), "b": np.ones(4)},
    ]
    assert len({digest(each) for each in [rows, *others]}) == 5


def test_only_rollouts_that_a_checkpoint_needs_are_kept(tmp_path):
    for generation in range(4):
        write_rows(path_of(tmp_path, "rl", generation), {"a": np.zeros(1)})
    write_rows(path_of(tmp_path, "other", 0), {"a": np.zeros(1)})
    delete_others(tmp_path, "rl", {1, 3})
    assert {path.name for path in (tmp_path / "rollouts").iterdir()} == {"rl_1.npz", "rl_3.npz", "other_0.npz"}
