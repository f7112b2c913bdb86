"""One cut over several centers, whatever order messages, deltas and farewells come in."""

import random
import re
from collections import defaultdict, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agnmpi.core.messages import Commit
from agnmpi.recovery.cut import ConsistentCut


class FakeMail:
    """Letters that lie in the post until they are brought, in order from one center to another."""

    def __init__(self, post, rank, size):
        self.post, self.rank, self.size, self.box = post, rank, size, deque()

    def send(self, rank, words):
        self.post[self.rank, rank].append(words)

    def receive(self):
        return self.box.popleft() if self.box else None


class FakeCenter:
    """A center's end and counts: deltas arrive, are begun unless held, and applied."""

    def __init__(self, cluster, rank, size):
        self.workers, self.processed, self.hold = cluster.workers, {}, None
        self.cluster, self.arrived, self.receiving, self.block = cluster, deque(), deque(), []
        self.saved, self.disk_busy = {}, False
        self.mail = FakeMail(cluster.post, rank, size)
        self.cut = ConsistentCut(
            self.mail,
            self,
            self,
            self.save,
            lambda: self.disk_busy,
            cluster.said.append,
            30.0,
            lambda: cluster.time,
            "rank 3 on host {}".format,
        )

    @property
    def in_flight_deltas(self):
        return len(self.receiving)

    def save(self, number):
        assert number not in self.saved
        self.saved[number], self.disk_busy = sorted(self.block), True

    def receive(self):
        for commit in list(self.arrived):
            if not (self.hold and self.hold(commit)):
                self.arrived.remove(commit)
                self.receiving.append(commit)
                return

    def apply(self):
        if self.receiving:
            commit = self.receiving.popleft()
            self.processed[commit.worker] = commit.sequence
            if commit.sequence % 5:  # else refused
                self.block.append((commit.worker, commit.sequence))
            self.cluster.unanswered[commit.worker] -= 1


class Cluster:
    """Centers, workers that commit to each of them and wait for all, and a post between the centers."""

    def __init__(self, centers, workers, commits):
        self.workers, self.time, self.said, self.post = workers, 0.0, [], defaultdict(deque)
        self.left = dict(enumerate(commits))
        self.sequence, self.unanswered = [0] * workers, [0] * workers
        self.to_send = {worker: [] for worker in range(workers)}
        self.stopped = set()
        self.centers = [FakeCenter(self, rank, centers) for rank in range(centers)]
        self.begun = 0

    def work(self, worker, rng):
        if worker in self.stopped:
            return
        if not self.to_send[worker] and not self.unanswered[worker] and self.left[worker]:
            self.left[worker] -= 1
            self.sequence[worker] += 1
            self.unanswered[worker] = len(self.centers)
            self.to_send[worker] = rng.sample(range(len(self.centers)), len(self.centers))
        if self.to_send[worker]:
            center = self.centers[self.to_send[worker].pop(0)]
            center.arrived.append(Commit(worker, self.sequence[worker], nbytes=8))

    def bring(self, rng):
        waiting = [pair for pair, letters in self.post.items() if letters]
        if waiting:
            source, to = rng.choice(waiting)
            self.centers[to].mail.box.append((source, self.post[source, to].popleft()))

    def event(self, rng, begin=True):
        center = rng.choice(self.centers)
        kind = rng.randrange(7)
        if kind == 0:
            self.work(rng.randrange(self.workers), rng)
        elif kind == 1:
            center.receive()
        elif kind == 2:
            center.apply()
        elif kind == 3:
            center.cut.tick()
        elif kind == 4:
            self.bring(rng)
        elif kind == 5:
            center.disk_busy = False
        elif begin and not self.centers[0].cut.busy and rng.random() < 0.3:
            self.begun += 1
            self.centers[0].cut.begin(self.begun)

    @property
    def over(self):
        return not any(self.left.values()) and not any(self.unanswered) and not self.centers[0].cut.busy


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    centers=st.integers(2, 4),
    commits=st.lists(st.integers(0, 12), min_size=1, max_size=5),
)
def test_all_blocks_hold_the_same_commits(seed, centers, commits):
    rng, cluster = random.Random(seed), Cluster(centers, len(commits), commits)
    for _ in range(400):
        cluster.event(rng)
    for _ in range(100_000):
        if cluster.over:
            break
        cluster.event(rng, begin=False)
    assert cluster.over, "the workers have done their work, and every cut came to its end"
    first = cluster.centers[0]
    assert sorted(first.saved) == list(range(1, cluster.begun + 1))
    for center in cluster.centers:
        assert center.saved == first.saved
        assert center.hold is None
    assert not cluster.said


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32), centers=st.integers(2, 3))
def test_a_worker_that_stops_amid_its_messages_costs_a_checkpoint_and_not_the_run(seed, centers):
    rng, cluster = random.Random(seed), Cluster(centers, 3, [100, 10, 10])
    while len(cluster.to_send[0]) != 1:
        cluster.work(0, rng)
    cluster.stopped.add(0)
    for center in cluster.centers:
        center.receive()
        center.apply()
    first = cluster.centers[0]
    first.cut.begin(1)
    for _ in range(100_000):
        cluster.time += 0.1
        cluster.event(rng, begin=False)
        if not first.cut.busy and not cluster.left[1] + cluster.left[2] + sum(cluster.unanswered[1:]):
            break
    else:
        pytest.fail("the others did not get on")
    assert len(cluster.said) == 1
    assert re.search(r"no checkpoint at step 1: .* rank 3 on host \d has waited", cluster.said[0])
    assert not all(1 in center.saved for center in cluster.centers)
    cluster.stopped.clear()
    cluster.left[0] = 3
    first.cut.begin(2)
    for _ in range(100_000):
        if cluster.over:
            break
        cluster.event(rng, begin=False)
    assert all(center.saved[2] == first.saved[2] for center in cluster.centers)
