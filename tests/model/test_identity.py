"""Fixed sign vectors of ids."""

from __future__ import annotations

import numpy as np
import pytest

from felrec_dist.model.identity import identity_rows

IDS = np.concatenate(
    [
        np.arange(-50, 50),
        np.array([-(2**63), -(2**63) + 1, 2**63 - 2, 2**63 - 1, 2**32, 2**32 + 1]),
        np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 94),
    ]
)


def test_a_pure_function_of_the_id() -> None:
    rows_MD = identity_rows(IDS, 128, salt=0)
    assert rows_MD.dtype == np.float32
    order = np.random.default_rng(1).permutation(len(IDS))
    np.testing.assert_array_equal(identity_rows(IDS[order], 128, salt=0), rows_MD[order])
    for row in (0, 100, 103, len(IDS) - 1):
        alone_1D = identity_rows(IDS[row : row + 1], 128, salt=0)
        np.testing.assert_array_equal(alone_1D[0], rows_MD[row])


@pytest.mark.parametrize("width", [1, 8, 63, 64, 65, 128, 200])
def test_signs_of_any_width(width: int) -> None:
    rows_MD = identity_rows(IDS, width, salt=1)
    assert rows_MD.shape == (len(IDS), width)
    np.testing.assert_array_equal(np.abs(rows_MD), 1.0)
    # A narrower vector is the beginning of a wider one.
    np.testing.assert_array_equal(rows_MD, identity_rows(IDS, 256, salt=1)[:, :width])


def test_nearly_orthogonal_and_balanced() -> None:
    rows_MD = identity_rows(IDS, 256, salt=0)
    cosines_MM = rows_MD @ rows_MD.T / 256 - np.eye(len(IDS))
    # 20,000 pairs of standard deviation 1 / 16: five of them are a bound that chance keeps.
    assert np.abs(cosines_MM).max() < 5 / 16
    assert np.abs(rows_MD.mean(axis=0)).max() < 5 / np.sqrt(len(IDS))
    assert cosines_MM.std() == pytest.approx(1 / 16, rel=0.05)


def test_the_salt_keeps_users_and_items_apart() -> None:
    users_MD, items_MD = (identity_rows(IDS, 256, salt=salt) for salt in (0, 1))
    cosines_MM = users_MD @ items_MD.T / 256
    assert np.abs(cosines_MM).max() < 5 / 16


def test_no_ids() -> None:
    assert identity_rows(np.empty(0, dtype=np.int64), 8, salt=0).shape == (0, 8)
