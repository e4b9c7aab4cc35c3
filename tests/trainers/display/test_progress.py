"""Bars on a terminal, plain lines elsewhere; the table of a training."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from tests.trainers.tiny_recipe import settings, write_parts, write_recipe
from tests.trainers.tiny_training import picture_rows, tuning_trainer
from trainers.cli import QUIET_ENVIRONMENT
from trainers.display import progress as module
from trainers.display.progress import Progress, duration, track
from trainers.display.training import training_table


@pytest.fixture
def clock(monkeypatch):
    """A clock that is moved by hand: `clock.now`."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    return Clock


def test_without_a_terminal_there_is_a_line_every_ten_seconds_at_most(clock, capsys):
    with Progress("embedding texts", 1000, "texts") as step:
        for _ in range(25):
            clock.now += 1
            step.advance(20)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "embedding texts: 200 of 1,000 texts, 20.0 texts/s, 0:40 left",
        "embedding texts: 400 of 1,000 texts, 20.0 texts/s, 0:30 left",
    ]


def test_what_is_over_soon_prints_nothing(clock, capsys):
    assert list(track(range(1000), "counting", "numbers")) == list(range(1000))
    with Progress("counting", None, "numbers", shown=False) as step:
        clock.now += 100
        step.advance()
    assert capsys.readouterr() == ("", "")


def test_what_was_done_before_says_nothing_of_the_speed(clock, capsys):
    with Progress("training", 100, "steps", completed=90) as step:
        clock.now += 10
        step.note = "loss 1.5"
        step.advance(5)
        step.total = None
        clock.now += 10
        step.advance(1)
    assert capsys.readouterr().err.splitlines() == [
        "training: 95 of 100 steps, 0.5 steps/s, 0:10 left, loss 1.5",
        "training: 96 steps, 0.3 steps/s, loss 1.5",
    ]


@pytest.mark.parametrize("seconds, shown", [(5, "0:05"), (65.4, "1:05"), (3723, "1:02:03"), (-1, "0:00")])
def test_durations(seconds, shown):
    assert duration(seconds) == shown


def on_a_terminal(command, stdout_too: bool = True, columns: int = 100, **environment) -> tuple[str, str]:
    """What `command` prints to a terminal on standard error, and to standard output if that is a pipe."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    out = theirs if stdout_too else subprocess.PIPE
    # A command that a test ran in this process has made the libraries quiet.
    variables = {name: value for name, value in os.environ.items() if name not in QUIET_ENVIRONMENT}
    variables |= {"TERM": "xterm-256color", **environment}
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=theirs, env=variables) as process:
        os.close(theirs)
        received = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            received += part
        printed = "" if stdout_too else process.stdout.read().decode()
    os.close(ours)
    assert process.returncode == 0, received.decode()
    return received.decode(), printed


PROGRAM = """
import time
from trainers.display.progress import Progress
with Progress("outer", 2, "parts") as outer, Progress("inner", 3, "pieces") as inner:
    inner.note = "loss 0.5"
    inner.advance(2)
    time.sleep(0.3)  # bars are drawn ten times a second
    print("a line of output")
    inner.write("a line of news")
    outer.advance()
print("the end")
"""


@pytest.mark.parametrize("stdout_too", [True, False])
def test_on_a_terminal_bars_come_and_go_and_output_stays_whole(stdout_too):
    shown, printed = on_a_terminal([sys.executable, "-c", PROGRAM], stdout_too)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "outer" in text and "inner" in text and "2 of 3 pieces" in text and "loss 0.5" in text and "━" in text
    assert "a line of news" in text
    assert shown.rstrip().endswith("the end") if stdout_too else printed == "a line of output\nthe end\n"
    assert "\x1b[2K" in shown  # the bars are wiped out
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # and the cursor is there again


LONG_TITLE = """
import time
from trainers.display.progress import Progress
with Progress("embedding texts", 1_234_567, "texts") as step:
    step.note = "loss 0.08623"
    for _ in range(3):
        time.sleep(0.15)
        step.advance(100_000)
