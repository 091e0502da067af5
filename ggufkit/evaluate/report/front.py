"""The Pareto front: what no other choice beats in both respects."""

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Mark the points that no other beats.

    Args:
        points: two figures each, less being better in both.

    Returns:
        For each point, whether no other is at least as good in both figures and
        better in one.
    """
    return [
        not any(
            other != point and other[0] <= point[0] and other[1] <= point[1] for other in points
        )
        for point in points
    ]
