"""Windows, losses and training of the next-item models, against loops over events and windows."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torchrec")

from felrec_dist.baselines.next_item import NextItemTraining, WindowReader, Windows, softmax_losses
from felrec_dist.baselines.shuffled import ShuffledBatch, draw_negatives
from felrec_dist.baselines.training import ITEM
from felrec_dist.data.dataset import PreparedDataset, Span
from felrec_dist.data.stream import EventStream
from tests import tiny
from tests.baselines.next_item import N, build, experiment, first_batch, forward, windows_of
from tests.ranks import run_on_ranks

# With batches of 4, the last batch of the validation part holds 2 events: two of four ranks none.
NUM_EVENTS = 303
VARIANTS = ["sasrec", "gru4rec-bptt"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return tiny.prepare_events(tmp_path_factory.mktemp("data"), NUM_EVENTS)


def test_windows_are_what_a_loop_over_events_finds(dataset: PreparedDataset) -> None:
    reader = WindowReader(dataset, N)
    expected = windows_of(dataset)
    num_left_out = 0
    for batch, _ in EventStream(dataset, Span(0, dataset.num_events), 37).batches():
        windows = reader.read(batch.user_offset, batch.user_length)
        for row, position in enumerate(batch.position):
            length = windows.lengths_B[row]
            assert windows.items_BN[row, :length].tolist() == expected[position]
            assert not windows.items_BN[row, length:].any()
            num_left_out += int(min(batch.user_length[row], N) - length)
    assert num_left_out > 0, "some items must be new"
    assert {len(window) for window in expected} == set(range(N + 1))


def test_the_target_of_a_slot_is_the_next_item() -> None:
    windows = Windows(np.array([[7, 5, 3, 0], [2, 0, 0, 0]]), np.array([3, 1]))
    targets_BN = windows.targets(np.array([9, 8]))
    assert targets_BN[0, :3].tolist() == [9, 7, 5]
    assert targets_BN[1, 0] == 8


def test_the_softmax_is_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    scores_PV = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    targets_P = torch.tensor([0, 4, 2, 2, 1, 3])
    is_target_PV = F.one_hot(targets_P, 5).bool()
    losses_P = softmax_losses(scores_PV[is_target_PV], scores_PV.clone(), is_target_PV)
    expected_P = F.cross_entropy(scores_PV, targets_P, reduction="none")
    torch.testing.assert_close(losses_P, expected_P)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss", ["bpr", "softmax", "sampled-softmax"])
def test_equal_scores_lose_what_chance_does(
    dataset: PreparedDataset, variant: str, loss: str
) -> None:
    training = build(experiment(dataset, variant, loss), dataset)
    training.tables.parameters[ITEM].data.zero_()
    batch = first_batch(training)
    objective, (reported,) = training.losses(batch, epoch=0)
    lengths_B = np.minimum(batch.user_length, N)
    expected = training.chance_loss
    assert expected is not None
    if loss == "sampled-softmax":  # a target that was drawn counts once
        generator = np.random.default_rng([training.config.training.seed, 0, batch.step])
        drawn = generator.integers(0, dataset.num_train_items, size=3)
        windows = windows_of(dataset)
        targets = [
            target
            for position, item in zip(batch.positions, batch.item_index, strict=True)
            for target in [item, *windows[position]][: len(windows[position])]
        ]
        assert any(target in drawn for target in targets)
        others = [1 + sum(drawn != target) for target in targets]
        expected = float(np.log(others).mean())
    assert reported.item() == pytest.approx(expected, rel=1e-6)
    num_pairs = lengths_B.sum() * training.num_negatives
    is_summed = loss == "bpr"
    assert objective.item() == pytest.approx(expected * (num_pairs if is_summed else 1), rel=1e-6)


class Scrambled(WindowReader):
    """Fills the slots beyond a window's length with items."""

    def read(self, user_offset_B: Any, user_length_B: Any) -> Windows:
        windows = super().read(user_offset_B, user_length_B)
        is_padding_BN = np.arange(N) >= windows.lengths_B[:, None]
        assert is_padding_BN.any()
        return dataclasses.replace(windows, items_BN=np.where(is_padding_BN, 3, windows.items_BN))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss", ["bpr", "softmax", "sampled-softmax"])
