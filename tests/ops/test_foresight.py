"""The all-actions gradient with foresight: equal to the true gradient, over all rankings, whatever the policy."""

from itertools import permutations

import pytest
import torch

import flexrec
from flexrec.ops.all_actions import all_actions_objective_with_kl, guesses_of_the_rest, unforeseen

LINEAR = ["dcg", "ndcg@2", "dcg_burges@3", "recall@2", "precision@3", "rbp.8"]


class Policy:
    """Of K items the first T are ranked; a logit for each prefix and item, so that all later choices depend on it."""

    def __init__(self, size, shown, seed=0, spread=1.5):
        generator = torch.Generator().manual_seed(seed)
        self.rankings = torch.tensor(list(permutations(range(size), shown)))  # (N, T)
        prefixes = {}
        rows = self.rankings.tolist()
        prefix = torch.tensor(
            [[prefixes.setdefault(tuple(row[:k]), len(prefixes)) for k in range(shown)] for row in rows]
        )
        self.table = (spread * torch.randn(len(prefixes), size, generator=generator)).double().requires_grad_()
        rest = [[i for i in range(size) if i not in row] for row in rows]
        self.order = torch.tensor([row + others for row, others in zip(rows, rest, strict=True)])  # (N, K)
        items = torch.arange(size).expand(len(rows), size).contiguous()
        self.arguments = (self.table[prefix], torch.eye(size).double(), items, self.rankings)
        self.logprobs = flexrec.ranking_logprobs(*self.arguments).logprobs
        self.probability = self.logprobs.detach().sum(1).exp()
        assert self.probability.sum().item() == pytest.approx(1.0)

    def gradient(self, of_rankings):
        """Of the mean over rankings, drawn from the policy, of values (N, T)."""
        (found,) = torch.autograd.grad(self.probability @ of_rankings.sum(1), self.table, retain_graph=True)
        return found


def gains_of(size, seed=0):
    gains = torch.rand(size, generator=torch.Generator().manual_seed(seed)).double() * 3
    gains[1] = 0.0
    return gains


def objective_beside_another_prompt(policy, gains, metric, foresight):
    """(N, T): of all rankings of a prompt, whose guess another prompt's rankings choose."""
    other = Policy(policy.order.shape[1], policy.rankings.shape[1], seed=1)
    (hidden, weight, items, rankings), theirs = policy.arguments, other.arguments
    both = (torch.cat([hidden, theirs[0]]), weight, items[:2], torch.cat([rankings, theirs[3]]))
    found = flexrec.all_actions_objective(*both, torch.cat([gains, gains.flip(0)]), metric, foresight=foresight)
    return found.objective[: len(rankings)]


@pytest.mark.parametrize("foresight", [0.0, 0.6, 1.0, "auto"])
@pytest.mark.parametrize("metric", LINEAR)
def test_its_expectation_is_the_true_gradient(metric, foresight):
    for size, shown in ((4, 4), (5, 3)):
        policy = Policy(size, shown)
        gains = gains_of(size)[policy.order]
        value = flexrec.ranking_metric(gains, metric, num_ranked=shown)
        true = policy.gradient(policy.logprobs * value[:, None])
        found = objective_beside_another_prompt(policy, gains, metric, foresight)
        torch.testing.assert_close(policy.gradient(found), true, rtol=1e-9, atol=1e-12)
        without = policy.gradient(flexrec.all_actions_objective(*policy.arguments, gains, metric).objective)
        assert (without - true).norm() > 0.02 * true.norm()


def test_a_guess_that_is_wrong_changes_the_noise_alone(monkeypatch):
    import flexrec.ops.all_actions as module

    policy = Policy(4, 4)
    gains = gains_of(4)[policy.order]
    true = policy.gradient(policy.logprobs * flexrec.ranking_metric(gains, "ndcg")[:, None])

    def nonsense(probs, gains, discount, length):
        """Of the state and the item alone."""
        guess = 3.0 * gains[:, None] * probs + probs.square().sum(-1, keepdim=True)
        return guess, -guess

    monkeypatch.setattr(module, "guesses_of_the_rest", nonsense)
    found = flexrec.all_actions_objective(*policy.arguments, gains, "ndcg", foresight=0.3)
    torch.testing.assert_close(policy.gradient(found.objective), true, rtol=1e-9, atol=1e-12)


def test_no_ranking_chooses_its_own_guess():
    """Other rankings of the same half, and the other half's own weights, do not change a ranking's objective."""
    generator = torch.Generator().manual_seed(0)

    def case(n):
        hidden = torch.randn(n, 3, 5, generator=generator)
        candidates = torch.stack([torch.randperm(9, generator=generator)[:4] for _ in range(n)])
        ranking = torch.stack([torch.randperm(4, generator=generator)[:3] for _ in range(n)])
        return hidden, candidates, ranking, torch.rand(n, 4, generator=generator)

    weight = torch.randn(9, 5, generator=generator)
    hidden, candidates, ranking, gains = case(6)

    def gradient(hidden, ranking, gains):
        hidden = hidden.clone().requires_grad_()
        found = flexrec.all_actions_objective(hidden, weight, candidates, ranking, gains, "ndcg", foresight="auto")
        return torch.autograd.grad(found.objective.sum(), hidden)[0]

    before = gradient(hidden, ranking, gains)
    other = ranking.clone()
    other[2] = ranking[2].flip(0)
    after = gradient(hidden, other, gains)
    torch.testing.assert_close(after[[0, 4]], before[[0, 4]], rtol=0, atol=0)  # of the same half
    assert (after[[1, 3, 5]] - before[[1, 3, 5]]).abs().max() > 0


