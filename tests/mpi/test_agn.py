"""AGNOptimizer over real ranks: the golden numbers, and what a loop of one's own may do."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from conditions import until_near
from delayed_nesterov import delayed_nesterov
from golden import ONE_WORKER, TWO_WORKERS, close
from mpi4py import MPI

from agnmpi import AGNOptimizer, adam, sgd
from agnmpi.core import rules
from agnmpi.transport import registry

pytestmark = pytest.mark.mpi(min_size=2)


def first_ranks(comm, count):
    """A communicator of the first `count` ranks, None on the others, which stay out of it."""
    part = comm.Split(0 if comm.rank < count else MPI.UNDEFINED, comm.rank)
    return None if part == MPI.COMM_NULL else part


def flat(arrays):
    return np.concatenate([x.ravel() for x in arrays.values()])


def loss_of(gradient):
    return lambda p: (1.0, {name: np.full_like(x, gradient) for name, x in p.items()})


def logging(seen):
    """A weight that logs what the center is about to apply, and changes nothing."""

    def weight(commit):
        seen.append(commit)
        return 1.0

    return weight


def name(transport):
    return transport.name


TRANSPORTS = [entry for entry in registry.entries() if entry.capabilities.center_ranks]
WHOLE = [entry for entry in TRANSPORTS if entry.capabilities.single_commits]


@pytest.mark.parametrize("transport", TRANSPORTS, ids=name)
@pytest.mark.parametrize("case", ONE_WORKER)
def test_golden_one_worker(comm, case, transport):
    rule, optimizer, center_optimizer, gradients, start, period, local_after, center_after = ONE_WORKER[case]
    if center_optimizer and transport not in WHOLE:
        pytest.skip("a center optimizer needs whole commits")
    part = first_ranks(comm, 2)
    if part is None:
        return
    params = [np.array([v]) for v in start]
    with AGNOptimizer(
        optimizer, params, part, period, rule=rule, center_optimizer=center_optimizer, transport=transport
    ) as opt:
        for step in opt.steps():
            t = step + 1
            opt.minimize(loss_of(gradients[step]))
            if t in local_after:
                close(flat(opt.params), local_after[t])
            if rule.pulls == "after" and t in center_after:
                close(flat(opt.center), center_after[t])
            elif rule.pulls == "before" and t % period == 0:  # pulled before its commit
                close(flat(opt.center), center_after.get(t - period, start))
            if t == len(gradients):
                break
        opt.finish()
        close(flat(opt.center), center_after[len(gradients)])
    part.Free()


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize("centers", [1, 2])
@pytest.mark.parametrize("transport", TRANSPORTS, ids=name)
@pytest.mark.parametrize("case", TWO_WORKERS)
def test_golden_two_workers(comm, case, transport, centers):
    """TensorFlow's [2, 4] variable, on one center or split over two: the same in every element."""
    rule, optimizer, start, turns = TWO_WORKERS[case]
    if comm.size < centers + 2:
        pytest.skip("needs two workers")
    part = first_ranks(comm, centers + 2)
    if part is None:
        return
    params = [np.full((2, 4), v) for v in start]
    workers = part.Split(int(part.rank >= centers), part.rank)
    with AGNOptimizer(optimizer, params, part, 1, rule=rule, transport=replace(transport, centers=centers)) as opt:
        remaining, before = list(turns), start
        for _ in opt.steps():
            if len(remaining) == len(turns):
                workers.Barrier()  # both begin before either commits
            while remaining:
                turn, x, c = remaining.pop(0)
                mine = turn == workers.rank
                if mine:
                    opt.minimize(loss_of(-1))
                    close(flat(opt.params), np.repeat(x, 8))
                    close(flat(opt.center), np.repeat(before if rule.pulls == "before" else c, 8))
                before = c
                workers.Barrier()
                if mine:
                    break
            if not any(turn == workers.rank for turn, _, _ in remaining):
                # The other's turns are still watched, so that the barriers are equally many.
                for _ in remaining:
                    workers.Barrier()
                break
        opt.finish()
        close(flat(opt.center), np.repeat(turns[-1][2], 8))
    workers.Free()
    part.Free()


