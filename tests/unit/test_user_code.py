"""Errors in a problem show its own frames, whatever their type; what it returns wrongly says what to return."""

import functools
import json
import re

import numpy as np
import pytest

from agnmpi.cli.arguments import ArgumentsRefused, parse
from agnmpi.core.batches import Plan
from agnmpi.core.params import Layout
from agnmpi.training.problem import evaluate, gradient_of, prepare
from agnmpi.training.user_code import UserCodeError, remarks, where

PLAN = Plan(8, 4, steps=2)


class Returns:
    """A problem whose `gradient` and `evaluate` return what they are given."""

    samples = 8

    def __init__(self, gradient=None, evaluate=None):
        self.returned = gradient, evaluate

    def init(self, rng):
        return {"w": np.zeros(2), "b": np.zeros(1)}

    def gradient(self, params, indices):
        return self.returned[0]

    def evaluate(self, params):
        return self.returned[1]


GOOD = {"w": np.array([1.0, 2.0]), "b": np.array([3.0])}
LAYOUT = Layout.of(GOOD)


def step(returned):
    return gradient_of(Returns(returned), LAYOUT, PLAN, LAYOUT.pack(GOOD))(0)


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (GOOD, r"must return \(loss, gradients\), not a dict with w, b"),
        ((GOOD, 0.5), "in this order: it returned the gradients first"),
        (None, r"\(loss, gradients\), not None: a `return` is missing"),
        (0.5, r"\(loss, gradients\), not 0.5"),
        ((0.5, None), "an array for each of w, b, by name, not None"),
        ((0.5, [np.zeros(2)]), "an array for each of w, b, by name, not a list of 1"),
        ((0.5, {"w": np.zeros(2)}), "missing b; the parameters are named w, b"),
        ((0.5, {"w": np.zeros(2), "bias": np.zeros(1)}), "missing b, unknown bias"),
        ((0.5, GOOD | {"b": np.zeros(4)}), r"'b' has shape \(4,\), expected \(1,\)"),
        ((np.zeros(4), GOOD), r"the loss is one number, the mean over the batch, not an array of shape \(4,\)"),
        (("low", GOOD), "the loss is one number.*not 'low'"),
    ],
)
def test_a_wrong_return_of_gradient_says_what_to_return(returned, text):
    with pytest.raises(UserCodeError, match=text) as raised:
        step(returned)
    assert "Returns.gradient" in str(raised.value)
    assert __file__ in str(raised.value)


@pytest.mark.parametrize("returned", [(np.array([0.5]), GOOD), [np.array(0.5), list(GOOD.values())], (0.5, GOOD)])
def test_what_is_meant_well_is_taken(returned):
    loss, g = step(returned)
    assert loss == 0.5
    np.testing.assert_array_equal(g, [1, 2, 3])


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (0.98, "numbers by name, such as {'accuracy': 0.98}, not 0.98"),
        (None, "not None: a `return` is missing"),
        (np.zeros(3), r"not an array of shape \(3,\)"),
        ({"accuracy": np.zeros(3)}, r"'accuracy' is an array of shape \(3,\)"),
        ({"accuracy": None}, "'accuracy' is None"),
    ],
)
def test_a_wrong_return_of_evaluate_says_what_to_return(returned, text):
    with pytest.raises(UserCodeError, match=text) as raised:
        evaluate(Returns(evaluate=returned), {})
    assert "Returns.evaluate" in str(raised.value)


def test_metrics_may_be_arrays_of_one_number():
    assert evaluate(Returns(evaluate={"a": np.ones(1), "b": np.float32(2)}), {}) == {"a": 1.0, "b": 2.0}


FILE = """
{top}
class P:
    samples = 8
    def __init__(self, xp, width=3):
        {made}
    def init(self, rng):
        {init}
    def gradient(self, params, indices): ...
    def evaluate(self, params): ...
"""


