"""A center on each host, beside its workers: which ranks these are, and what goes with it."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnmpi import sgd, transports
from agnmpi.cli.arguments import ArgumentsRefused, parse
from agnmpi.cluster.placement import one_center_per_host
from agnmpi.cluster.setup import Setup, check_setup
from agnmpi.core import rules
from agnmpi.core.membership import Membership
from agnmpi.simulation import simulate
from agnmpi.simulation.timing import Timing
from agnmpi.training.config import Config, load
from agnmpi.transport import registry
from agnmpi.transport.agreement import ConfigError

placements = st.lists(st.integers(0, 5), min_size=1, max_size=30)


@given(placements)
def test_each_host_has_one_center_in_whatever_order_its_ranks_come(hosts):
    centers = one_center_per_host(hosts)
    counts = Counter(hosts)
    assert centers[0] == 0
    assert centers == sorted(set(centers))
    assert len({hosts[rank] for rank in centers}) == len(centers)
    assert all(hosts.index(hosts[rank]) == rank for rank in centers), "the lowest of its host"
    assert {hosts[rank] for rank in centers} == {h for h in counts if counts[h] > 1 or h == hosts[0]}
    # Where any rank can train, on each host one does; but on that of rank 0, which serves also where it is alone.
    trains = {host for rank, host in enumerate(hosts) if rank not in centers}
    assert trains == set(hosts) - ({hosts[0]} if counts[hosts[0]] == 1 else set())


@given(placements, st.permutations(range(6)))
def test_names_of_hosts_do_not_matter(hosts, names):
    assert one_center_per_host([names[host] for host in hosts]) == one_center_per_host(hosts)


@pytest.mark.parametrize(
    ("hosts", "centers"),
    [
        ("aaaa", [0]),
        ("aabbcc", [0, 2, 4]),
        ("abcabc", [0, 1, 2]),
        ("bbaacc", [0, 2, 4]),
        ("abbcac", [0, 1, 3]),
        ("abbb", [0, 1]),
        ("aabc", [0]),
        ("abc", [0]),
        ("a", [0]),
    ],
)
def test_some_placements(hosts, centers):
    assert one_center_per_host(hosts) == centers


def test_a_worker_is_named_by_its_rank_wherever_the_centers_are():
    members = Membership(6, (0, 2, 4))
    assert members.workers() == [1, 3, 5]
    assert (members.count, members.rank_of(1), members.alive) == (3, 3, [0, 1, 2, 3, 4, 5])


def test_the_option_of_a_transport():
    sums = transports.accumulate(centers="hosts")
    for transport in (transports.p2p(centers="hosts"), transports.rma(centers="hosts"), sums):
        assert (transport.wanted_centers, transport.centers, transport.center_per_host) == ("hosts", 1, True)
    assert registry.resolve(transports.rma(centers="hosts"), use_locking=False) == sums
    assert transports.p2p(centers=2).wanted_centers == 2
    with pytest.raises(ValueError, match="centers must be a number of at least 1, or 'hosts', not 'host'"):
        transports.p2p(centers="host")


def test_the_option_of_a_run(tmp_path):
    config = Config("m:P", rate=0.1, centers="hosts").complete()
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert load(str(tmp_path / "config.toml")) == config
    assert load(None, {"problem": "m:P"}, ["centers=hosts"]).centers == "hosts"
    assert config.make_transport() == transports.p2p(centers="hosts")
    assert [parse(["train", "m:P", "--centers", text]).centers for text in ("hosts", "3")] == ["hosts", 3]
    with pytest.raises(ArgumentsRefused, match="argument --centers: invalid int or hosts value: 'each'"):
        parse(["train", "m:P", "--centers", "each"])


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"centers": "each"}, "centers must be of type int, or 'hosts', not 'each'"),
        ({"centers": "hosts", "staleness_cap": 3}, "staleness_cap with centers = hosts: each has a clock of its own"),
        ({"centers": "hosts", "record": True}, "record is of one center that serves"),
        ({"centers": "hosts", "drop_stalled": True, "stall_limit": 9.0}, "needs transport p2p and one center.* hosts"),
    ],
)
def test_what_does_not_go_with_it(values, text):
    with pytest.raises(ValueError, match=text):
        Config("m:P", rate=0.1, **values).complete()


def test_a_rule_without_centers_refuses_it():
    config = Config("m:P", rate=0.1, rule="synchronous", centers="hosts").complete()
    with pytest.raises(ConfigError, match=r"centers = 'hosts' needs transport p2p.*'allreduce' has no .*give 1"):
        check_setup(config.make_rule(), Setup(config.make_transport()), 4, sgd(0.1), None)
    with pytest.raises(ConfigError, match="needs a center and at least one worker, but the world has 1 rank"):
        check_setup(rules.agn(), Setup(transports.p2p(centers="hosts")), 1, sgd(0.1), None)


@pytest.mark.parametrize("simulated", [simulate.network, simulate.run])
def test_a_simulation_has_no_hosts(tmp_path, simulated):
    config = Config("", rate=0.1, centers="hosts", run_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="a simulation has no hosts: give their number"):
        simulated(config, Timing())
    assert not (tmp_path / "run").exists()