@pytest.mark.parametrize("transport", TRANSPORTS, ids=name)
@pytest.mark.parametrize("centers", [1, 2])
def test_every_step_is_taken_once_and_every_rank_has_the_center(comm, transport, centers):
    if comm.size <= centers:
        pytest.skip("needs a worker")
    with AGNOptimizer(
        sgd(1.0), {"w": np.zeros((2, 2)), "b": np.zeros(3)}, comm, 3, transport=replace(transport, centers=centers)
    ) as opt:
        taken = []
        for step in opt.steps(20):
            opt.minimize(loss_of(-1))
            taken.append(step)
        assert opt.is_center == (comm.rank < centers)
        assert not (opt.is_center and taken)
        everyone = comm.allgather(taken)
        assert sorted(s for steps in everyone for s in steps) == list(range(20))
        seen = comm.allgather({k: v.tolist() for k, v in opt.center.items()})
        assert seen == seen[:1] * comm.size
        # Each commit of k steps adds k/k = 1, less what was adopted in between; each element alike.
        value = opt.center["w"][0, 0]
        assert (opt.center["b"] == value).all()
        assert value == opt.global_step == comm.bcast(opt.global_step)
        assert opt.num_worker == comm.size - centers
        assert (opt.params["w"] == value).all()


def test_loops_follow_each_other_and_initialize_starts_from_rank_0(comm):
    opt = AGNOptimizer(sgd(0.1), {"w": np.full(4, 10.0 + comm.rank)}, comm, 2)
    if comm.rank:
        assert (opt.params["w"] == 10 + comm.rank).all()
    opt.initialize()
    assert (opt.params["w"] == 10).all()
    for epoch in range(1, 4):
        for _ in opt.steps(8):
            opt.minimize(lambda p: (0.0, {"w": p["w"]}))
        w = opt.center["w"][0]
        assert 0 < w < 10
        assert comm.allgather(w) == [w] * comm.size
        assert opt.global_step == comm.bcast(opt.global_step)
        assert opt.global_step >= 4 * epoch
    opt.close()
    opt.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(opt.steps(1))


def test_the_caller_may_move_the_parameters_itself(comm):
    """optimizer=None: the caller's own arrays are moved by the caller and brought up to date at exchanges."""
    w, b = np.full((2, 3), float(comm.rank)), np.zeros(1)
    with AGNOptimizer(None, {"w": w, "b": b}, comm, 5) as opt:
        assert opt.params["w"] is w
        for count, _ in enumerate(opt.steps(10 * opt.num_worker), 1):
            if count == 1:
                assert (w == opt.center["w"]).all(), "each worker starts from the center, whatever it was given"
            w += 1
            opt.step()
            if count % 5 == 0:
                assert w[0, 0] == opt.center["w"][0, 0], "just pulled"
        assert (w == opt.center["w"]).all()
        assert w[0, 0] == opt.global_step == comm.bcast(opt.global_step)
        with pytest.raises(RuntimeError, match="inside"):
            opt.step()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", ["agn", "downpour", "dynsgd", "aeasgd", "eamsgd", "synchronous", "diloco"])
def test_every_rule_trains(comm, name, overlap):
    # Elastic rules are stable for β = nα below 2, and with workers that all pull before any commits only then; 0.9 is
    # Zhang, Choromanska and LeCun's (arXiv:1412.6651).
    rule = rules.RULES[name](*([min(0.3, 0.9 / comm.size)] if name in ("aeasgd", "eamsgd") else []))
    target = np.linspace(-1, 1, 50)
    with AGNOptimizer(sgd(0.025), np.zeros(50), comm, 2, rule=rule, overlap=overlap) as opt:
        # DOWNPOUR sums the displacements of all: stable while rate · λ · staleness is below π/2. A worker of an elastic
        # rule that got no core for long still pulls the center towards where it was: how many rounds, nobody knows.
        for _ in until_near(opt, target, 0.02):
            for _ in opt.steps(200 * opt.num_worker):
                opt.minimize(lambda p: (0.0, p["0"] - target))


