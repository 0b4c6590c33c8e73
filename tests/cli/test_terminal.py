"""Output of the commands on consoles of all kinds; invalid arguments; the end of a command."""

import errno
import io
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import warnings

import pytest

from groupvit_common import cli
from groupvit_common.cli import terminal
from groupvit_common.cli.parser import did_you_mean
from groupvit_common.errors import CheckpointError, InputError, printable
from groupvit_common.storage.json_text import unicode_json
from groupvit_common.storage.names import fit_name, name_key
from tests.support.paths import ROOT

# A byte that is not UTF-8, an escape sequence, a line break, a direction mark, letters that cp1252 lacks, an emoji.
ODD = "caf\udce9 \x1b[31m \n \u202e 猫 🐱"


class Broken(io.RawIOBase):
    """A device that takes nothing."""

    def __init__(self, number):
        self.number = number

    def writable(self):
        return True

    def write(self, data):
        if self.number:
            raise OSError(self.number, os.strerror(self.number))
        return len(data)


@pytest.fixture
def streams(monkeypatch):
    """Sets stdout and stderr to streams of these encodings, a number being an error of every write; returns both."""

    def stream(kind):
        if isinstance(kind, int):
            return io.TextIOWrapper(io.BufferedWriter(Broken(kind)), encoding="utf-8")
        return io.TextIOWrapper(io.BytesIO(), encoding=kind, errors="strict")

    made = []

    def set_streams(out="utf-8", err="utf-8"):
        made.extend((stream(out), stream(err)))
        for name, each in zip(("stdout", "stderr"), made[-2:], strict=True):
            monkeypatch.setattr(sys, name, each)
        return made[-2:]

    yield set_streams
    monkeypatch.undo()
    for each in made:
        if isinstance(each.buffer, io.BufferedWriter):
            each.buffer.raw.number = 0
        each.close()


def written(stream):
    return stream.buffer.getvalue().decode(stream.encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii", "utf-16-le"])
def test_anything_can_be_printed_on_any_console(streams, encoding):
    out, err = streams(encoding, encoding)

    def command():
        terminal.print_lines(ODD, "plain")
        terminal.print_json({"source": ODD})
        terminal.error(ODD)
        return 0

    assert terminal.run(command) == 0
    shown, plain, record = written(out).splitlines()
    assert (plain, json.loads(record)) == ("plain", {"source": ODD})
    assert shown.startswith(r"caf\udce9 \x1b[31m \n \u202e ")
    assert shown.endswith("猫 🐱" if encoding.startswith("utf") else r"\u732b \U0001f431")
    assert written(err) == f"groupvit: error: {shown}\n"
    assert (out.errors, err.errors) == ("strict", "strict")


def test_letters_that_terminals_show_stay():
    text = "naïve 猫\u00a0\u202f\u3000 می‌خواهم 👨‍👩‍👧 e\u0301"
    assert printable(text) == text
    assert printable("\x07\x9b\u2028\u200f\ud800\t") == r"\x07\x9b\u2028\u200f\ud800\t"


@pytest.mark.parametrize(
    ("number", "code", "lines"),
    [
        (
            errno.ENOSPC,
            1,
            "groupvit: error: stdout cannot be written (No space left on device): what this command prints is lost\n",
        ),
        (
            errno.EBADF,
            1,
            "groupvit: error: stdout cannot be written (it is closed): what this command prints is lost\n",
        ),
        (errno.EPIPE, 141, ""),
    ],
)  # fmt: skip
def test_what_stdout_does_not_take_is_lost_and_the_work_is_not(streams, number, code, lines):
    _, err = streams(number)
    done = []

    def command():
        for i in range(3):
            terminal.print_lines(f"line {i}")
            done.append(i)
        return 0

    assert terminal.run(command) == code
    assert (done, written(err)) == ([0, 1, 2], lines)
    # Nothing of it stays for the next command.
    out, _ = streams()
    assert terminal.run(lambda: terminal.print_lines("more") or 0) == 0
    assert written(out) == "more\n"


def test_a_broken_stderr_changes_nothing(streams):
    out, _ = streams("utf-8", errno.ENOSPC)

    def command():
        terminal.error("unheard")
        terminal.warn("unheard")
        terminal.print_lines("heard")
        return 1

    assert terminal.run(command) == 1
    assert written(out) == "heard\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
@pytest.mark.parametrize(
    ("streams", "code", "lines"),
    [(">&-", 1, 1), ("2>&-", 0, 0), (">&- 2>&- <&-", 1, 0), ("> /dev/full", 1, 1), ("> /dev/full 2> /dev/full", 1, 0)],
)
def test_streams_that_are_closed_or_full_from_the_start(tmp_path, streams, code, lines):
    command = f"{shlex.quote(sys.executable)} -m groupvit_common.cli --version {streams}"
    ended = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True)
    assert ended.returncode == code
    assert len(ended.stderr.splitlines()) == lines
    assert b"Traceback" not in ended.stderr


def test_warnings_and_logs_of_libraries_are_lines_of_this_program(streams):
    _, err = streams()
    own = logging.getLogger("test_terminal.of_its_own")
    handler = logging.StreamHandler(io.StringIO())
    own.addHandler(handler)

    def command():
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = terminal._show_warning  # pytest has another
            warnings.warn("old\n  \x1b[31m", UserWarning, stacklevel=1)
        logging.getLogger("PIL.some.plugin").warning("a %s tag\n\x07", "strange")
        logging.getLogger("PIL").info("nothing of interest")
        own.warning("shown by a handler of its own")
        return 0

    assert terminal.run(command) == 0
    own.removeHandler(handler)
    assert written(err).splitlines() == [
        r"groupvit: warning: old \x1b[31m",
        r"groupvit: warning: a strange tag \x07",
    ]


