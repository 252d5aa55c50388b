"""A few damaged inputs for every target, and what damaged inputs have found; `python -m tests.fuzz` tries thousands."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.mutations import mutate
from tests.fuzz.targets import TARGETS, Target
from tests.fuzz.watch import watch


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return {}


@pytest.mark.parametrize("name", TARGETS)
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_input_is_read_or_refused_in_a_sentence(tmp_path_factory, made, name, data):
    if name not in made:
        made[name] = TARGETS[name](tmp_path_factory.mktemp(name))
    target = made[name]
    chosen = st.sampled_from(sorted(target.seeds))
    seed, other = data.draw(chosen), data.draw(chosen)
    content = mutate(target.seeds[seed], target.seeds[other], lambda limit: data.draw(st.integers(0, limit - 1)))
    outcome = watch(target, seed, content)
    assert outcome.kind != "crash", outcome


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"layout"}))  # whose inputs are changes
def test_what_is_changed_can_be_read_as_it_was(tmp_path, name):
    """Else every change would be refused for another reason."""
    target = TARGETS[name](tmp_path)
    for seed, content in target.seeds.items():
        refused = {"levels.png"}  # which no photograph has
        outcome = watch(target, seed, content)
        assert outcome.kind == ("refused" if seed in refused else "read"), (seed, outcome)