def test_threads_under_fault_tolerance_are_warned_of(comm, monkeypatch):
    monkeypatch.setenv("AGNMPI_FT", "1")
    monkeypatch.setattr("agnmpi.loops.warner.MPI.Query_thread", lambda: MPI.THREAD_MULTIPLE, raising=False)
    with (
        pytest.warns(RuntimeWarning, match="MPI4PY_RC_THREAD_LEVEL=funneled"),
        AGNOptimizer(sgd(0.1), np.zeros(3), comm) as opt,
    ):
        opt.initialize()


@pytest.mark.parametrize("transport", WHOLE, ids=name)
def test_centers_that_weigh(comm, transport):
    """All weights at once: each step is applied once, whatever was dropped, and the slots lie at the center."""
    n, seen = comm.size - 1, []
    weights = rules.outer_rate(1.0), rules.staleness_power(1.0), rules.staleness_cap(n - 1)
    rule = rules.weighted(rules.agn(), *weights, logging(seen))
    center_optimizer = delayed_nesterov(1.0, every=n, beta=0.3)
    target, total = np.arange(4.0), 200 * n
    with AGNOptimizer(
        sgd(0.1), np.zeros(4), comm, 4, rule=rule, center_optimizer=center_optimizer, dylu=True, transport=transport
    ) as opt:
        for _ in opt.steps(total):
            opt.minimize(lambda p: (0.0, {"0": p["0"] - target}))
        if opt.is_center:
            applied = [commit.steps for commit in seen if commit.staleness < n]
            assert (sum(applied), len(applied)) == (total, opt.clock)
            assert opt.get_slot_names() == ["momentum", "buffer"]
        assert np.abs(opt.center["0"] - target).max() < 0.5  # 3 at the start


def test_a_gradient_may_be_none(comm):
    """Its variable, and the slots that go with it, keep still."""
    with AGNOptimizer(adam(0.1), {"w": np.zeros(3), "still": np.ones(2)}, comm, 1) as opt:
        first = True
        for _ in opt.steps(3 * opt.num_worker):
            pairs = opt.compute_gradients(lambda p: (0.0, {"w": -np.ones(3), "still": None}))
            assert pairs[1][0] is None
            assert np.shares_memory(pairs[0][1], opt.params["w"])
            opt.apply_gradients(pairs)
            assert (opt.get_slot("still", "v") == 0).all()
            assert (opt.get_slot("w", "v") > 0).all()
            slot = opt.get_slot("w", "m")
            close(slot, -0.1 if first else 0.9 * -0.5 - 0.1)
            slot[...], first = -0.5, False  # a view: the next step goes on from it
        assert (opt.center["still"] == 1).all()
        assert (opt.center["w"] > 0).all()
        if not opt.is_center:
            assert opt.get_slot_names() == ["m", "v"]
            assert [v.shape for v in opt.variables()] == [(3,), (2,), (3,), (2,)]
        else:
            assert opt.get_slot_names() == []
            assert opt.variables() == []
        assert opt.get_name() == "AGNOptimizer"


def test_the_gradient_variant_has_its_slots_at_the_center(comm):
    with AGNOptimizer(adam(0.1), np.zeros(3), comm, 2, variant="gradient") as opt:
        for _ in opt.steps(4):
            opt.minimize(loss_of(-1))
        assert opt.get_slot_names() == ["m", "v"]
        if opt.is_center:
            assert (opt.get_slot("0", "v") > 0).all()


