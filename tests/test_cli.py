"""The command line, as a person meets it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from genflow import __version__
from genflow.cli import main


def test_help_lists_the_commands_without_torch():
    code = "import sys; from genflow.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and "genflow sample" in result.stdout


def test_info_lists_everything_without_torch():
    code = "import sys; from genflow.cli import main; main(['info']); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in (
        "mmdit",
        "heun",
        "emoji",
        "minilm",
        "logit_normal",
        "adamw",
        "xformers",
        "vp",
        "sinkhorn",
        "actnorm",
        "fsq",
    ):
        assert f"  {name}" in result.stdout


def test_a_closed_pipe_is_no_error():
    code = "import sys; from genflow.cli import main; sys.stdin.read(); sys.exit(main(['info']))"
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    process = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, stderr=-1, text=True, env=buffered)
    process.stdout.close()
    process.stdin.close()  # only now does it begin to write
    assert process.stderr.read() == "" and process.wait() == 0


def test_a_stream_that_is_closed_from_the_start_is_no_error():
    for streams in ("1>&-", "2>&-", "1>&- 2>&-"):
        code = "import sys; from genflow.cli import main; sys.stderr.write('x') if sys.stderr else 0; sys.exit(main())"
        closed = ["sh", "-c", f'"$0" -c "$1" info sampler {streams}', sys.executable, code]
        assert subprocess.run(closed, capture_output=True).returncode == 0, streams


def test_work_goes_on_where_nobody_reads_what_is_said_beside_it():
    code = "import sys; from genflow.cli import main; sys.stdin.read(); sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", code, "inof"], stdin=-1, stdout=-1, stderr=-1)
    process.stderr.close()
    process.stdin.close()
    assert process.wait() == 2


@pytest.mark.parametrize("name", ["café", "ключ"])
def test_a_locale_that_lacks_a_names_letters_is_told(name):
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    asked = [sys.executable, "-m", "genflow", "info", name]
    told = subprocess.run(asked, env=plain, capture_output=True, text=True)
    assert told.returncode == 2 and "the locale's encoding, ascii, lacks; set PYTHONUTF8=1" in told.stderr
    writes = f"import sys, genflow.cli.info as info; info.run = lambda _: open({name!a})"
    code = f"{writes}; from genflow.cli import main; sys.exit(main(['info']))"
    told = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True)
    assert told.returncode == 2 and told.stderr.count("\n") == 1 and "set PYTHONUTF8=1" in told.stderr


def test_version_and_interruption(capsys, monkeypatch):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"genflow {__version__}\n"

    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("genflow.cli.info.run", interrupted)
    assert main(["info"]) == 130


def test_info_has_every_kind_that_there_is(capsys):
    from genflow.cli.info import PLURAL
    from genflow.registry import index

    assert set(index()) == set(PLURAL)
    assert main(["info", "coupling"]) == 0
    assert "  optimal_transport" in capsys.readouterr().out


def test_an_interrupted_training_tells_how_to_go_on_as_a_shell_reads_it(monkeypatch, capsys):
    from genflow.training.signals import Interrupted

    def interrupted(*_: object) -> None:
        raise Interrupted

    monkeypatch.setattr("genflow.training.run.train", interrupted)
    assert main(["train", "my configs/a.yaml", "data={name: latents}"]) == 130
    assert "genflow train 'my configs/a.yaml' 'data={name: latents}'" in capsys.readouterr().err


def test_info_explains_one_thing(capsys):
    assert main(["info", "mmdit"]) == 0
    out = capsys.readouterr().out
    assert "qk_norm" in out and "= True" in out and "genflow.networks.mmdit" in out
    assert re.search("attention +str +=", out)
    assert main(["info", "MMDiT"]) == 0
    assert "genflow.networks.mmdit.MMDiT" in capsys.readouterr().out
    assert main(["info", "heun"]) == 0
    assert "-> Solution" in capsys.readouterr().out


def test_a_config_in_place_of_a_run_is_told_to_be_trained(tmp_path, capsys):
    (config := tmp_path / "mine.yaml").write_text("seed: 0")
    assert main(["sample", str(config)]) == 2
    assert f"genflow train {config} makes a run of it" in capsys.readouterr().err
    (tmp_path / "checkpoints").mkdir()
    assert main(["sample", str(config)]) == 2
    assert f"; try {tmp_path}" in capsys.readouterr().err


def test_info_lists_no_field_that_cannot_be_set(capsys):
    assert main(["info", "Mask"]) == 0 and main(["info", "apg"]) == 0
    told = capsys.readouterr().out
    assert "\n  dense " in told and not any(f"\n  {hidden} " in told for hidden in ("kind", "_kept", "_memory"))


def test_info_system_says_what_runs_here(capsys):
    assert main(["info", "system"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "sdpa" in out
    assert main(["info", "precision"]) == 0
    out = capsys.readouterr().out
    assert "bf16" in out and "fp16" in out and "float32" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "no command 'trian'. Did you mean 'train'?"),
        (["info", "hoin"], "nothing is called 'hoin'"),
        (["info", "qqqqqq"], "nothing is called 'qqqqqq'. Kinds: network, flow, path, coupling"),
        (["train", "no-such.yaml"], "cannot read config no-such.yaml"),
        (["sample", "no-such-run", "--prompt", "x"], "no-such-run does not exist"),
        (["sample", "no-such-run"], "no-such-run does not exist"),
        (["sample", "x", "--prompt-file", "nothing.txt"], "--prompt-file nothing.txt"),
    ],
)
def test_mistakes_cost_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("genflow: ") and error.count("\n") == 1


def test_shared_memory_that_is_full_costs_one_line(capsys, monkeypatch):
    def full(arguments):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
        )

    monkeypatch.setattr("genflow.cli._dispatch", full)
    assert main(["train", "x.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("genflow: unable to allocate shared memory") and line.endswith("train.workers=0")
