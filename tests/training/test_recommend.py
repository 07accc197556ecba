"""Recommendations from a checkpoint against a loop over users and items."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from felrec_dist.config import ExperimentConfig
from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.data.prepare import append
from felrec_dist.errors import ConfigError, InputError
from felrec_dist.model.felrec import FELRec
from felrec_dist.training.checkpoint import Checkpoint
from felrec_dist.training.recommend import Request, best_checkpoint, recommend
from felrec_dist.training.world import World
from tests import tiny
from tests.data.oracle import Row, prepare_rows, write_parquet
from tests.evaluation.test_variants import experiment
from tests.reference import encode

N = 4


def rows_of_shop(num_events: int = 120) -> list[Row]:
    """Users are numbers, items names; the last user comes in the test part only."""
    generator = np.random.default_rng(7)
    rows: list[Row] = [
        (
            int(generator.zipf(1.5) % 14) + 10**12,
            f"item {(event // 12 + generator.zipf(1.4)) % 25}",
            event // 2,
        )
        for event in range(num_events)
    ]
    return [*rows[:-1], (77, "item 0", num_events)]


@dataclass
class Shop:
    """A trained run, and its state taken apart."""

    rows: list[Row]
    dataset: PreparedDataset
    config: ExperimentConfig
    checkpoint: Checkpoint
    model: FELRec
    users: dict[int, Tensor]
    items: dict[Any, Tensor]
    position: int

    @property
    def items_of(self) -> dict[Any, list[Any]]:
        """Oldest first."""
        found: dict[Any, list[Any]] = defaultdict(list)
        for user, item, _ in self.rows[: self.position]:
            found[user].append(item)
        return found

    def ask(self, **asked: Any) -> list[dict[str, Any]]:
        request = replace(Request(users=None, k=4), **asked)
        with tiny.build_client(self.config) as client:
            table = recommend(self.config, client, World.current(), self.checkpoint, request)
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows

    def vector_of(self, user: Any) -> Tensor:
        """What the model makes of the user's next event."""
        history = self.items_of[user][::-1][:N]
        zero = torch.zeros(8, dtype=torch.float64)
        cached = [self.items.get(item, zero) for item in history]
        return encode(self.model, cached, self.model.item_type_embedding, N)


@pytest.fixture(scope="module", params=["whole", "appended"])
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp(request.param)
    rows = rows_of_shop()
    if request.param == "whole":
        dataset = prepare_rows(rows, folder)
    else:
        prepare_rows(rows[:70], folder)
        source = write_parquet(rows[70:], folder / "more.parquet")
        dataset = append(source, folder / "out")
    config = experiment(dataset, folder / "run")
    trainer = tiny.build_trainer(config, dataset)
    trainer.fit()
    checkpoint = best_checkpoint(str(folder / "run"))
    model = tiny.felrec_of(trainer).model.eval()
    model.load_state_dict(checkpoint.model)
    trainer.restore(checkpoint, generation=9)
    step = checkpoint.position.cache_step
    keys = {"user": dataset.users.ids, "item": dataset.items.ids}
    cached = trainer.client.fetch(step, keys)
    assert dataset.items.names is not None
    names = {"user": dataset.users.ids.tolist(), "item": dataset.items.names.to_pylist()}
    users, items = (
        {
            name: torch.from_numpy(row)
            for name, row, is_there in zip(
                names[side], cached[side].rows, cached[side].found, strict=True
            )
            if is_there
        }
        for side in ("user", "item")
    )
    position = checkpoint.position.next_position
    assert position == dataset.split.validation.stop
    return Shop(rows, dataset, config, checkpoint, model, users, items, position)


def expected_items(shop: Shop, user: Any, k: int, *, exclude_seen: bool) -> list[tuple[Any, float]]:
    with torch.no_grad():
        unseen = encode(shop.model, [], shop.model.user_type_embedding, N)
        vector = shop.vector_of(user)
        scores = [
            (item, float(F.cosine_similarity(vector, shop.items.get(item, unseen), dim=0)))
            for item in dict.fromkeys(item for _, item, _ in shop.rows[: shop.position])
            if not (exclude_seen and item in shop.items_of[user])
        ]
    return sorted(scores, key=lambda scored: -round(scored[1] * 1e9))[:k]


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_items_of_all_users(shop: Shop, exclude_seen: bool) -> None:
    found = shop.ask(exclude_seen=exclude_seen)
    users = list(dict.fromkeys(user for user, *_ in shop.rows[: shop.position]))
    assert list(dict.fromkeys(row["user"] for row in found)) == users
    assert 77 not in users
    for user in users:
        mine = [row for row in found if row["user"] == user]
        expected = expected_items(shop, user, 4, exclude_seen=exclude_seen)
        assert [row["item"] for row in mine] == [item for item, _ in expected]
        assert [row["rank"] for row in mine] == list(range(1, len(mine) + 1))
        assert [row["score"] for row in mine] == pytest.approx([score for _, score in expected])
        if exclude_seen:
            assert not {row["item"] for row in mine} & set(shop.items_of[user])


