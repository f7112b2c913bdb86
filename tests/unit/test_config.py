import tomllib

import numpy as np
import pytest

from agnmpi.core.optimizers import OPTIMIZERS
from agnmpi.core.rules import RULES
from agnmpi.training.config import Config, load


def test_layers_of_values(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('rule = "downpour"\nperiod = 7\nbatch = 64\n[options]\nhidden = 10\npath = "a"\n')
    config = load(str(file), {"period": 8, "rate": 0.5}, ["rate=0.25", "options.hidden=20", "seed=3"])
    assert (config.rule, config.period, config.batch, config.rate, config.seed) == ("downpour", 8, 64, 0.25, 3)
    assert config.options == {"hidden": 20, "path": "a"}


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
        ({"options": 3}, "options must be a table"),
        ({"variant": "gradient", "rule": "downpour"}, "is of rule agn"),
        ({"workers": 3}, "for --transport local"),
        ({"record": True, "drop_stalled": True, "stall_limit": 1.0}, "does not say when it dropped whom"),
        ({"run": "b", "resume": "a"}, "resume goes on in a: leave out run b"),
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
        ({"stall_limit": 1.0, "transport": "rma", "use_locking": False}, "hears of no single worker"),
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
