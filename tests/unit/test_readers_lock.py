"""The readers' lock under random interleavings: threads that move one access to the word at a time, by a script."""

import threading

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from agnmpi.transport.readers_lock import WAITING, WRITING, ReadersLock


class Plain:
    """A word without anybody in between."""

    def __init__(self):
        self.value = 0

    def add(self, value):
        old, self.value = self.value, self.value + value
        return old

    def read(self):
        return self.value


def test_readers_come_in_together_and_keep_the_center_out():
    word = Plain()
    readers, center = [ReadersLock(word) for _ in range(3)], ReadersLock(word)
    assert all(reader.enter(True) for reader in readers)
    assert not center.lock()
    for reader in readers:
        assert not center.lock()
        reader.leave()
    assert center.lock()
    center.unlock()
    assert word.value == 0


def test_a_reader_that_is_kept_out_and_patient_is_let_in_before_the_next_change():
    word, now = Plain(), [0.0]
    reader, center = ReadersLock(word), ReadersLock(word, courtesy=2.0, clock=lambda: now[0])
    assert center.lock()
    assert not reader.enter(False)
    assert word.value == WRITING, "one that has something else to do is not waited for"
    assert not reader.enter(True)
    assert word.value == WRITING, "it has tried by a look"
    center.unlock()
    assert center.lock()
    other = ReadersLock(word)
    assert not other.enter(True)
    assert word.value == WRITING + WAITING
    center.unlock()
    assert not center.lock(), "somebody waits"
    assert other.enter(True)
    other.leave()
    assert center.lock(), "nobody waits any more"
    assert not other.enter(True)
    center.unlock()
    now[0] = 2.0
    assert center.lock(), "not for ever: it may never come back"
    center.unlock()


def test_who_follows_the_apply_is_waited_for_before_the_next():
    word = Plain()
    reader, center = ReadersLock(word), ReadersLock(word)
    assert center.lock()
    reader.enter_behind()
    assert center.in_use()
    center.unlock()
    assert not center.lock()
    reader.leave()
    assert center.lock()
    center.unlock()
    assert not center.in_use()


def test_a_million_readers_fit_beside_as_many_that_wait():
    word, center = Plain(), ReadersLock(Plain())
    word.value = (WAITING - 1) * (1 + WAITING)
    center = ReadersLock(word, courtesy=0.0)
    assert not center.lock()
    assert ReadersLock(word).enter(False) is False
    word.value -= WAITING - 1
    assert center.lock()
    assert word.value < np.iinfo(np.int64).max


class Stage:
    """Actors in threads; each access to the word waits for its actor's turn, so that a script decides their order."""

    def __init__(self):
        self.word, self.actors, self.failure = Plain(), [], None

    def add(self, play):
        actor = Actor(self, play)
        self.actors.append(actor)
        return actor

    def run(self, script):
        """Give a turn to one actor after the other, as `script` says, then to each in turn until all are done."""
        for actor in self.actors:
            actor.thread.start()
        at = 0
        while living := [actor for actor in self.actors if not actor.over]:
            index = script[at] if at < len(script) else at
            living[index % len(living)].move()
            at += 1
            assert at < 20_000, "somebody starves"
        for actor in self.actors:
            actor.thread.join()
        if self.failure is not None:
            raise self.failure


class Actor:
    """The word as this actor reaches it: `add` and `read` happen in its turns."""

    def __init__(self, stage, play):
        self.stage, self.play, self.over = stage, play, False
        self.mine, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self):
        self.mine.acquire()
        try:
            self.play(self)
        except BaseException as error:
            self.stage.failure = error
        self.over = True
        self.done.release()

    def move(self):
        """One turn: up to this actor's next access."""
        self.mine.release()
        self.done.acquire()

    def turn(self):
        self.done.release()
        self.mine.acquire()

    def add(self, value):
        self.turn()
        return self.stage.word.add(value)

    def read(self):
        self.turn()
        return self.stage.word.read()


@settings(max_examples=80, deadline=None)
@given(
    readers=st.lists(st.booleans(), min_size=1, max_size=4),  # whether each is patient
    script=st.lists(st.integers(0, 4), max_size=300),
    changes=st.integers(1, 6),
)
def test_any_interleaving(readers, script, changes):
    """Nobody is within while c changes; whoever waits sees at most one more change begin; all counts return to 0."""
    stage = Stage()
    c, within, begun, waits = [0, 0], set(), [0], {}

    def center(word):
        lock = ReadersLock(word, courtesy=1.0, clock=lambda: 0.0)  # a clock that stands still: without end
        for _ in range(changes):
            while not lock.lock():
                pass
            assert not within
            begun[0] += 1
            for k in range(2):
                c[k] += 1
                word.turn()
                assert not within, "a reader came in while c changed"
            lock.unlock()

    def reader(index, patient):
        def play(word):
            lock = ReadersLock(word)
            for _ in range(4):
                while not lock.enter(patient):
                    waits.setdefault(index, begun[0])  # from now on it is counted among those who wait, if patient
                kept_out = begun[0] - waits.pop(index, begun[0])
                assert kept_out <= 1 or not patient, "kept out twice"
                within.add(index)
                first = list(c)
                word.turn()
                assert first == c and c[0] == c[1], "a torn read"  # noqa: PT018
                within.remove(index)
                lock.leave()

        return play

    stage.add(center)
    for index, patient in enumerate(readers):
        stage.add(reader(index, patient))
    stage.run(script)
    assert stage.word.value == 0
    assert c == [changes, changes]


def test_a_stage_shows_what_a_broken_lock_does():
    """The test above is able to fail: with readers that come in whatever the word says, it does."""
    stage, within, torn = Stage(), [], []

    def center(word):
        lock = ReadersLock(word)
        while not lock.lock():
            pass
        word.turn()
        torn.extend(within)
        lock.unlock()

    def reader(word):
        lock = ReadersLock(word)
        lock.enter_behind()
        within.append("reader")
        word.turn()
        lock.leave()

    stage.add(center)
    stage.add(reader)
    stage.run([0, 0, 1, 1, 0])
    assert torn == ["reader"]
