"Sweeps over what hypothesis draws, in two lengths."
import pytest
from hypothesis import HealthCheck, given, settings


def swept(
    few,    # examples, of every run
    many,   # and where the slow tests run too
    *shapes # strategies of hypothesis, one an argument
):          # decorator of a test
    "A sweep in two lengths: a short one for every day"
    def of(f):
        @pytest.mark.parametrize('examples', [few, pytest.param(many, marks=pytest.mark.slow)])
        def test(examples):
            settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))(given(*shapes)(f))()
        test.__name__,test.__doc__,test.__module__ = f.__name__,f.__doc__,f.__module__
        return test
    return of
