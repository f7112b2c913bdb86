import tomllib
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest

from agnmpi.core.optimizers import OPTIMIZERS
from agnmpi.core.rules import RULES
from agnmpi.training.config import Config, load, load_run
from agnmpi.training.problem import plan_of


def test_layers_of_values(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('rule = "downpour"\nperiod = 7\nbatch = 64\n[options]\nhidden = 10\npath = "a"\n')
    config = load(str(file), {"period": 8, "rate": 0.5}, ["rate=0.25", "options.hidden=20", "seed=3"])
    assert (config.rule, config.period, config.batch, config.rate, config.seed) == ("downpour", 8, 64, 0.25, 3)
    assert config.options == {"hidden": 20, "path": "a"}


def test_a_run_of_0_4_goes_on_as_published(tmp_path):
    (tmp_path / "config.toml").write_text('problem = "line.py:Line"\nperiod = 7\n')
    assert load_run(tmp_path).outer_rate == "published"
    assert load_run(tmp_path, {"outer_rate": 1.0}).outer_rate == 1
    assert load(str(tmp_path / "config.toml")).complete().outer_rate == 1
    (tmp_path / "config.toml").write_text('problem = "line.py:Line"\nrule = "downpour"\n')
    assert load_run(tmp_path).complete().outer_rate is None


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("optimizer", [None, *OPTIMIZERS])
def test_a_complete_configuration_survives_its_file(tmp_path, rule, optimizer):
    config = Config(problem="m:P", rule=rule, optimizer=optimizer, rate=0.01, clip=1.0).complete()
    assert config.complete() == config
    file = tmp_path / "run.toml"
    file.write_text(config.to_toml())
    assert load(str(file)) == config
    assert tomllib.loads(file.read_text())["optimizer"] == config.optimizer


def test_defaults_that_the_rules_are_known_with():
    found = {rule: Config(rule=rule, rate=0.01).complete() for rule in RULES}
    assert {rule: c.optimizer for rule, c in found.items()} == {
        "agn": "adam", "downpour": "sgd", "dynsgd": "sgd", "aeasgd": "sgd", "eamsgd": "nesterov",
        "synchronous": "adam", "diloco": "adamw",
    }  # fmt: skip
    diloco = found["diloco"]
    assert (diloco.center_optimizer, diloco.center_rate, diloco.center_options) == ("nesterov", 0.7, {"beta": 0.9})
    assert {c.transport for rule, c in found.items() if rule not in ("synchronous", "diloco")} == {"p2p"}
    assert diloco.transport == found["synchronous"].transport == "allreduce"
    gradient = Config(variant="gradient", optimizer="momentum", rate=0.2, optimizer_options={"beta": 0.5}).complete()
    assert (gradient.center_optimizer, gradient.center_rate) == ("momentum", 0.2)
    assert gradient.center_options == {"beta": 0.5}
    assert Config().complete().rate == 0.001
    assert Config(optimizer="sgd").complete().rate == 0.01


def test_schedule_of_the_optimizer():
    config = Config(rate=1.0, optimizer="sgd", schedule="cosine", warmup=2).complete()
    x, optimizer = np.zeros(1), config.make_optimizer(steps=10)
    moved = []
    for step in (0, 2, 5, 10):
        x[:] = 0
        optimizer.update(-np.ones(1), optimizer.init(x), x, step=step)
        moved.append(x[0])
    assert moved == pytest.approx([0.5, 0.9045085, 0.5, 0.0])


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"period": 0}, "period must be at least 1, not 0"),
        ({"period": 2.5}, "period must be of type int, not 2.5"),
        ({"period": True}, "period must be of type int"),
        ({"rate": -1.0}, "rate must be positive, not -1.0"),
        ({"rate": float("nan")}, "rate must be a finite number"),
        ({"rule": "x"}, "rule must be one of agn, downpour"),
        ({"optimizer": "x"}, "optimizer must be one of sgd"),
        ({"epochs": 0.0}, "epochs must be positive"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"schedule": "step"}, "decay_every > 0"),
        ({"schedule": "cosine", "decay_every": 5}, "are of schedule 'step', not of 'cosine'"),
        ({"decay_factor": 0.5}, "are of schedule 'step', not of 'constant'"),
        ({"rho": 3.0}, "rho is of rules aeasgd and eamsgd, not of agn"),
        ({"options": 3}, "options must be a table"),
        ({"variant": "gradient", "rule": "downpour"}, "is of rule agn"),
        ({"record": True, "drop_stalled": True, "stall_limit": 1.0}, "does not say when it dropped whom"),
        ({"run_dir": "b", "resume": "a"}, "resume goes on in a: leave out run_dir b"),
        ({"staleness_cap": -1}, "staleness_cap must be at least 0, not -1"),
        ({"staleness_cap": 3, "centers": 2}, "staleness_cap with centers = 2"),
        ({"record": True, "overlap": True}, "record with overlap cannot be replayed"),
        ({"record": True, "resume": "x"}, r"leave out record \(--no-record\), or resume 'x'"),
        ({"drop_stalled": True}, "give that, too"),
        ({"resume": "auto"}, "name it with run_dir"),
        ({"checkpoint_workers": "some"}, "one of auto, all, end, none"),
    ],
)
def test_what_is_refused_at_once(values, text):
    with pytest.raises(ValueError, match=text):
        Config(**values)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"variant": "gradient", "center_optimizer": "add"}, "needs a center optimizer"),
        ({"center_rate": 0.1}, "need a center_optimizer"),
        ({"rule": "aeasgd", "rate": 1.0}, "α = ηρ"),
        ({"optimizer_options": {"gamma": 1}}, "gamma"),
        ({"optimizer_options": {"beta1": 2.0}}, "beta1 must lie"),
        ({"optimizer": "sgd", "weight_decay": -1.0}, "weight_decay"),
        ({"record": True, "transport": "rma"}, "record is of transport p2p"),
        ({"stall_limit": 1.0, "transport": "accumulate"}, "hears of no single worker"),
        ({"workers": 3}, "workers = 3 is for --transport local"),
        (
            {"drop_stalled": True, "stall_limit": 1.0, "transport": "rma"},
            "needs transport p2p and one center, not 'rma'",
        ),
        ({"record": True, "centers": 2}, "record is of one center.* each has an order of its own"),
        ({"record": True, "rule": "synchronous"}, "record is of runs with a center"),
    ],
)
def test_what_is_refused_when_completed(values, text):
    with pytest.raises(ValueError, match=text):
        Config(**values).complete()


