"""Which encoding pays on which link."""

import pytest

from agnmpi.arrays.encodings import NAMES
from agnmpi.bench.encodings import advice, pays_below, seconds, seconds_per_number


@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("cost", [1e-10, 3e-8])
def test_where_an_encoding_begins_to_pay_both_take_the_same(name, cost):
    link = pays_below(name, cost)
    assert seconds(name, cost, link) == pytest.approx(seconds("float32", 0.0, link))
    assert seconds(name, cost, 0.9 * link) < seconds("float32", 0.0, 0.9 * link)
    assert seconds(name, cost, 1.1 * link) > seconds("float32", 0.0, 1.1 * link)


def test_the_fastest_is_named_for_each_link():
    costs = {"float32": 0.0, "bf16": 1e-9, "int8": 4e-9, "int4": 8e-9}
    first, *rest = advice(costs, [0.1, 3.0, 12.0, 100.0])
    assert "bf16 below 32 Gbit/s, int8 below 11.9 Gbit/s, int4 below 6.94 Gbit/s" in first
    assert [line.rsplit(": ", 1)[1] for line in rest] == ["int4", "int8", "bf16", "float32"]
    assert rest[0].startswith("  at 0.1 Gbit/s 1 M numbers take float32 671 ms, bf16 337 ms")


def test_what_is_measured_is_the_time_of_a_number():
    costs = {name: seconds_per_number(name, numbers=5000, rounds=2) for name in NAMES}
    assert costs.pop("float32") == 0
    assert all(0 < cost < 1e-3 for cost in costs.values())