def test_longer_lists_than_there_are_items(shop: Shop) -> None:
    user = shop.rows[0][0]
    found = shop.ask(users=[str(user)], k=1000, exclude_seen=True)
    expected = expected_items(shop, user, 1000, exclude_seen=True)
    assert [row["item"] for row in found] == [item for item, _ in expected]
    assert 0 < len(found) < 1000


def test_nearest_users_without_the_user(shop: Shop) -> None:
    users = [str(user) for user, *_ in shop.rows[5:9]]
    asked = list(dict.fromkeys(users))
    found = shop.ask(users=asked, nearest_users=True, k=3)
    assert list(dict.fromkeys(str(row["user"]) for row in found)) == asked
    for user in asked:
        vector = shop.vector_of(int(user)).detach()
        cosines = {
            other: float(F.cosine_similarity(vector, row, dim=0))
            for other, row in shop.users.items()
            if other != int(user)
        }
        mine = [row for row in found if str(row["user"]) == user]
        order = sorted(cosines, key=lambda other: -round(cosines[other] * 1e9))
        assert [row["score"] for row in mine] == pytest.approx([cosines[o] for o in order[:3]])
        assert {row["neighbour"] for row in mine} <= set(cosines)


def test_unknown_users_are_named_or_left_out(shop: Shop) -> None:
    known = str(shop.rows[0][0])
    with pytest.raises(InputError, match=r"a user is unknown\n.*\n  got: nobody, 5\n"):
        shop.ask(users=["nobody", known, "5"])
    with pytest.raises(InputError, match=r"got: 77\n.*known to this model by then"):
        shop.ask(users=[known, "77"])
    left = shop.ask(users=["nobody", known, "77"], skip_unknown=True)
    assert {str(row["user"]) for row in left} == {known}
    many = [f"x{number}" for number in range(9)]
    with pytest.raises(InputError, match="x0, x1, x2, x3, x4 and 4 more"):
        shop.ask(users=many)


def test_a_run_stands_for_its_best_epoch(shop: Shop) -> None:
    best = shop.checkpoint.position.best
    assert best is not None
    assert best_checkpoint(shop.checkpoint.url).position == shop.checkpoint.position


def test_a_baseline_recommends_what_its_vectors_say(tmp_path: Path) -> None:
    pytest.importorskip("torchrec")
    rows = rows_of_shop()
    dataset = prepare_rows(rows, tmp_path)
    changes = {"evaluation": {"candidates": "training", "num_negatives": 5}}
    config = tiny.experiment(
        dataset.url, str(tmp_path / "run"), {**changes, "training": {"optimizer": "adam"}}
    )
    model = {"variant": "bpr-mf", "width": 8}
    tree = config.model_dump(mode="json") | {"model": model}
    config = ExperimentConfig.model_validate(tree)
    trainer = tiny.build_trainer(config, dataset)
    trainer.fit()
    checkpoint = best_checkpoint(config.run.url)
    trainer.restore(checkpoint, generation=None)
    tables: Any = trainer.recommender
    with torch.no_grad():
        lookup = {
            "user": np.arange(dataset.num_train_users),
            "item": np.arange(dataset.num_train_items),
        }
        vectors = tables.tables.lookup(tables.rows_of(lookup))
        scores_UI = vectors["user"] @ vectors["item"].T
    trainer.recommender.close()
    with tiny.build_client(config) as client:
        table = recommend(config, client, World.current(), checkpoint, Request(users=None, k=3))
    assert dataset.items.names is not None
    found: dict[Any, list[Any]] = defaultdict(list)
    for row in table.to_pylist():
        found[row["user"]].append(row["item"])
    assert list(found) == dataset.users.ids[: dataset.num_train_users].tolist()
    for index, items in enumerate(found.values()):
        best = scores_UI[index].topk(3).indices.tolist()
        assert items == [dataset.items.names[row].as_py() for row in best]
    asked = Request(users=None, k=3, nearest_users=True)
    with tiny.build_client(config) as client, pytest.raises(ConfigError, match="compares no users"):
        recommend(config, client, World.current(), checkpoint, asked)