"""


@pytest.mark.parametrize("columns", [60, 80])
def test_a_bar_keeps_to_one_line_of_a_narrow_terminal(columns):
    shown, _ = on_a_terminal([sys.executable, "-c", LONG_TITLE], columns=columns)
    assert "of 1,234,567" in shown
    assert "\x1b[1A" not in shown  # the cursor never goes up a line


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"TTY_COMPATIBLE": "0"}])
def test_a_terminal_that_cannot_move_its_cursor_gets_no_bars(variables):
    shown, _ = on_a_terminal([sys.executable, "-c", PROGRAM], **variables)
    assert shown.replace("\r", "") == "a line of output\na line of news\nthe end\n"


def rows(text: str) -> list[list[str]]:
    return [re.split(r"  +| (?=[\d.])", line.strip()) for line in text.splitlines()]


def test_a_training_is_a_growing_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trainers.display.training.SECONDS_BETWEEN_LINES", 0)
    trainer = tuning_trainer(tmp_path, max_steps=3)
    with training_table(trainer):
        trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) < 80 for line in lines)
    header, *table = rows("\n".join(lines))
    assert header == ["step", "loss", "info nce", "scale", "instance", "structure", "wait", "rows/s", "left"]
    assert [row[0] for row in table] == ["1", "2", "3"] and [len(row) for row in table] == [9] * 3
    logs = [log for log in trainer.state.log_history if "info_nce_loss" in log]
    assert [float(row[2]) for row in table] == pytest.approx([log["info_nce_loss"] for log in logs], rel=5e-3)
    assert table[-1][-1] == "0:00"


def test_quick_logs_are_passed_over_but_not_the_last(tmp_path, capsys):
    trainer = tuning_trainer(tmp_path, max_steps=5)
    with training_table(trainer):
        trainer.train()
    assert [row[0] for row in rows(capsys.readouterr().out)] == ["step", "1", "5"]


def test_a_training_shorter_than_its_logging_interval_has_rows(tmp_path, capsys):
    trainer = tuning_trainer(tmp_path, max_steps=5, logging_steps=500)
    with training_table(trainer):
        trainer.train()
    assert [row[0] for row in rows(capsys.readouterr().out)] == ["step", "1", "5"]


def test_what_is_held_out_has_a_line_of_its_own(tmp_path, capsys):
    trainer = tuning_trainer(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, eval_dataset=picture_rows())
    with training_table(trainer):
        trainer.train()
    lines = capsys.readouterr().out.splitlines()
    held_out = [line for line in lines if line.startswith("  held out at step ")]
    assert [line.split(":")[0].split()[-1] for line in held_out] == [
        "1",
        "2",
    ]  # the first at once, the last at the end
    assert "eval" not in held_out[0] and "loss " in held_out[0] and "i2t_r@1 " in held_out[0]


def test_a_training_that_fails_leaves_no_bar(tmp_path, capsys):
    trainer = tuning_trainer(tmp_path, max_steps=2)
    with pytest.raises(ZeroDivisionError), training_table(trainer):
        trainer.training_step = lambda *args, **kwargs: 1 / 0
        trainer.train()
    assert module._bars._bars is None


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    write_parts(folder)
    content = settings(folder)
    for stage in content["stages"].values():
        del stage["disable_tqdm"]
    return write_recipe(folder / "recipe.yaml", content)


def train(recipe, stage, *options):
    return [sys.executable, "-m", "trainers.cli", *options, "train", str(recipe), "--stage", stage]


NOISE = ("it/s", "{'loss'", "Loading weights", "Writing model shards", "Generating", "Warning", "\r")


def test_the_command_is_quiet_and_tells_more_when_asked(recipe):
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    quiet = subprocess.run(train(recipe, "inheritance"), env=environment, capture_output=True, text=True)
    assert quiet.returncode == 0, quiet.stderr
    printed = quiet.stdout + quiet.stderr
    assert [noise for noise in NOISE if noise in printed] == []
    assert "inheritance: training on batches of 8 rows" in printed and "structure" in printed

    told, _ = on_a_terminal(train(recipe, "contrastive_tuning", "--verbose"), PYTHONPATH=os.getcwd())
    assert "Loading weights" in told
    assert "training" in told and "of 6 steps" in told and "━" in told  # our bar