def test_bad_files_and_sets(tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text("period = = 3")
    with pytest.raises(ValueError, match="is no TOML"):
        load(str(bad))
    with pytest.raises(ValueError, match="give KEY=VALUE"):
        load(None, {}, ["period"])
    with pytest.raises(ValueError, match="is no table"):
        load(None, {"period": 3}, ["period.x=3"])
    with pytest.raises(ValueError, match="unknown option 'wokers'; did you mean 'workers'"):
        load(None, {}, ["wokers=3"])
    with pytest.raises(OSError, match="nowhere"):
        load("nowhere.toml")


def test_epochs_that_are_given_override_steps_in_the_file(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text("epochs = 3.0\nsteps = 20\n")
    assert load(str(file)).steps == 20
    assert load(str(file), {"epochs": 5.0}).steps is None
    assert load(str(file), sets=["epochs=5"]).steps is None
    assert load(str(file), {"steps": 7}).steps == 7
    assert load(str(file), {"epochs": 5.0, "steps": 7}).steps == 7


@pytest.mark.parametrize(
    ("old", "value", "name", "expected"),
    [
        ("keep", 5, "keep_checkpoints", 5),
        ("slots", 2, "message_buffers", 2),
        ("run", "there", "run_dir", "there"),
        ("learning_rate", 0.5, "rate", 0.5),
        ("lr", 0.5, "rate", 0.5),
        ("batch_size", 8, "batch", 8),
        ("communication_period", 8, "period", 8),
        ("transport", "collective", "transport", "allreduce"),
        ("transport", "serverless", "transport", "accumulate"),
    ],
)
def test_other_names_are_accepted_everywhere(tmp_path, old, value, name, expected):
    text = f'"{value}"' if isinstance(value, str) else str(value)
    file = tmp_path / "old.toml"
    file.write_text(f"{old} = {text}\n")
    assert getattr(load(str(file)), name) == expected
    assert getattr(load(None, {old: value}), name) == expected
    assert getattr(load(None, {}, [f"{old}={value}"]), name) == expected
    assert getattr(load(str(file), {name: getattr(Config(), name)}), name) == getattr(Config(), name), "newer on top"
    assert tomllib.loads(load(str(file)).to_toml())[name] == expected


def test_one_option_under_two_names_is_refused(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("keep = 5\nkeep_checkpoints = 4\n")
    with pytest.raises(ValueError, match="keep and keep_checkpoints are one option"):
        load(str(file))


def test_without_locking_rma_is_accumulate(tmp_path):
    """TensorFlow's word, as earlier configurations have it."""
    file = tmp_path / "old.toml"
    file.write_text('transport = "rma"\nuse_locking = false\n')
    assert load(str(file)).transport == "accumulate"
    assert load(str(file), {"transport": "local"}).transport == "local", "as simulate gives it"
    assert load(None, {"transport": "rma", "use_locking": False}).transport == "accumulate"
    assert load(None, {"transport": "rma"}, ["use_locking=false"]).transport == "accumulate"
    file.write_text('transport = "rma"\nuse_locking = true\n')
    assert load(str(file)).transport == "rma"
    with pytest.raises(ValueError, match="needs transport 'rma', and means 'accumulate'; it is 'p2p'"):
        load(None, {"transport": "p2p", "use_locking": False})
    with pytest.raises(ValueError, match=r"needs transport 'rma'.*'auto'"):
        load(None, {"use_locking": False})
    with pytest.raises(ValueError, match="for whole commits use transport 'rma'"):
        load(None, {"transport": "accumulate", "use_locking": True})
    with pytest.raises(ValueError, match="use_locking must be of type bool"):
        load(None, {"use_locking": "perhaps"})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 1.0),
        ({"transport": "rma", "centers": 2}, 1.0),
        ({"outer_rate": 2.0}, 2.0),
        ({"outer_rate": "published"}, "published"),
        ({"transport": "accumulate"}, "published"),
        ({"variant": "gradient"}, "published"),
        ({"center_optimizer": "momentum"}, "published"),
        ({"center_optimizer": "optimistic"}, 1.0),
        ({"rule": "downpour"}, None),
    ],
)
def test_the_outer_rate_is_1_where_the_center_adds_single_displacements(options, expected):
    complete = Config(**options).complete()
    assert complete.outer_rate == expected
    assert complete.make_rule().weighs == isinstance(expected, float)
    assert complete.complete() == complete


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({}, [0.001, 0.003, 0.008, 0.008]),
        ({"optimizer": "adamw", "outer_rate": 1.0, "warmup": 0}, [0.001, 0.003, 0.008, 0.008]),
        ({"rate": 0.001}, [0.001] * 4),
        ({"optimizer": "sgd"}, [0.01] * 4),
        ({"outer_rate": "published"}, [0.001] * 4),
        ({"outer_rate": 0.5}, [0.001] * 4),
        ({"outer_rate": 1.0, "center_optimizer": "momentum"}, [0.001] * 4),
        ({"center_optimizer": "optimistic"}, [0.001, 0.003, 0.008, 0.008]),
        ({"transport": "accumulate"}, [0.001] * 4),
        ({"rule": "downpour", "optimizer": "adam"}, [0.001] * 4),
    ],
)
def test_the_default_rate_grows_with_the_workers_that_are_averaged(options, rates):
    config = Config(**options)
    complete = [config.complete(workers) for workers in (1, 3, 8, 64)]
    assert [c.rate for c in complete] == pytest.approx(rates)
    rises = rates[1] > rates[0] and config.warmup is None
    assert [c.warmup for c in complete] == ([0, 96, 256, 2048] if rises else [0] * 4)
    assert config.complete() == config.complete(1)
    assert all(c.complete(5) == c for c in complete), "it is the run's, whatever ranks there are when it is resumed"
    local = Config(**options | {"transport": "local", "workers": 3})
    assert local.complete() == local.complete(3)