def test_padding_enters_nothing(
    dataset: PreparedDataset, variant: str, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = build(experiment(dataset, variant, loss), dataset)
    batch = first_batch(training)

    def gradients() -> tuple[Tensor, ...]:
        training.model.zero_grad()
        training.tables.prepare(0.1)
        objective, losses_k = training.losses(batch, epoch=0)
        objective.backward()
        parameters = training.parameters.values()
        return (losses_k.detach(), *(p.grad.clone() for p in parameters if p.grad is not None))

    expected = gradients()
    assert len(expected) == 1 + len(training.parameters)
    monkeypatch.setattr(training, "windows", Scrambled(dataset, N))
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=0.0)


class Plain:
    """The same training with one ``nn.Embedding``, an optimizer of torch and loops over windows."""

    def __init__(self, training: NextItemTraining, dataset: PreparedDataset) -> None:
        self.config = training.config
        self.loss = training.loss
        self.dataset = dataset
        self.windows = windows_of(dataset)
        self.model = copy.deepcopy(training.model)
        vectors_VD = training.tables.parameters[ITEM].detach()[: dataset.num_train_items].clone()
        self.items = nn.Embedding.from_pretrained(vectors_VD, freeze=False)
        self.optimizer = self.config.training.build_optimizer(
            [*self.model.parameters(), *self.items.parameters()]
        )

    def train(self, batch: ShuffledBatch, epoch: int, learning_rate: float) -> float:
        seed = [self.config.training.seed, epoch, batch.step]
        sizes = (len(batch.positions), N)
        targets_BN = np.zeros(sizes, dtype=np.int64)
        for row, position in enumerate(batch.positions):
            known = [batch.item_index[row], *self.windows[position]][:N]
            targets_BN[row, : len(known)] = known
        negatives_BNM = draw_negatives(
            np.random.default_rng(seed), targets_BN, self.dataset.num_train_items, 3
        )
        losses: list[Tensor] = []
        for row, position in enumerate(batch.positions):
            window = self.windows[position]
            output_LD = forward(self.model, self.items(torch.tensor(window[::-1])))
            for slot in range(len(window)):
                output_D = output_LD[len(window) - 1 - slot]
                target = targets_BN[row, slot]
                scores_V = self.items.weight @ output_D
                if self.loss == "softmax":
                    losses.append(F.cross_entropy(scores_V, torch.tensor(target)))
                else:
                    for negative in negatives_BNM[row, slot]:
                        losses.append(-F.logsigmoid(scores_V[target] - scores_V[negative]))
        total = torch.stack(losses).sum()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        (total if self.loss == "bpr" else total / len(losses)).backward()
        for parameter in [*self.model.parameters(), *self.items.parameters()]:
            assert parameter.grad is not None
            if self.config.training.grad_clip_value is not None:
                parameter.grad.clamp_(
                    -self.config.training.grad_clip_value, self.config.training.grad_clip_value
                )
        self.optimizer.step()
        return total.item() / len(losses)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("loss", "optimizer"), [("bpr", "sgd"), ("softmax", "adam")])
