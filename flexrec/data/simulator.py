"""A seeded world of users, short videos, topics and trends whose true interests are known.

Everything is drawn from independent random streams (the items, the training users, the test users), so that training
lists do not change with the number of test users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

import numpy as np

from flexrec.checks import check_choice
from flexrec.data.build import moment_after, moments
from flexrec.data.lists import Catalogue, Interactions, RankingDataset, RankingList

# For each topic, how a title may start and how it may end: titles are e.g. "Night market noodles 3".
_TOPIC_WORDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "street food": (("Night market", "Roadside", "Harbour stall", "Five minute"), ("noodles", "dumplings", "skewers")),
    "football": (("Last minute", "Derby day", "Penalty box", "Sunday league"), ("goals", "saves", "tackles")),
    "gardening": (("Balcony", "Greenhouse", "Rooftop", "Backyard"), ("tomatoes", "roses", "herbs")),
    "astronomy": (("Deep sky", "Lunar", "Backyard telescope", "Red planet"), ("comets", "eclipses", "galaxies")),
    "woodwork": (("Hand tool", "Oak", "Workshop", "Reclaimed timber"), ("chairs", "joints", "carvings")),
    "cats": (("Sleepy", "Rescue", "Grumpy", "Midnight"), ("kittens", "tabbies", "whiskers")),
    "jazz": (("Late night", "Smoky club", "New Orleans", "Big band"), ("trumpets", "solos", "standards")),
    "chess": (("Blitz", "Grandmaster", "Endgame", "Park bench"), ("gambits", "checkmates", "blunders")),
    "hiking": (("Alpine", "Coastal", "Misty ridge", "Weekend"), ("trails", "summits", "huts")),
    "makeup": (("Glitter", "Ten minute", "Vintage", "Bridal"), ("eyeliner", "looks", "lipsticks")),
    "coding": (("Lazy", "Open source", "Terminal", "Weekend hack"), ("scripts", "bugs", "compilers")),
    "history": (("Roman", "Medieval", "Lost empire", "Bronze age"), ("legions", "castles", "manuscripts")),
    "cycling": (("Gravel", "Mountain pass", "City", "Velodrome"), ("sprints", "climbs", "commutes")),
    "dance": (("Tango", "Breakdance", "Ballroom", "Rooftop party"), ("steps", "battles", "routines")),
    "painting": (("Watercolour", "Oil", "Street mural", "Speed"), ("portraits", "landscapes", "sketches")),
    "diving": (("Coral reef", "Wreck", "Ice", "Night reef"), ("dives", "sharks", "turtles")),
    "magic": (("Close up", "Card table", "Stage", "Coffee shop"), ("tricks", "illusions", "vanishes")),
    "baking": (("Sourdough", "Grandma's", "Layered", "Cinnamon"), ("loaves", "cakes", "buns")),
    "cars": (("Barn find", "Rally", "Electric", "Classic"), ("engines", "restorations", "races")),
    "travel": (("Hidden island", "Sleeper train", "Old town", "Budget"), ("getaways", "itineraries", "sunsets")),
}

_STYLE_DIMENSIONS = 6
_PAGE = 12  # items offered at a time, of which the user watches one
_WATCH_PRECISION = 8.0  # a + b of the Beta distribution of a watch ratio: its standard deviation is at most 1/6
_TREND_WINDOW = 10.0  # days
_KNOWN_TASTE = 0.5  # how much of a user's taste the platform that collected the feedback had learnt
MISSING_FEEDBACK = ("random", "exposure")
_FIRST_LIST = 0.3  # share of the period before the first list: by then users have a history


def simulate(
    *,
    num_users: int = 1500,
    num_items: int = 800,
    num_topics: int = 16,
    num_candidates: int = 30,
    history_length: int = 20,
    lists_per_user: int = 3,
    watches_per_user: int = 60,
    days: int = 100,
    observed_share: float = 0.1,
    missing: str = "random",
    num_test_users: int = 200,
    test_lists_per_user: int = 3,
    max_train_lists: int | None = None,
    seed: int = 0,
) -> RankingDataset:
    """Simulate a video platform and return lists of training users and of other users to test on.

    *Interest.* Item i has one or two topics, a style vector q_i and a quality; user u has a taste for each topic (a
    few favourites, mild dislike of most others) and a style p_u. The true interest, kept in ``RankingList.truth``, is
    sigmoid(2.5 (taste of u for i's topics + <p_u, q_i> / 2 + quality of i / 2 - 1.1)). The *watch ratio* of a view is
    Beta distributed with that mean, and is the logged interest. A share ``observed_share`` of it is kept, the rest
    is thinned away: NaN in lists, absent from the log (``unobserved="critic"``).

    *Missing.* "random": each value is kept with the same probability. "exposure": not at random. The platform that
    collected the feedback showed popular items at the top, and those that it took the user to like: what it showed
    together (a list, or the page that a watched item was on) stood in order of log popularity that day plus half of
    the logit of the true interest. Feedback on rank r is kept with probability min(1, c / r), as users look (the
    position-based model of clicks, arXiv 1608.04468), c being such that the share comes out. Unpopular items, and what
    a user dislikes, then have little feedback, so that what there is says too much good of them.

    *Time.* Two of three items have their day, on which they are up to e^4 times as popular as before; they rise
    steeply and decay slowly. Users watch ``watches_per_user`` items over ``days`` days: of a page of items drawn by
    their popularity that day they take the one they like most, with some randomness. The history is what they watched
    last, whether the feedback was thinned away or not.

    *Lists.* A third of the candidates is drawn by the user's taste, a third by the popularity of the day, the rest
    uniformly; all are new to the user, and shuffled. The user rates the list at its time: that feedback, thinned,
    enters the log at that very time and is therefore unknown to the list's own popularity and trend. Popularity,
    ``trend`` is measured in the (thinned) log; see ``flexrec.data.build.moments``.

    Args:
        num_users: training users.
        num_items: items; their titles are unique.
        num_topics: 2 to 20.
        num_candidates: K.
        history_length: the most items that a history shows.
        lists_per_user, test_lists_per_user: lists of each training and each test user.
        watches_per_user: views of each user; repeated ones count once.
        days: the period; times of lists and log are in days. Lists lie in its last 70 %.
        observed_share: share of feedback that is kept, in (0, 1].
        missing: which feedback that is, "random" or "exposure".
        num_test_users: users to test on, drawn like the others and absent from ``log`` and ``train``.
        max_train_lists: if there are more training lists, a random choice of this many is kept.
        seed: of everything.

    Raises:
        ValueError: an argument out of range, naming it.

    Example:
        >>> from flexrec.data import simulate
        >>> data = simulate(num_users=4, num_items=80, num_topics=4, num_test_users=1, num_candidates=6)
        >>> data.catalogue.titles[0]
        'Deep sky comets'
    """
    _check_arguments(locals())
    world_rng, train_rng, test_rng = (
        np.random.default_rng(sequence) for sequence in np.random.SeedSequence(seed).spawn(3)
    )
    world = _make_world(num_items, num_topics, days, world_rng)
    simulate_users = partial(
        _simulate_users,
        world,
        watches_per_user=watches_per_user,
        num_candidates=num_candidates,
        observed_share=observed_share,
        missing=missing,
    )
    train = simulate_users(num_users, train_rng, lists_per_user=lists_per_user, max_lists=max_train_lists)
    test = simulate_users(num_test_users, test_rng, lists_per_user=test_lists_per_user, max_lists=None)
    log = train.log
    last = moment_after(log, num_items, trend_window=_TREND_WINDOW)
    return RankingDataset(
        name="simulated",
        catalogue=world.catalogue,
        log=log,
        train=_to_lists(train, log, num_items, history_length, first_user=0),
        test=_to_lists(test, log, num_items, history_length, first_user=num_users),
        unobserved="critic",
        trend=last.trend,
        rises=last.rises(np.arange(num_items)),
        noise=float(np.mean(train.truth * (1 - train.truth))) / (_WATCH_PRECISION + 1),  # of the Beta distribution
    )


def _check_arguments(arguments: dict) -> None:
    for name, value in arguments.items():
        if name in ("observed_share", "missing", "seed", "max_train_lists"):
            continue
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 2 <= arguments["num_topics"] <= len(_TOPIC_WORDS):
        raise ValueError(f"num_topics must lie in [2, {len(_TOPIC_WORDS)}], got {arguments['num_topics']}")
    if not 0.0 < arguments["observed_share"] <= 1.0:
        raise ValueError(f"observed_share must lie in (0, 1], got {arguments['observed_share']}")
    check_choice("missing", arguments["missing"], MISSING_FEEDBACK)
    if arguments["seed"] < 0:
        raise ValueError(f"seed must not be negative, got {arguments['seed']}")
    if arguments["max_train_lists"] is not None and arguments["max_train_lists"] < 1:
        raise ValueError(f"max_train_lists must be at least 1 or None, got {arguments['max_train_lists']}")
    needed = arguments["num_candidates"] + arguments["watches_per_user"]
    if arguments["num_items"] < needed:
        raise ValueError(
            f"num_items must be at least num_candidates + watches_per_user = {needed}, so that every list can be "
            f"filled with items new to its user; got {arguments['num_items']}"
        )


@dataclass(frozen=True)
class _World:
    catalogue: Catalogue
    topics: np.ndarray  # (I, T) rows sum to 1
    style: np.ndarray  # (I, D)
    quality: np.ndarray  # (I,)
    log_popularity: np.ndarray  # (days, I)


def _make_world(num_items: int, num_topics: int, days: int, rng: np.random.Generator) -> _World:
    names = list(_TOPIC_WORDS)[:num_topics]
    first = rng.integers(num_topics, size=num_items)
    second = (first + rng.integers(1, num_topics, size=num_items)) % num_topics
    second = np.where(rng.random(num_items) < 0.5, second, first)
    catalogue = Catalogue(
        ids=tuple(f"v{i:05d}" for i in range(num_items)),
        titles=_make_titles([(names[a], names[b]) for a, b in zip(first, second, strict=True)], rng),
        topics=tuple((names[a],) if a == b else (names[a], names[b]) for a, b in zip(first, second, strict=True)),
    )
    topics = np.zeros((num_items, num_topics))
    np.add.at(topics, (np.arange(num_items), first), 0.5)
    np.add.at(topics, (np.arange(num_items), second), 0.5)
    quality = rng.normal(size=num_items)
    style = rng.normal(size=(num_items, _STYLE_DIMENSIONS)) / np.sqrt(_STYLE_DIMENSIONS)
    # Two of three items have their day: interest in them rises over about 4 days and decays over about 12.
    height = rng.uniform(2.0, 4.0, size=num_items) * (rng.random(num_items) < 2 / 3)
    since_peak = np.arange(days)[:, None] - rng.uniform(0.0, days, size=num_items)
    bump = np.exp(-0.5 * (since_peak / np.where(since_peak < 0, 4.0, 12.0)) ** 2)
    log_popularity = 0.7 * rng.normal(size=num_items) + 0.2 * quality + height * bump
    return _World(catalogue, topics, style, quality, log_popularity)


def _make_titles(topic_pairs: Sequence[tuple[str, str]], rng: np.random.Generator) -> tuple[str, ...]:
    """Unique titles: a beginning of the first topic, an ending of the second, and a number where that is taken."""
    titles: dict[str, None] = {}
    for first, second in topic_pairs:
        beginnings, endings = _TOPIC_WORDS[first][0], _TOPIC_WORDS[second][1]
        base = f"{beginnings[rng.integers(len(beginnings))]} {endings[rng.integers(len(endings))]}"
        numbered = (base if number == 1 else f"{base} {number}" for number in count(1))
        titles[next(title for title in numbered if title not in titles)] = None
    return tuple(titles)


@dataclass(frozen=True)
class _Users:
    """What a group of U users watched and rated, and the L lists they were given; users count from 0."""

    watched: list[np.ndarray]  # U arrays of distinct items in order of time
    watch_times: list[np.ndarray]
    watch_interest: list[np.ndarray]  # NaN where thinned away
    list_users: np.ndarray  # (L,)
    list_times: np.ndarray  # (L,)
    candidates: np.ndarray  # (L, K)
    interest: np.ndarray  # (L, K), NaN where thinned away
    truth: np.ndarray  # (L, K)
    log: Interactions  # what is left of the feedback


def _simulate_users(
    world: _World,
    num_users: int,
    rng: np.random.Generator,
    *,
    watches_per_user: int,
    lists_per_user: int,
    max_lists: int | None,
    num_candidates: int,
    observed_share: float,
    missing: str,
) -> _Users:
    days, num_items = world.log_popularity.shape
    taste = _true_taste(world, num_users, rng)  # (U, I) logits
    truth = 1.0 / (1.0 + np.exp(-taste))

    times = np.sort(rng.uniform(0.0, days, size=(num_users, watches_per_user)), axis=1)
    items, pages = _watch(world, taste, times, rng)  # (U, W), (U, W, _PAGE)
    # Of repeated views the first counts; flattened, a user's views stand in order of time.
    pairs = np.arange(num_users)[:, None] * num_items + items
    first_views = np.sort(np.unique(pairs, return_index=True)[1])
    viewers = first_views // watches_per_user
    ends = np.cumsum(np.bincount(viewers, minlength=num_users))[:-1]
    watched = np.split(items.ravel()[first_views], ends)
    watch_times = np.split(times.ravel()[first_views], ends)

    list_users = np.repeat(np.arange(num_users), lists_per_user)
    list_times = rng.uniform(_FIRST_LIST * days, days, size=(num_users, lists_per_user))
    list_times = np.sort(list_times, axis=1).ravel()
    if max_lists is not None and len(list_users) > max_lists:
        kept = np.sort(rng.choice(len(list_users), size=max_lists, replace=False))
        list_users, list_times = list_users[kept], list_times[kept]
    known = np.zeros((len(list_users), num_items), dtype=bool)
    for row, (user, time) in enumerate(zip(list_users, list_times, strict=True)):
        known[row, watched[user][: np.searchsorted(watch_times[user], time)]] = True
    candidates = _draw_candidates(world, taste[list_users], list_times, known, num_candidates, rng)
    list_truth = truth[list_users[:, None], candidates]

    watch_interest = _watch_ratio(truth[viewers, items.ravel()[first_views]], rng)
    if missing == "random":
        looked_at = list_looked_at = np.float64(observed_share)
    else:
        watched_at = _ranks_shown(world, taste, np.arange(num_users), times, pages)  # (U, W, _PAGE)
        of_watched = np.take_along_axis(watched_at, (pages == items[..., None]).argmax(-1)[..., None], axis=-1)
        looked_at = _attention(of_watched.ravel()[first_views], observed_share)
        list_looked_at = _attention(
            _ranks_shown(world, taste, list_users, list_times[:, None], candidates[:, None])[:, 0], observed_share
        )
    watch_kept = rng.random(len(first_views)) < looked_at
    list_interest = _watch_ratio(list_truth, rng)
    list_kept = rng.random(candidates.shape) < list_looked_at

    def joined(of_watches: np.ndarray, of_lists: np.ndarray) -> np.ndarray:
        of_lists = np.broadcast_to(of_lists, candidates.shape)
        return np.concatenate([of_watches[watch_kept], of_lists[list_kept]])

    users = joined(viewers, list_users[:, None])
    log_items = joined(items.ravel()[first_views], candidates)
    log_interest = joined(watch_interest, list_interest).astype(np.float32)
    log_times = joined(times.ravel()[first_views], list_times[:, None])
    order = np.lexsort((log_items, users, log_times))
    return _Users(
        watched=watched,
        watch_times=watch_times,
        watch_interest=np.split(np.where(watch_kept, watch_interest, np.nan).astype(np.float32), ends),
        list_users=list_users,
        list_times=list_times,
        candidates=candidates,
        interest=np.where(list_kept, list_interest, np.nan).astype(np.float32),
        truth=list_truth.astype(np.float32),
        log=Interactions(users[order], log_items[order], log_interest[order], log_times[order]),
    )


def _true_taste(world: _World, num_users: int, rng: np.random.Generator) -> np.ndarray:
    """(U, I) logits of the true interest."""
    num_topics = world.topics.shape[1]
    for_topics = rng.normal(-0.35, 0.35, size=(num_users, num_topics))
    # 2 to 4 favourites: the topics whose random rank lies below the user's number of favourites.
    rank = rng.random((num_users, num_topics)).argsort(axis=1).argsort(axis=1)
    favourite = rank < rng.integers(2, 5, size=(num_users, 1))
    for_topics += favourite * rng.uniform(1.2, 2.0, size=(num_users, num_topics))
    style = rng.normal(size=(num_users, _STYLE_DIMENSIONS))
    liking = for_topics @ world.topics.T + 0.5 * style @ world.style.T + 0.5 * world.quality
    return 2.5 * (liking - 1.1)


def _watch(
    world: _World, taste: np.ndarray, times: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(U, W) items watched, each the favourite, by taste and chance, of a page drawn by the popularity of the day, and
    (U, W, _PAGE) the pages."""
    popularity = np.exp(world.log_popularity)
    cumulative = np.cumsum(popularity, axis=1) / popularity.sum(axis=1, keepdims=True)
    days, num_items = cumulative.shape
    day = times.astype(np.int64)
    # All days' cumulative distributions laid end to end, day d in (d, d + 1], invert in one search.
    line = (np.arange(days)[:, None] + cumulative).ravel()
    drawn = np.searchsorted(line, day[..., None] + rng.random((*times.shape, _PAGE)))
    page = np.minimum(drawn - day[..., None] * num_items, num_items - 1)
    attraction = taste[np.arange(len(taste))[:, None, None], page] + 1.5 * rng.gumbel(size=page.shape)
    return np.take_along_axis(page, attraction.argmax(axis=-1)[..., None], axis=-1)[..., 0], page


def _ranks_shown(
    world: _World, taste: np.ndarray, users: np.ndarray, times: np.ndarray, shown: np.ndarray
) -> np.ndarray:
    """The rank, from 1 on, at which each item of ``shown`` (N, M, S) stood when it was shown to ``users`` (N,) at
    ``times`` (N, M), among the S."""
    score = world.log_popularity[times.astype(np.int64)[..., None], shown]
    score = score + _KNOWN_TASTE * taste[users[:, None, None], shown]
    return 1 + np.argsort(np.argsort(-score, axis=-1, kind="stable"), axis=-1, kind="stable")


def _attention(ranks: np.ndarray, share: float) -> np.ndarray:
    """min(1, c / rank), with the mean ``share``: the probability that feedback is given."""
    low, high = 0.0, float(ranks.max())  # at which everything is looked at
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if np.minimum(1.0, middle / ranks).mean() > share else (middle, high)
    return np.minimum(1.0, high / ranks)


def _draw_candidates(
    world: _World,
    taste: np.ndarray,
    times: np.ndarray,
    known: np.ndarray,
    num_candidates: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """(L, K) distinct items unknown to the user, in random order: by taste, by popularity, and at random.

    Adding Gumbel noise to log weights and taking the largest is sampling without replacement.
    """
    third = num_candidates // 3
    available = np.where(known, -np.inf, 0.0)  # (L, I)
    chosen = []
    for log_weight, size in (
        (0.7 * taste, third),
        (world.log_popularity[times.astype(np.int64)], third),
        (np.zeros_like(taste), num_candidates - 2 * third),
    ):
        if size == 0:
            continue
        key = log_weight + rng.gumbel(size=taste.shape) + available
        items = np.argpartition(-key, size - 1, axis=1)[:, :size]
        np.put_along_axis(available, items, -np.inf, axis=1)
        chosen.append(items)
    return rng.permuted(np.concatenate(chosen, axis=1), axis=1)


def _watch_ratio(truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    mean = np.clip(truth, 0.01, 0.99)
    return rng.beta(_WATCH_PRECISION * mean, _WATCH_PRECISION * (1.0 - mean))


def _to_lists(
    users: _Users, log: Interactions, num_items: int, history_length: int, *, first_user: int
) -> list[RankingList]:
    lists: list[RankingList | None] = [None] * len(users.list_times)
    for i, moment in moments(log, num_items, users.list_times, trend_window=_TREND_WINDOW):
        user, time = users.list_users[i], float(users.list_times[i])
        seen = np.searchsorted(users.watch_times[user], time)
        shown = slice(max(0, seen - history_length), seen)
        lists[i] = RankingList(
            user=first_user + int(user),
            time=time,
            history=users.watched[user][shown],
            history_interest=users.watch_interest[user][shown],
            candidates=users.candidates[i],
            interest=users.interest[i],
            popularity=moment.popularity[users.candidates[i]].astype(np.float32),
            trend=moment.trend[users.candidates[i]],
            rises=moment.rises(users.candidates[i]),
            truth=users.truth[i],
        )
    return [one for one in lists if one is not None]