@pytest.mark.parametrize(
    ("failure", "code", "line"),
    [
        (InputError("no\x1b good"), 2, r"no\x1b good"),
        (CheckpointError("gone"), 3, "gone"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "a/b"), 2, "Permission denied: a/b"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9."), 3, "out of memory"),
        (ModuleNotFoundError("No module named 'h5py._x'", name="h5py._x"), 3, "h5py is missing: pip install h5py"),
        (KeyError(99), 70, "please report it: KeyError: 99 (test_terminal.py, line "),
    ],
)  # fmt: skip
def test_every_end_is_one_line_and_a_code(streams, monkeypatch, failure, code, line):
    monkeypatch.delenv("GROUPVIT_TRACEBACK", raising=False)
    _, err = streams()

    def command():
        raise failure

    assert terminal.run(command) == code
    (found,) = written(err).splitlines()
    assert line in found


def test_a_fault_of_the_program_with_its_traceback(streams, monkeypatch):
    monkeypatch.setenv("GROUPVIT_TRACEBACK", "1")
    _, err = streams()
    assert terminal.run(lambda: 1 // 0) == 70
    assert written(err).startswith("Traceback")


def test_a_process_that_is_asked_to_end_ends(streams):
    _, err = streams()
    before = signal.getsignal(signal.SIGTERM)
    cleared = []

    def command():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            cleared.append(True)
        return 0

    with pytest.raises(SystemExit) as stop:
        terminal.run(command)
    assert (stop.value.code, cleared, written(err)) == (143, [True], "groupvit: error: ended by SIGTERM\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_bar_on_a_terminal_that_breaks(streams, monkeypatch):
    streams("utf-8", errno.EIO)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)

    def command():
        with terminal.Bar(9, "image", title=ODD) as bar:
            for _ in range(12):
                bar.advance()
                terminal.print_lines("line")
            bar.name(ODD)
        return 0

    assert terminal.run(command) == 0
    assert written(sys.stdout) == "line\n" * 12
    assert terminal.Bar.shown == 0


# Arguments


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("segmnt a.jpg", "there is no command 'segmnt'; did you mean segment? (see groupvit --help)"),
        ("--versoin", "there is no option --versoin; did you mean --version? (see groupvit --help)"),
        (". --labels cat", "there is no command '.'; did you mean groupvit segment .? (see groupvit --help)"),
        ("segment a --label cat", "no option --label; did you mean --labels? (see groupvit segment --help)"),
        ("segment a --labels cat --background=90", "must be a number between 0 and 1, got '90'; did you mean 0.9?"),
        ("segment a --labels cat --background 45%", "got '45%'; did you mean 0.45?"),
        ("segment a --labels cat --background 0,9", "got '0,9'; did you mean 0.9?"),
        ("segment a --labels cat --background -1", "must be a number between 0 and 1, got '-1' (see groupvit"),
        ("segment a --labels cat --shorter-side 0", "--shorter-side: must be a whole number of at least 1, got '0'"),
        ("segment a --labels cat --shorter-side 99999999999", "must be at most 2147483647, got '99999999999'"),
        ("segment -dash.png --labels cat", "there is no option -dash.png; a file of this name is written ./-dash.png"),
        ("segment a --labels cat --dtype float61", "--dtype: unknown 'float61'; did you mean float16?"),
        ("segment a --labels cat --assignment x", "--assignment: unknown 'x'; there are hard, soft"),
        ("segment --labels cat", "the following arguments are required: PHOTO"),
        ("segment a --labels", "--labels: expected one argument"),
        ("segment a --labels cat, dog", 'comma: put all labels between quotes, as in --labels "cat, couch"'),
        ("segment a --labels 'caf\udce9'", r"--labels: must be text in UTF-8, got 'caf\udce9'"),
        ("evaluate --dat voc:DIR", "no option --dat; did you mean --data? (see groupvit evaluate --help)"),
        ("convert a b c", "there is one argument too many: 'c' (see groupvit convert --help)"),
        ("inspect x --jsno", "there is no option --jsno; did you mean --json? (see groupvit inspect --help)"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_used_are_one_line(capsys, tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(shlex.split(line))
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    (found,) = err.splitlines()
    assert found.startswith("groupvit: error: ")
    assert message in found


@pytest.mark.parametrize("columns", ["1", "40", "500", "many"])
def test_help_fits_any_width(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    for command in ("segment", "evaluate", "convert"):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
    assert "exit codes:" in capsys.readouterr().out


def test_did_you_mean():
    known = ["--labels", "--labels-file", "--background"]
    assert did_you_mean("--backgr", known) == "; did you mean --background?"
    assert did_you_mean("--lables", known) == "; did you mean --labels?"
    assert did_you_mean("--frobnicate", known) == ""


# Names and JSON


def test_names_are_as_long_as_the_file_system_takes(tmp_path):
    ends = ("_overlay.png", "_labels.png")
    assert fit_name("a", ends, tmp_path) == "a"
    names = [fit_name(name * 90 + "1", ends, tmp_path) for name in ("猫", "猫🐱", "\udce9\udce8")]
    assert len({*names, fit_name("猫" * 90 + "2", ends, tmp_path)}) == 4
    for name in names[:2]:
        (tmp_path / (name + ends[0])).touch()
    assert len(os.fsencode(names[0])) > 200


def test_names_that_some_file_system_takes_for_one():
    assert name_key("CAFÉ") == name_key("cafe\u0301")
    assert name_key("cafe") != name_key("café")


def test_json_of_what_is_no_unicode():
    assert unicode_json({"a": "é"}) == '{"a": "é"}'
    assert json.loads(unicode_json({"a": ODD}, indent=2).encode()) == {"a": ODD}
