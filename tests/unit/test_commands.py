from __future__ import annotations

import os
import signal
import sys
import threading

import pytest

from pipeline.commands import exit_code_of_signal, signals_passed_on


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize("code", [0, 3, 75])
def test_a_command_returns_its_own_exit_code(code):
    with signals_passed_on() as commands:
        assert commands.run(python(f"raise SystemExit({code})"), os.environ) == code


def test_a_command_reads_no_input():
    with signals_passed_on() as commands:
        code = "import sys; sys.exit(7 if sys.stdin.read() == '' else 1)"
        assert commands.run(python(code), os.environ) == 7


def test_a_signal_that_came_too_early_reaches_the_next_command():
    with signals_passed_on() as commands:
        commands.receive(signal.SIGTERM)
        assert commands.run(python("import time; time.sleep(30)"), os.environ) == -signal.SIGTERM
        # and no other one after it
        assert commands.run(python("pass"), os.environ) == 0


def test_a_signal_is_passed_on_once_and_the_handlers_come_back():
    code = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('stopped', flush=True))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(0.5)\n"
    )
    before = signal.getsignal(signal.SIGTERM)
    with signals_passed_on() as commands:
        assert commands.run(python(code), os.environ) == 0
        assert commands.received == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_passed_on() as commands:
            code = "import os, signal; os.kill(os.getppid(), signal.SIGHUP)"
            assert commands.run(python(code), os.environ) == 0
            assert commands.received == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_it_works_outside_the_main_thread_too():
    codes = []

    def run():
        with signals_passed_on() as commands:
            codes.append(commands.run(python("raise SystemExit(4)"), os.environ))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert codes == [4]


def test_no_command_outlives_the_one_that_waits_for_it():
    def interrupt(number, frame):
        raise KeyboardInterrupt

    code = "import os, signal, time; time.sleep(0.3); os.kill(os.getppid(), signal.SIGUSR1); "
    code += "time.sleep(60)"
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with signals_passed_on() as commands, pytest.raises(KeyboardInterrupt):
            commands.run(python(code), os.environ)
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGKILL, 5), (signal.SIGSEGV, 1)],
)
def test_a_process_ended_by_a_signal_has_the_exit_code_of_the_design(number, code):
    assert exit_code_of_signal(number) == code
