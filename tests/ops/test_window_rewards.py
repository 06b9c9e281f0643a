"""Rewards inside a window, against exchanging every pair of it by hand."""

import pytest
import torch

import flexrec


@pytest.mark.parametrize("metric", ["ndcg", "ndcg@3", "mrr", "err", "recall@4", "rbp.8"])
@pytest.mark.parametrize(("start", "stop"), [(0, 7), (0, 3), (2, 5), (5, 7), (6, 7)])
def test_rewards_are_those_of_exchanges_in_the_window(metric, start, stop):
    gains = torch.rand(4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gains[gains < 0.3] = 0
    lengths = torch.tensor([7, 7, 5, 3])
    found = flexrec.window_rewards(gains, metric, start, stop, lengths=lengths)
    assert found.shape == (4, stop - start)
    value = flexrec.ranking_metric(gains, metric, lengths=lengths)
    for n in range(4):
        end = min(stop, int(lengths[n]))
        for k in range(start, stop):
            differences = []
            for j in range(k + 1, end):
                exchanged = gains.clone()
                exchanged[n, [k, j]] = gains[n, [j, k]]
                differences.append(value[n] - flexrec.ranking_metric(exchanged, metric, lengths=lengths)[n])
            expected = torch.stack(differences).mean() if differences else torch.zeros((), dtype=torch.float64)
            torch.testing.assert_close(found[n, k - start], expected, rtol=1e-9, atol=1e-12)


def test_the_whole_list_is_a_window():
    gains = torch.rand(3, 9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(flexrec.window_rewards(gains, "ndcg", 0, 9), flexrec.swap_rewards(gains, "ndcg"))


@pytest.mark.parametrize("window", [(-1, 3), (3, 3), (2, 10), (5, 2)])
def test_windows_that_are_none_are_refused(window):
    with pytest.raises(ValueError, match="0 <= start < stop <= 9, got"):
        flexrec.window_rewards(torch.rand(2, 9), "ndcg", *window)
    with pytest.raises(ValueError, match="gains"):
        flexrec.window_rewards(torch.rand(9), "ndcg", 0, 2)
