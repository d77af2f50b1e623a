"""The assignment: against every choice there is, on small problems."""

import itertools
import math
import random

import pytest

from qkernels.mixed.assign import Problem

QUANTITIES = ("latency", "size", "accuracy")


def problem_of(seed, layers=5, options=3, spread=0.0):
    """Costs over several orders of magnitude, as damages have them."""
    draw = random.Random(seed)
    costs = {
        q: [
            [round(10 ** draw.uniform(-spread, spread) * draw.random(), 9) for _ in range(options)]
            for _ in range(layers)
        ]
        for q in QUANTITIES
    }
    return Problem(costs, {"latency": 0.7, "size": 2.0})


def brute_force(problem, objective, limits):
    """Least cost of all choices, in plain loops."""
    sizes = [range(len(options)) for options in problem.costs[objective]]
    found = math.inf
    for choice in itertools.product(*sizes):
        totals = {
            q: problem.rest.get(q, 0) + sum(c[i] for c, i in zip(costs, choice, strict=True))
            for q, costs in problem.costs.items()
        }
        if all(totals[q] <= limit for q, limit in limits.items()):
            found = min(found, totals[objective])
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_is_the_best_of_all_choices(seed, spread):
    problem = problem_of(seed, spread=spread)
    draw = random.Random(seed + 100)
    for objective in QUANTITIES:
        others = [q for q in QUANTITIES if q != objective]
        middle = [draw.randrange(3) for _ in range(5)]
        limits = {q: problem.total(q, middle) * draw.uniform(0.9, 1.3) for q in others}
        expected = brute_force(problem, objective, limits)
        choice = problem.solve(objective, limits)
        if expected == math.inf:
            assert choice is None
            continue
        assert problem.total(objective, choice) == pytest.approx(expected, rel=1e-5)
        for q, limit in limits.items():
            assert problem.total(q, choice) <= limit * (1 + 1e-5)


def test_a_limit_that_only_the_cheapest_choice_meets_exactly():
    problem = Problem({"size": [[8, 2, 4], [9, 3, 5]], "accuracy": [[0, 7, 1], [0, 7, 1]]}, {})
    assert problem.solve("accuracy", {"size": 5}) == [1, 1]
    assert problem.solve("accuracy", {"size": 4.99}) is None
    assert problem.solve("accuracy", {"size": 17}) == [0, 0]


def test_nothing_is_left_of_a_limit():
    problem = Problem({"size": [[1, 0]], "accuracy": [[0, 1]]}, {"size": 5})
    assert problem.solve("accuracy", {"size": 5}) == [1]
    assert problem.solve("accuracy", {"size": 4}) is None


def test_tiny_damages_beside_huge_ones_count():
    """An option that destroys the model must not hide a difference of a millionth."""
    damages = [[0.0, 1e-6, 1e3], [0.0, 3e-6, 1e3], [0.0, 2e-6, 1e3]]
    problem = Problem({"accuracy": damages, "size": [[4, 2, 1]] * 3}, {})
    assert problem.solve("size", {"accuracy": 3.5e-6}) == [1, 0, 1]
    assert problem.solve("accuracy", {"size": 8}) == [1, 0, 1]


def test_options_of_infinite_damage_are_never_taken():
    problem = Problem({"accuracy": [[0.0, math.inf]], "size": [[4, 1]]}, {})
    assert problem.solve("size", {}) == [0]
    assert problem.solve("size", {"accuracy": 1.0}) == [0]
    assert problem.nearest({"size": 1}) == [0]


def test_equal_choices_are_told_apart_by_the_tie_break():
    problem = Problem({"size": [[2, 1, 1], [2, 1, 1]], "accuracy": [[0, 3, 2], [0, 1, 2]]}, {})
    assert problem.solve("size", {}, tie_break="accuracy") == [2, 1]


@pytest.mark.parametrize("seed", range(4))
def test_nearest_has_the_least_worst_excess(seed):
    problem = problem_of(seed)
    cheapest = {q: sum(map(min, problem.costs[q])) + problem.rest.get(q, 0) for q in QUANTITIES}
    limits = {q: 0.8 * cost for q, cost in cheapest.items()}

    def excess(choice):
        return max(problem.total(q, choice) / limit for q, limit in limits.items())

    best = min(map(excess, itertools.product(range(3), repeat=5)))
    assert excess(problem.nearest(limits)) == pytest.approx(best, rel=1e-5)


def test_nothing_on_the_front_is_beaten():
    problem = problem_of(3)
    front = problem.front("latency", "accuracy", 12)
    points = [(problem.total("latency", c), problem.total("accuracy", c)) for c in front]
    assert len(points) > 4
    assert points == sorted(points)
    assert [d for _, d in points] == sorted((d for _, d in points), reverse=True)
    for latency, damage in points:
        assert damage == pytest.approx(
            brute_force(problem, "accuracy", {"latency": latency * (1 + 1e-9)}), rel=1e-5
        )
    assert points[0][0] == pytest.approx(brute_force(problem, "latency", {}))
    assert points[-1][1] == pytest.approx(brute_force(problem, "accuracy", {}))


def test_without_scipy_the_error_says_what_brings_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"pip install qkernels\[search\]"):
        problem_of(0).solve("size", {})
