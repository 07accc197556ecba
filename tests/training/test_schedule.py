"""Learning rates against closed forms."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from felrec_dist.training.schedule import ScheduleConfig, learning_rate

STEPS = 7


def released(**settings: Any) -> list[float]:
    """The rate of each epoch; it must be the same at each of its steps."""
    config = ScheduleConfig(kind="released", **settings)
    epochs = []
    for epoch in range(config.epochs):
        rates = {learning_rate(config, epoch, step, STEPS) for step in range(STEPS)}
        assert len(rates) == 1, "set once per epoch"
        epochs.append(rates.pop())
    return epochs


def per_step(steps_per_epoch: int = STEPS, **settings: Any) -> list[float]:
    """The rates of all steps, one after the other."""
    config = ScheduleConfig(kind="step", **settings)
    return [
        learning_rate(config, epoch, step, steps_per_epoch)
        for epoch in range(config.epochs)
        for step in range(steps_per_epoch)
    ]


def test_released_at_the_settings_of_the_paper() -> None:
    rates = released()
    assert len(rates) == 100
    assert rates[0] == 1e-7, "epoch 0 does not learn"
    assert rates[5] == pytest.approx(1e-7 + (0.01 - 1e-7) / 2, rel=1e-12)
    assert rates[10] == 0.01
    # e - w of E - w - 1 = 89: the cosine ends with the last epoch.
    assert rates[99] == pytest.approx(1e-7, rel=1e-9)
    expected = 1e-7 + (0.01 - 1e-7) * 0.5 * (1 + math.cos(math.pi * 30 / 89))
    assert rates[40] == pytest.approx(expected, rel=1e-12)


def test_released_at_the_settings_of_the_reference_trajectories() -> None:
    assert released(epochs=3, warmup_epochs=1) == pytest.approx([1e-7, 1e-2, 1e-7], rel=1e-9)


@pytest.mark.parametrize(
    ("epochs", "warmup_epochs", "expected"),
    [
        (1, 0, [0.5]),
        (2, 0, [0.5, 0.1]),
        (2, 1, [0.1, 0.5]),
        (3, 0, [0.5, 0.3, 0.1]),
        (3, 2, [0.1, 0.3, 0.5]),
        (5, 2, [0.1, 0.3, 0.5, 0.3, 0.1]),
    ],
)
def test_released_by_hand(epochs: int, warmup_epochs: int, expected: list[float]) -> None:
    rates = released(epochs=epochs, warmup_epochs=warmup_epochs, base_lr=0.5, eta_min=0.1)
    assert rates == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("epochs", "warmup_epochs", "steps"), [(1, 0, 1), (1, 0, 2), (3, 0, 5), (4, 1, 5), (9, 8, 3)]
)
def test_step_is_linear_then_cosine(epochs: int, warmup_epochs: int, steps: int) -> None:
    rates = per_step(steps, epochs=epochs, warmup_epochs=warmup_epochs, base_lr=0.5, eta_min=0.1)
    num_warmup = warmup_epochs * steps
    warmup, cosine = rates[:num_warmup], rates[num_warmup:]
    assert warmup == pytest.approx([0.1 + 0.4 * i / num_warmup for i in range(num_warmup)])
    last = max(1, len(cosine) - 1)
    assert cosine == pytest.approx(
        [0.1 + 0.2 * (1 + math.cos(math.pi * i / last)) for i in range(len(cosine))]
    )
    assert cosine[0] == 0.5, "the warm-up ends at the base rate"
    if len(cosine) > 1:
        assert cosine[-1] == pytest.approx(0.1), "the last step of all runs at the lowest rate"


def test_step_with_warmup_moves_at_every_step_and_never_leaves_its_bounds() -> None:
    rates = per_step(epochs=6, warmup_epochs=2)
    differences = [later - sooner for sooner, later in itertools.pairwise(rates)]
    assert all(difference > 0 for difference in differences[: 2 * STEPS])
    assert all(difference < 0 for difference in differences[2 * STEPS :])
    assert min(rates) >= 1e-7
    assert max(rates) == 0.01