def test_break_commits_the_partial_period_and_ends_the_loop(comm):
    seen = []
    rule = rules.weighted(rules.agn(), logging(seen))
    with AGNOptimizer(sgd(1.0), np.zeros(2), comm, 10, rule=rule) as opt:
        count = 0
        for _ in opt.steps():
            opt.minimize(loss_of(-1))
            count += 1
            if count == 10 + opt.num_worker:
                break
        opt.finish()
        # What a worker gives back of its last lease, another may take: then that one commits more often.
        assert opt.global_step >= 2 * opt.num_worker
        taken = sum(comm.allgather(count))
        assert taken == (10 + opt.num_worker) * opt.num_worker
        if opt.is_center:
            assert sum(commit.steps for commit in seen) == taken


@pytest.mark.parametrize("n", [10, 1_000_000])  # 8 MB: more than what is in flight at once
@pytest.mark.parametrize("name", ["agn", "aeasgd", "synchronous"])
@pytest.mark.parametrize("overlap", [False, True])
def test_after_break_any_blocking_call_may_follow(comm, n, name, overlap):
    """The farewell is on its way; a barrier, or another optimizer's loop, does not wait for what only we could do."""
    if n > 10 and comm.size > 5:
        pytest.skip("8 MB vectors on 9 ranks of a small machine: covered with fewer ranks")
    if overlap and name == "synchronous":
        warnings.simplefilter("ignore")  # steps that are dropped at a break are reported, and here it is not the matter
    rule = rules.RULES[name](*([0.3] if name == "aeasgd" else []))
    with AGNOptimizer(None, np.zeros(n), comm, 3, rule=rule, overlap=overlap) as opt:
        for count, _ in enumerate(opt.steps()):
            opt.step()
            if count == 4:
                break
        comm.Barrier()
        with AGNOptimizer(sgd(1.0), np.zeros(3), comm, 1) as other:
            for _ in other.steps(5):
                other.minimize(loss_of(-1))
            assert (other.center["0"] == 5).all()
        assert opt.center["0"].shape == (n,)


def test_a_caught_exception_ends_the_loop_like_break(comm):
    with AGNOptimizer(sgd(1.0), np.zeros(2), comm, 3) as opt:
        try:
            for _ in opt.steps():
                opt.minimize(loss_of(-1))
                raise KeyError("mine")
        except KeyError:
            pass
        comm.Barrier()
        opt.finish()
        assert opt.clock == opt.global_step == opt.num_workers == opt.num_worker
        assert (opt.center["0"] == opt.num_worker).all()


def test_a_loop_that_is_held_by_a_name_ends_with_close(comm):
    opt = AGNOptimizer(sgd(1.0), np.zeros(2), comm, 1)
    loop = opt.steps()
    for count, _ in enumerate(loop):
        opt.minimize(loss_of(-1))
        if count == 4:
            break
    opt.close()
    assert (opt.center["0"] == 5 * opt.num_worker).all()
    assert list(loop) == []


def test_schedules_go_on_from_loop_to_loop(comm):
    seen = []

    def schedule(step):
        seen.append(step)
        return 0.1

    with AGNOptimizer(sgd(schedule), np.zeros(2), comm, 2) as opt:
        for _ in range(3):
            for _ in opt.steps(4):
                opt.minimize(loss_of(-1))
        for count, _ in enumerate(opt.steps()):
            opt.minimize(loss_of(-1))
            if count == 1:
                break
        so_far = len(seen)
        for _ in opt.steps(2):
            opt.minimize(loss_of(-1))

    def everyone(steps):
        return sorted(step for theirs in comm.allgather(steps) for step in theirs)

    open_loop = 2 * opt.num_worker
    assert everyone(seen)[:12] == list(range(12))
    assert everyone(seen[so_far:]) == [12 + open_loop, 13 + open_loop]


