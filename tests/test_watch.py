"""The watch over several processes (R11), with a store in memory and a clock that the test sets: no process is started."""

import subprocess
import sys
import threading
import time

import pytest

from moe_jax.training import witness
from moe_jax.training.watch import Watch


class Store:
    """What JAX's coordination service does, for processes that are threads of this one."""

    def __init__(self):
        self.values, self.reachable = {}, True

    def put(self, key, text):
        if not self.reachable:
            raise RuntimeError("UNAVAILABLE")
        self.values[key] = text

    def list(self, folder):
        if not self.reachable:
            raise RuntimeError("UNAVAILABLE")
        return {key.removeprefix(folder): text for key, text in list(self.values.items()) if key.startswith(folder)}


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Group:
    """Three watches with one store and one clock; ``pass_time`` lets the ones that are alive exchange once a second."""

    def __init__(self, timeout=100.0):
        self.store, self.clock, self.warnings = Store(), Clock(), []
        names = [f"process {i} of 3" for i in range(3)]
        self.watches = [Watch(self.store, i, names, timeout, pytest.fail, clock=self.clock) for i in range(3)]
        self.alive = {0, 1, 2}

    def pass_time(self, seconds, until=lambda message: message is not None):
        """Process 0's first message and after how many seconds it came; (None, seconds) if there was none."""
        for second in range(seconds):
            self.clock.now += 1
            for i in self.alive:
                try:
                    self.watches[i].exchange()
                except RuntimeError:
                    pass
            message = self.watches[0].judge()
            if until(message):
                return message, second + 1
        return None, seconds


def test_processes_that_make_steps_are_left_alone_and_nobody_asks_for_the_others():
    group = Group()
    asked, real = [], group.store.list
    group.store.list = lambda folder: asked.append(folder) or real(folder)
    for step in range(300):
        for watch in group.watches:
            watch.at(f"step {step}")
        assert group.pass_time(2)[0] is None
    assert "alive/" not in asked


def test_a_dead_process_is_named_with_its_last_place_and_with_where_we_wait():
    group = Group(timeout=100.0)
    for watch in group.watches:
        watch.at("step 7")
    group.pass_time(2)
    group.alive = {0, 1}
    group.watches[0].at("the barrier 'checkpoint 4 staged'")
    message, seconds = group.pass_time(100)
    assert "process 1 of 3 has" not in message
    assert "process 2 of 3 has given no sign of life" in message and "last at step 7" in message
    assert "process 0 of 3 has waited" in message and "at the barrier 'checkpoint 4 staged'" in message
    silence = group.watches[0].silence
    assert silence < seconds <= silence + 20 < 100  # before the limit of the place


def test_a_process_that_is_alive_but_stuck_is_named_when_the_limit_of_the_place_is_reached():
    group = Group(timeout=100.0)
    group.watches[1].at("step 9")
    group.watches[2].at("step 8: reading the data")
    for i in (0, 1):
        group.watches[i].at("step 9")
    message, seconds = group.pass_time(200)
    assert 100 <= seconds <= 102
    assert "process 0 of 3 has waited 101 s at step 9, longer than 100 s" in message
    assert "process 2 of 3 is alive, at step 8: reading the data" in message


def test_a_place_may_have_a_limit_of_its_own_and_a_long_wait_is_reported_before_it_ends(caplog):
    group = Group(timeout=100.0)
    group.watches[0].at("step 1, compiling", 1000.0)
    message, seconds = group.pass_time(2000)
    assert seconds == pytest.approx(1000, abs=2) and "step 1, compiling" in message
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert 10 <= len(told) <= 16  # once a minute, after two
    assert "process 0 of 3 has waited 12" in told[0] and "process 1 of 3 is alive, at the start" in told[0]


def test_a_process_that_ended_with_an_error_ends_the_others_with_its_reason():
    group = Group(timeout=1000.0)
    group.store.put("ended/2", "No space left on device")
    message, seconds = group.pass_time(100)
    assert message.startswith("process 2 of 3 ended: No space left on device (process 0 of 3 has waited")
    assert seconds <= 10


def test_a_coordinator_that_does_not_answer_is_named():
    group = Group(timeout=100.0)
    group.watches[0].at("step 3")
    group.store.reachable = False
    message, seconds = group.pass_time(200)
    assert "process 0 of 3, which coordinates the run, has not answered for 51 s" in message and "at step 3" in message


# Stopping together.


class Runner(threading.Thread):
    """A process as the loop is one: a point before each step, and steps that nobody ends before all have begun them."""

    def __init__(self, watch, begun, pace):
        super().__init__(daemon=True)
        self.watch, self.begun, self.pace, self.stopped_after, self.number = watch, begun, pace, None, None

    def run(self):
        for step in range(500):
            self.number = self.watch.stop_signal()
            if self.number is not None:
                self.stopped_after = step
                return
            self.begun[self.watch.index] = step + 1
            time.sleep(self.pace)
            # Like the loop, it reads a step's metrics once the next one was begun: it runs ahead by one.
            while min(self.begun) < step:
                time.sleep(0.001)


@pytest.mark.parametrize("asking", [0, 1, 2])
def test_all_stop_after_the_same_step_whoever_got_the_signal_and_however_far_each_is(asking):
    store, names = Store(), [f"process {i}" for i in range(3)]
    watches = [Watch(store, i, names, 20.0, pytest.fail) for i in range(3)]
    begun = [0, 0, 0]
    runners = [Runner(watch, begun, pace) for watch, pace in zip(watches, (0.002, 0.005, 0.011))]
    for watch in watches:
        watch.interval = 0.05 * (1 + watch.index)  # they do not learn of it at the same moment
        watch.start()
    for runner in runners:
        runner.start()
    time.sleep(0.3)
    watches[asking].ask_to_stop(15)
    for runner in runners:
        runner.join(20)
    for watch in watches:
        watch.close()
    assert {runner.number for runner in runners} == {15}
    assert len({runner.stopped_after for runner in runners}) == 1
    assert 5 < runners[0].stopped_after < 400 and all(watch.agreed_to_stop for watch in watches)
    assert watches[0].stop_signal() == 15  # and it stays so


# The witness.


def last_words(*lines, coordinator=""):
    process = subprocess.run([sys.executable, "-I", witness.__file__, "process 1 of 2 (here)", coordinator],
                             input="".join(f"{line}\n" for line in lines), capture_output=True, text=True, timeout=60)
    assert process.stdout == ""
    return process.stderr


def test_the_witness_tells_where_a_process_was_that_ended_without_a_word_and_keeps_silent_otherwise():
    assert last_words("step 1", "step 2", "end") == ""
    killed = last_words("step 1", "step 2")
    assert "process 1 of 2 (here) ended without a word at step 2: it was killed from outside" in killed
    orphaned = last_words("step 2", coordinator="127.0.0.1:9")  # nobody listens there
    assert "at step 2: process 0, which coordinates the run at 127.0.0.1:9, is gone" in orphaned
    assert len(orphaned.splitlines()) == 1


def test_the_witness_is_told_of_every_place_when_it_is_reached_and_not_at_the_next_sign_of_life():
    told = []
    watch = Watch(Store(), 0, ["process 0 of 1"], 100.0, pytest.fail, told.append)
    for place in ("step 1", "step 2"):
        watch.at(place)
    assert told == ["step 1", "step 2"]
