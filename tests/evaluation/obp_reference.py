"""What Open Bandit Pipeline (obp) says of its own synthetic slate bandit: `python obp_reference.py` records it anew.

obp 0.5.7 asks for Python below 3.11 and runs on 3.11, too: `pip install --no-deps --ignore-requires-python obp==0.5.7`
with scikit-learn, pandas, seaborn and matplotlib. Beside this file lies obp_reference.json, which tests read where obp
is not installed.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".json")
ROUNDS, RANKS, ITEMS = 40, 3, 5


def problem(seed: int = 12345) -> dict[str, np.ndarray]:
    """Logged slates without repetition, and what another Plackett-Luce policy and a guess say of them."""
    from obp.dataset import SyntheticSlateBanditDataset, linear_behavior_policy_logit, logistic_reward_function

    dataset = SyntheticSlateBanditDataset(
        n_unique_action=ITEMS,
        len_list=RANKS,
        dim_context=2,
        reward_type="binary",
        reward_structure="cascade_additive",
        click_model=None,
        behavior_policy_function=linear_behavior_policy_logit,
        base_reward_function=logistic_reward_function,
        is_factorizable=False,
        random_state=seed,
    )
    logs = dataset.obtain_batch_bandit_feedback(n_rounds=ROUNDS, return_pscore_item_position=False)
    rng = np.random.default_rng(seed)
    logit = rng.normal(size=(ROUNDS, ITEMS))
    pscore, _, cascade = dataset.obtain_pscore_given_evaluation_policy_logit(
        action=logs["action"], evaluation_policy_logit_=logit, return_pscore_item_position=False
    )
    by_rank = {"action": logs["action"], "reward": logs["reward"], "ours": cascade, "theirs": logs["pscore_cascade"]}
    found = {name: np.asarray(values).reshape(ROUNDS, RANKS) for name, values in by_rank.items()}
    np.testing.assert_allclose(pscore.reshape(ROUNDS, RANKS)[:, 0], found["ours"][:, -1])
    dist = np.zeros((ROUNDS, RANKS, ITEMS))  # of the other policy, given what was shown before
    for n in range(ROUNDS):
        left = np.ones(ITEMS, dtype=bool)
        for t in range(RANKS):
            dist[n, t, left] = np.exp(logit[n, left]) / np.exp(logit[n, left]).sum()
            left[found["action"][n, t]] = False
    return {**found, "dist": dist, "guess": rng.random((ROUNDS, RANKS, ITEMS))}


def by_obp(given: dict[str, np.ndarray]) -> dict[str, float]:
    """obp's estimates of the other policy's value."""
    import obp.ope as ope

    slates = np.repeat(np.arange(ROUNDS), RANKS)
    positions = np.tile(np.arange(RANKS), ROUNDS)
    ours, theirs = given["ours"], given["theirs"]
    common = {"slate_id": slates, "reward": given["reward"].ravel(), "position": positions}
    of_slate = {
        "pscore": np.repeat(theirs[:, -1], RANKS),
        "evaluation_policy_pscore": np.repeat(ours[:, -1], RANKS),
    }
    of_rank = {"pscore_cascade": theirs.ravel(), "evaluation_policy_pscore_cascade": ours.ravel()}
    robust = {
        "action": given["action"].ravel().astype(int),
        "q_hat": given["guess"].ravel(),
        "evaluation_policy_action_dist": given["dist"].ravel(),
    }
    doubly_robust = ope.SlateCascadeDoublyRobust(len_list=RANKS, n_unique_action=ITEMS)
    estimates = {
        "ips, ranking": ope.SlateStandardIPS(len_list=RANKS).estimate_policy_value(**common, **of_slate),
        "snips, ranking": ope.SelfNormalizedSlateStandardIPS(len_list=RANKS).estimate_policy_value(
            **common, **of_slate
        ),
        "ips, cascade": ope.SlateRewardInteractionIPS(len_list=RANKS).estimate_policy_value(**common, **of_rank),
        "snips, cascade": ope.SelfNormalizedSlateRewardInteractionIPS(len_list=RANKS).estimate_policy_value(
            **common, **of_rank
        ),
        "dr, cascade": doubly_robust.estimate_policy_value(**common, **of_rank, **robust),
    }
    return {name: float(value) for name, value in estimates.items()}


if __name__ == "__main__":
    made = problem()
    rounded = {name: values if values.dtype.kind == "i" else values.astype(np.float32) for name, values in made.items()}
    exact = {
        name: values.astype(np.float64) if values.dtype.kind == "f" else values for name, values in rounded.items()
    }
    content = {"obp": by_obp(exact), "problem": {name: values.tolist() for name, values in rounded.items()}}
    FILE.write_text(json.dumps(content) + "\n", encoding="utf-8")
    print(content["obp"])