@pytest.mark.parametrize("error", ["TypeError", "ValueError", "OSError", "ImportError", "KeyError", "AssertionError"])
@pytest.mark.parametrize("at", ["top", "made", "init"])
def test_an_error_in_a_problem_shows_its_own_frames(tmp_path, at, error):
    file = tmp_path / "mine.py"
    code = {"top": "", "made": "pass", "init": "pass"} | {at: f"raise {error}('went wrong')"}
    file.write_text(FILE.format(**code))
    with pytest.raises(UserCodeError) as raised:
        prepare(f"{file}:P", {}, 0, "cpu", 0)
    text = str(raised.value)
    line = 1 + FILE.split("{" + at + "}")[0].count("\n")
    assert f'File "{file}", line {line}, in ' in text
    assert error in text
    assert "went wrong" in text
    assert "agnmpi/" not in text.replace(str(tmp_path), ""), "no frames of ours"


@pytest.mark.parametrize(
    ("code", "options", "text"),
    [
        ({"top": "from .model import Net"}, {}, "give the module's name, such as package.module:Problem"),
        ({"top": "class:"}, {}, "SyntaxError"),
        ({}, {"colour": 3}, r"called as P\(xp, width=3\)(.|\n)*colour"),
        ({"init": "self"}, {}, "must return arrays by name, not None"),
        ({"init": "return {'w': 'text'}"}, {}, "parameter 'w'"),
    ],
)
def test_hints(tmp_path, code, options, text):
    file = tmp_path / "mine.py"
    file.write_text(FILE.format(**{"top": "", "made": "pass", "init": "pass"} | code))
    with pytest.raises((TypeError, ValueError), match=text):
        prepare(f"{file}:P", options, 0, "cpu", 0)


@pytest.mark.parametrize(
    ("argument", "meant"), [("--perod", "--period"), ("--batchsize=3", "--batch-size"), ("--xyz", "")]
)
def test_a_misspelt_option_is_told_what_it_is_like(argument, meant):
    with pytest.raises(ArgumentsRefused) as raised:
        parse(["train", "module:Problem", argument])
    assert (f"did you mean {meant}?" in str(raised.value)) == bool(meant)


class Gradients:
    """Ways to read the parameters, or not to."""

    def __init__(self):
        self.params = GOOD

    def by_name(self, params, indices):
        return params["w"].sum(), params

    def of_another(self, params, indices):
        return self.params if indices else params

    def captured(self, params, indices):
        return [params[name] for name in GOOD], (lambda: params["w"])()

    def only_captured(self, params, indices):
        return (lambda: params["w"])()

    def unpacked(self, params, indices):
        return dict(**params)

    def looks_around(self, params, indices):
        return locals()["params"]

    def takes_all(self, *both):
        return both[0]

    @functools.lru_cache  # noqa: B019
    def decorated(self, params, indices):
        return 0.0

    def its_own(self, params, indices):
        return self.params["w"].sum(), self.params

    def overwritten(self, params, indices):
        params = self.params
        return params["w"].sum(), params

    def constant(self, params, indices):
        return 0.0, {"w": np.zeros(2)}


@pytest.mark.parametrize(
    "name",
    ["by_name", "of_another", "captured", "only_captured", "unpacked", "looks_around", "takes_all", "decorated"],
)
def test_a_gradient_that_reads_the_parameters_or_may(name):
    assert remarks(getattr(Gradients(), name)) == []


@pytest.mark.parametrize("name", ["its_own", "constant"])
def test_a_gradient_that_never_reads_the_parameters_is_remarked(name):
    (line,) = remarks(getattr(Gradients(), name))
    assert re.match(rf"WARNING: Gradients.{name} \(.*test_user_code.py, line \d+\) never reads 'params'", line)


def test_a_function_may_be_one_too():
    assert remarks(lambda params, indices: params) == []
    assert remarks(lambda params, indices: indices)
    assert remarks(functools.partial(int)) == []


def test_a_function_that_is_wrapped_is_where_it_is_written():
    wrapped = functools.wraps(Returns.gradient)(json.dumps)
    assert where(wrapped) == where(Returns.gradient)