def test_the_optimistic_center_moves_as_far_as_commits_say_and_looks_back_a_round():
    config = Config(center_optimizer="optimistic")
    for workers, span in ((1, 2), (2, 2), (5, 5)):
        complete = config.complete(workers)
        assert (complete.center_rate, complete.center_options) == (1.0, {"span": span})
        assert complete.complete(9) == complete, "it is the run's, whatever ranks there are when it is resumed"
    own = Config(center_optimizer="optimistic", center_rate=0.5, center_options={"span": 3.5, "strength": 0.5})
    assert (own.complete(5).center_rate, own.complete(5).center_options) == (0.5, {"span": 3.5, "strength": 0.5})
    assert own.complete(5).make_center_optimizer(1).numbers.endswith("span 3.5, strength 0.5")
    gradients = Config(center_optimizer="optimistic", variant="gradient", rate=0.2).complete(5)
    assert gradients.center_rate == 0.2, "there a commit is a gradient"
    with pytest.raises(ValueError, match="span must be above 1"):
        Config(center_optimizer="optimistic", center_options={"span": 1}).complete()


def test_a_problem_may_name_its_epochs():
    """They count where neither epochs nor steps are given."""
    learns = SimpleNamespace(samples=100, epochs=3)
    assert plan_of(learns, Config(batch=10)).steps == 30
    assert plan_of(learns, Config(batch=10, epochs=2.0)).steps == 20
    assert plan_of(learns, Config(batch=10, steps=7)).steps == 7
    assert plan_of(SimpleNamespace(samples=100), Config(batch=10)).steps == 10
    for epochs in (0, -1.0, "many", True, None):
        with pytest.raises(ValueError, match="'m:P': its epochs must be a positive number"):
            plan_of(SimpleNamespace(samples=100, epochs=epochs), Config(problem="m:P"))


def test_the_documentation_names_each_option():
    for f in fields(Config):
        assert f"\n    {f.name}: {f.metadata['help']}" in Config.__doc__
    assert "One of auto, all, end, none. Default: 'auto'." in Config.__doc__