def test_the_center_that_was_read_does_not_change(comm):
    with AGNOptimizer(sgd(1.0), np.zeros(2), comm, 1) as opt:
        kept = []
        for _ in range(3):
            for _ in opt.steps(4):
                opt.minimize(loss_of(-1))
            kept.append(opt.center["0"])
    assert [x.tolist() for x in kept] == [[4, 4], [8, 8], [12, 12]]


def test_the_center_is_whole_while_an_exchange_is_under_way(comm):
    n = 500_000
    with AGNOptimizer(None, np.zeros(n), comm, 4, overlap=True) as opt:
        x = opt.params["0"]
        for _ in opt.steps(40 * opt.num_worker):
            x += 1
            opt.step()
            c = opt.center["0"]
            assert c.min() == c.max()


def test_ranks_must_ask_for_the_same_number_of_steps(comm):
    """The center says so for p2p (there the job ends); with a collective rule all ranks raise."""
    with AGNOptimizer(sgd(1.0), np.zeros(2), comm, 2, rule=rules.synchronous()) as opt:
        with pytest.raises(ValueError, match="different numbers of steps, from 10 to 12"):
            next(opt.steps(10 if comm.rank else 12))
        with pytest.raises(TypeError, match="integer"):
            next(opt.steps(2.5))


def test_with_a_collective_rule_nobody_believes_in_a_run_that_was_cut_short(comm):
    opt = AGNOptimizer(sgd(1.0), np.zeros(2), comm, 2, rule=rules.synchronous())
    if comm.rank == 1:
        for count, _ in enumerate(opt.steps(1000)):
            opt.minimize(loss_of(-1))
            if count == 4:
                break
    else:
        with pytest.raises(RuntimeError, match=r"another rank left the loop after \d+ of 1000 steps"):  # noqa: PT012
            for _ in opt.steps(1000):
                opt.minimize(loss_of(-1))
    opt.close()


def test_steps_that_nobody_took_are_reported(comm):
    opt = AGNOptimizer(sgd(1.0), np.zeros(2), comm, 2)
    if opt.is_center:
        with pytest.warns(RuntimeWarning, match=rf"{opt.num_worker} of 1000 steps were taken"):
            assert list(opt.steps(1000)) == []
    else:
        for _ in opt.steps(1000):
            opt.minimize(loss_of(-1))
            break
    opt.close()


def test_hook(comm):
    opt = AGNOptimizer(sgd(1.0), np.zeros(2), comm, 2)
    hook = opt.make_session_run_hook(task_index=comm.rank - 1, is_chief=comm.rank == 1, total=6)
    hook.begin()
    count = 0
    while not hook.should_stop():
        opt.minimize(loss_of(-1))
        hook.after_step()
        count += 1
    hook.end()
    assert sum(comm.allgather(count)) == 6
    assert opt.global_step >= 3
    if comm.rank:
        with pytest.raises(ValueError, match="is worker"):
            opt.make_session_run_hook(task_index=5 + 50 * comm.size)
    opt.close()


def test_a_communicator_of_some_ranks_leaves_the_others_alone(comm):
    """Every second rank trains; the rest computes something else, with collectives of its own."""
    part = comm.Split(comm.rank % 2, comm.rank)
    if comm.rank % 2 == 0 and part.size > 1:
        with AGNOptimizer(sgd(1.0), np.zeros(2), part, 1) as opt:
            for _ in opt.steps(20):
                opt.minimize(loss_of(-1))
            assert (opt.center["0"] == 20).all()
    else:
        for i in range(20):
            assert part.allreduce(i) == i * part.size
    part.Free()