def test_one_rank_is_a_plain_loop(
    dataset: PreparedDataset, variant: str, loss: str, optimizer: str
) -> None:
    # The first steps, before rounding grows: clipped sums of BPR jump.
    training = build(
        experiment(dataset, variant, loss, optimizer=optimizer, grad_clip_value=0.2), dataset
    )
    plain = Plain(training, dataset)
    with training.batches(0, 0) as batches:
        for _ in range(4):
            batch = next(batches)
            found = training.train(batch, 0, 0.01).item()
            assert found == pytest.approx(plain.train(batch, 0, 0.01), rel=1e-4)
    num_items = dataset.num_train_items
    torch.testing.assert_close(
        training.tables.parameters[ITEM].detach()[:num_items],
        plain.items.weight.detach(),
        rtol=1e-3,
        atol=1e-4,
    )
    for name, value in training.model.state_dict().items():
        torch.testing.assert_close(value, plain.model.state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("variant", "loss"),
    [("sasrec", "softmax"), ("sasrec", "bpr"), ("gru4rec-bptt", "sampled-softmax")],
)
def test_it_learns_a_batch_by_heart(dataset: PreparedDataset, variant: str, loss: str) -> None:
    training = build(experiment(dataset, variant, loss, optimizer="adam"), dataset)
    batch = first_batch(training)
    assert training.chance_loss is not None
    for _ in range(40):
        reported = training.train(batch, 0, 0.03).item()
    assert reported < 0.3 * training.chance_loss


def test_users_are_the_last_output_of_their_window(dataset: PreparedDataset) -> None:
    training = build(experiment(dataset, "sasrec"), dataset)
    training.model.eval()
    windows = windows_of(dataset)
    (batch, _), *_ = EventStream(dataset, Span(0, dataset.num_events), dataset.num_events).batches()
    is_new_B = batch.user_index >= dataset.num_train_users
    assert any(windows[place] for place in np.flatnonzero(is_new_B))
    assert not all(windows)
    with torch.no_grad():
        users_BD = training.represent_users(batch)
    table_VD = training.tables.parameters[ITEM].detach()
    for position, window in enumerate(windows):
        if window:
            expected_D = forward(training.model, table_VD[window[::-1]])[-1]
            torch.testing.assert_close(users_BD[position], expected_D, rtol=1e-4, atol=1e-5)
        else:
            assert not users_BD[position].any(), "all candidates tie"


CASES = [
    ("sasrec", "softmax", "adam"),
    ("sasrec", "bpr", "sgd"),
    ("gru4rec-bptt", "sampled-softmax", "sgd"),
]


def outcomes(dataset_url: str) -> list[dict[str, Any]]:
    """Trains some steps and evaluates, for each case; on the ranks of the group there is."""
    dataset = PreparedDataset.open(dataset_url)
    found = []
    for variant, loss, optimizer in CASES:
        config = experiment(dataset, variant, loss, batch_size=4, dropout=0.2, optimizer=optimizer)
        training = build(config, dataset)
        losses = []
        with training.batches(0, 0) as batches:
            for _ in range(12):
                losses.append(training.train(next(batches), 0, 1e-3))
        world_size = training.world.world_size
        losses_nk = training.exchange.sum(torch.stack(losses)) / world_size
        counted: list[int] = []
        result, _ = training.evaluate(dataset.split.validation, 0, "causal", counted.append)
        assert counted[-1] == 2, "two of four ranks must be left without an event"
        training.check("after the evaluation")
        found.append(
            {
                "losses": losses_nk.numpy(),
                "rank": result.normalized_rank,
                "is_hit": result.is_hit,
                "is_served": result.is_served,
            }
        )
    return found


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same(dataset: PreparedDataset, tmp_path: Path) -> None:
    expected = outcomes(dataset.url)
    for world_size in (2, 4):
        for found in run_on_ranks(world_size, tmp_path, outcomes, dataset.url, timeout_s=240.0):
            for case, wanted in zip(found, expected, strict=True):
                np.testing.assert_allclose(case["losses"], wanted["losses"], rtol=1e-5)
                assert 0 < wanted["is_served"].sum() < len(wanted["is_served"])
                for name in ("rank", "is_hit", "is_served"):
                    np.testing.assert_array_equal(case[name], wanted[name], err_msg=name)
