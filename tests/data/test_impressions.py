"""Lists of what was shown at once: what was passed over was not chosen, whatever its user did with it before."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from shop_logs import load

PAGE, DAY = 8, 86_400


def write_pages(folder, chosen="1", passed="0", column="clicked", ids=True):
    """10 users, to each of whom the same 8 items are shown on 6 days, of which they choose the next one each day."""
    shown = [passed, chosen]
    rows = [
        (f"u{user}", f"i{i}", 1_700_000_000 + user + day * DAY, shown[i == (user + day) % PAGE], f"{user}-{day}")
        for user in range(10)
        for day in range(6)
        for i in range(PAGE)
    ]
    names = ("user", "item", "timestamp", column, "impression")
    lines = [",".join(map(str, row if ids else row[:-1])) for row in (names, *rows)]
    (folder / "interactions.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("gain", ["linear", "quantile"])
@pytest.mark.parametrize("ids", [True, False])
def test_what_is_passed_over_was_not_chosen_however_often_it_was_before(tmp_path, ids, gain):
    dataset = load(write_pages(tmp_path, ids=ids), negatives="impressions", min_history=1, gain=gain)
    assert len(dataset.train) == 8 * 5
    trained = np.unique(dataset.log.users)
    assert len(dataset.log) == 6 * len(trained), "of an item that is chosen once there is one interaction"
    for lst in dataset.train + dataset.test:
        first, day = int(dataset.user_ids[lst.user][1:]), int(lst.time - 1_700_000_000) // DAY
        wanted = [f"i{(first + d) % PAGE}" for d in range(day + 1)]
        assert [dataset.catalogue.ids[item] for item in lst.history] == wanted[:-1]
        assert [dataset.catalogue.ids[item] for item in lst.candidates[lst.interest > 0]] == wanted[-1:]
        assert lst.popularity.sum() <= len(trained) * (day + 1), "so many choices were made until then"


@pytest.mark.parametrize("gain", ["linear", "quantile"])
def test_what_is_passed_over_is_no_interaction_with_sampled_negatives_either(tmp_path, gain):
    dataset = load(write_pages(tmp_path), num_candidates=3, num_positives=1, min_history=1, gain=gain)
    assert len(dataset.log) == 6 * len(np.unique(dataset.log.users))


def test_a_history_shows_how_much_each_choice_was_worth(tmp_path):
    """As it does where negatives are sampled, and where a request names the user."""
    folder = write_pages(tmp_path, "view", "impression", "event")
    dataset = load(folder, negatives="impressions", min_history=1)
    for lst in dataset.train:
        np.testing.assert_allclose(lst.history_interest, 0.3, rtol=1e-6)
        assert not lst.history_liked.any()