def test_the_guess_by_a_race_is_close_to_plackett_luce():
    """The expectation over all orders of the others; far from it is the guess of any order."""
    size, shown = 5, 4
    generator = torch.Generator().manual_seed(3)
    probs = torch.softmax(2 * torch.randn(size, generator=generator).double(), 0)
    gains, discount = gains_of(size, 5)[None], torch.tensor([[1.0, 0.7, 0.5, 0.3, 0.0]]).double()
    steps = torch.zeros(1, shown, size).double()
    steps[0, 0] = probs
    any_order, race = guesses_of_the_rest(steps, gains, discount, torch.tensor([size]))
    for j in range(size):
        others, exact = [i for i in range(size) if i != j], 0.0
        for order in permutations(others):
            chance, left = 1.0, 1.0 - probs[j]
            for i in order:
                chance, left = chance * probs[i] / left, left - probs[i]
            exact += chance * (gains[0, list(order)] * discount[0, 1:]).sum()
        assert race[0, 0, j].item() == pytest.approx(exact.item(), rel=0.04)
    assert (any_order - race)[0, 0].abs().max() > 0.2


def test_equal_speeds_are_any_order():
    steps = torch.full((2, 3, 6), 1 / 6).double()
    gains, discount = torch.rand(2, 6).double(), torch.tensor([[1.0, 0.6, 0.5, 0.0, 0.0, 0.0]]).double().expand(2, 6)
    any_order, race = guesses_of_the_rest(steps, gains, discount, torch.tensor([6, 6]))
    torch.testing.assert_close(race[:, 0], any_order[:, 0], rtol=1e-6, atol=1e-9)
    assert not race[:, 2].any()
    assert not any_order[:, 2].any()


def test_what_was_not_foreseen_ends_in_nothing():
    steps = torch.full((1, 2, 3), 1 / 3).double()
    gains, discount = torch.tensor([[0.0, 1.0, 0.5]]).double(), torch.tensor([[1.0, 0.5, 0.0]]).double()
    rest, _ = guesses_of_the_rest(steps, gains, discount, torch.tensor([3]))
    found = unforeseen(steps, gains, discount, rest)
    # Behind the first item the other two have 0.75 on average, at a discount of 1/2; all three have 0.5.
    torch.testing.assert_close(found, torch.tensor([[0.25 - 0.375, 0.0]]).double())


@pytest.mark.parametrize("ragged", ["", "list", "ranking"])
def test_value_shapes_and_divergence(ragged, ranked_case):
    case = ranked_case(3, lists=3, group=2, steps=4, size=5, ragged=ragged, channels=0)
    gains = torch.rand(len(case.hidden), 5, generator=torch.Generator().manual_seed(0)).double()
    options = {**case.options, "foresight": 0.5}
    found = flexrec.all_actions_objective(*case.positional, gains, "ndcg", **options)
    reference = flexrec.ranking_logprobs(*case.positional, backend="torch", **case.options)
    torch.testing.assert_close(found.logprobs, reference.logprobs)
    torch.testing.assert_close(found.entropy, reference.entropy)
    assert found.objective.isfinite().all()
    lengths = case.options.get("lengths")
    if lengths is not None:
        per_ranking = lengths.repeat_interleave(len(gains) // len(lengths))
        beyond = torch.arange(4) >= per_ranking[:, None]
        assert beyond.any()
        assert not found.objective[beyond].any()
        padded = gains.where(torch.arange(5) < per_ranking[:, None], 7.0)
        again = flexrec.all_actions_objective(*case.positional, padded, "ndcg", **options)
        torch.testing.assert_close(again.objective, found.objective)
    with_kl = all_actions_objective_with_kl(
        *case.positional, gains, "ndcg", ref_hidden=case.hidden, ref_weight=case.weight, **options
    )
    torch.testing.assert_close(with_kl.objective, found.objective)


def test_certain_and_impossible_candidates_give_numbers():
    hidden = torch.tensor([[[400.0, 0.0, -400.0, 0.0]] * 4], requires_grad=True)
    bias = torch.tensor([0.0, 0.0, 0.0, -torch.inf])
    arguments = (hidden, torch.eye(4), torch.arange(4)[None], torch.tensor([[2, 0, 1, 3]]), torch.ones(1, 4))
    found = flexrec.all_actions_objective(*arguments, "ndcg", bias=bias, foresight=1.0)
    (gradient,) = torch.autograd.grad(found.objective.sum(), hidden)
    assert found.objective.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("metric", "options", "message"),
    [
        ("mrr", {"foresight": "auto"}, "linear in its items .*got mrr"),
        ("ndcg", {"foresight": "auto", "tilt": 0.1}, "without tilt: got tilt=0.1"),
        ("ndcg", {"foresight": 1.5}, r"foresight must lie in \[0, 1\], or be 'auto' or None, got 1.5"),
        ("ndcg", {"foresight": 0.5, "weight_grad": "rows"}, "weight_grad='rows' needs foresight=None"),
    ],
)
def test_what_it_cannot_do_is_said(metric, options, message):
    arguments = (torch.zeros(1, 2, 3), torch.zeros(5, 3), torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match=message):
        flexrec.all_actions_objective(*arguments, torch.ones(1, 2), metric, **options)
    with pytest.raises(TypeError, match="foresight must be a number, got str"):
        flexrec.all_actions_objective(*arguments, torch.ones(1, 2), "ndcg", foresight="always")
