"""How often simulated studies claim what is false."""

from collections.abc import Iterable

from scipy.stats import binomtest


def assert_rare(studies: Iterable[set[str]], kinds: tuple[str, ...]) -> None:
    """Each kind of claim is in at most 5 % of the studies, as far as so many can tell.

    studies: the claims that each made, of which these kinds are false. Fails only where the exact
    95 % interval lies above.
    """
    made = list(studies)
    for kind in kinds:
        count = sum(kind in claims for claims in made)
        low = binomtest(count, len(made)).proportion_ci(0.95, "exact").low
        assert low <= 0.05, (kind, count / len(made))