def test_misuse_is_refused(comm):
    with AGNOptimizer(sgd(1.0), {"w": np.zeros((2, 3))}, comm, 2) as opt:
        with pytest.raises(RuntimeError, match="holds the center" if opt.is_center else "inside"):
            opt.minimize(loss_of(1))
        with pytest.raises(ValueError, match="negative"):
            next(opt.steps(-1))
        bad = [
            (ValueError, r"shape \(3, 2\), expected \(2, 3\)", {"w": np.zeros((3, 2))}),
            (ValueError, "None for every variable", {"w": None}),
            (ValueError, r"gradients for \['v'\]", {"v": np.zeros((2, 3))}),
            (ValueError, "2 gradients for 1 parameters", [np.zeros((2, 3))] * 2),
            (TypeError, "no array", {"w": "gradient"}),
        ]
        for _ in opt.steps(opt.num_worker):
            for kind, text, gradients in bad:
                with pytest.raises(kind, match=text):
                    opt.minimize(lambda p, gradients=gradients: (0.0, gradients))
            for returned in (0.0, ({"w": np.zeros((2, 3))}, 0.0), {"w": 0.0}):
                with pytest.raises(
                    TypeError, match=r"rank \d+: the loss must return \(value, gradients\), in this order"
                ):
                    opt.minimize(lambda p, returned=returned: returned)
            with pytest.raises(TypeError, match="no variable"):
                opt.apply_gradients([(np.zeros((2, 3)), np.zeros((2, 3)))])
            with pytest.raises(RuntimeError, match="has an optimizer"):
                opt.step()
            with pytest.raises(RuntimeError, match="one loop"):
                next(opt.steps(1))
            opt.minimize(loss_of(-1))
            with pytest.raises(RuntimeError, match="one step in each iteration"):
                opt.minimize(loss_of(-1))
        if not opt.is_center:
            with pytest.raises(RuntimeError, match="inside"):
                opt.minimize(loss_of(-1))


def test_what_differs_between_ranks_is_refused_with_the_ranks(comm):
    last = comm.rank == comm.size - 1
    cases = [
        ("shape", {"params": {"w": np.zeros(3 + last)}}),
        ("dtype", {"params": {"w": np.zeros(3, "f4" if last else "f8")}}),
        ("missing on", {"params": {"v" if last else "w": np.zeros(3)}}),
        ("communication_period", {"communication_period": 3 + last}),
        ("rule", {"rule": rules.downpour() if last else rules.agn()}),
        ("alpha 0.1", {"rule": rules.aeasgd(0.2 if last else 0.1)}),
        ("rate 0.1", {"optimizer": sgd(0.3 if last else 0.1)}),
        ("center_optimizer", {"center_optimizer": sgd(0.3) if last else None}),
        ("encodings", {"transport": registry.p2p(encoding="int8" if last else "int4")}),
    ]
    for text, options in cases:
        arguments = {"params": {"w": np.zeros(3)}, "communication_period": 3, "optimizer": sgd(0.1)} | options
        with pytest.raises(ValueError, match=f"(?s){text}.*rank.* {comm.size - 1}"):
            AGNOptimizer(comm=comm, **arguments)
    with pytest.raises(ValueError, match=f"at least 1.*rank {comm.size - 1}"):
        AGNOptimizer(sgd(0.1), np.zeros(2), comm, 0 if last else 5)
    for options, text in [
        ({"use_locking": False}, "use_locking"),
        ({"transport": "local"}, "one process"),
        ({"transport": "pigeon"}, "unknown transport"),
        ({"variant": "other"}, "variant"),
        ({"variant": "gradient", "rule": rules.agn()}, "either a rule or variant"),
        ({"rule": "downpour"}, r"rules.downpour\(\)"),
    ]:
        with pytest.raises(ValueError, match=text):
            AGNOptimizer(sgd(0.1), np.zeros(2), comm, **options)
    with pytest.raises(ValueError, match="needs a center and at least one worker"):
        AGNOptimizer(sgd(0.1), np.zeros(2), MPI.COMM_SELF)
    fixed = np.zeros(2)
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        AGNOptimizer(None, fixed, comm)
    with pytest.raises(TypeError, match="intracommunicator"):
        AGNOptimizer(sgd(0.1), np.zeros(2), None)
    with pytest.raises(ValueError, match="must come from agnmpi"):
        AGNOptimizer("sgd", np.zeros(2), comm)
