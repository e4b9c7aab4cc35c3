"""The templates of Slurm's jobs, run with stand-ins for Slurm's commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from typer.testing import CliRunner

from tests.trainers.tiny_encoders import make_texts, tiny_proclip
from trainers.cli import app
from trainers.data import TextEmbeddingStore


TEMPLATES = Path(__file__).parents[3] / "recipes" / "slurm"

# `srun` starts the command as two tasks, on a node each.
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_NTASKS=2 SLURM_LOCALID=0 SLURM_NODEID=$rank "$@" || exit 1
done
"""
# The second line comes later, when who reads only the first of a pipe has gone: that ended the template now and then.
SCONTROL = """#!/bin/bash
[[ "$*" == "show hostnames node[7-8]" ]] && echo node7 && sleep 0.2 && echo node8
"""
# What is started writes its arguments, and what Slurm said, to a file of its own.
STARTED = f"""#!{sys.executable}
import json, os, sys
said = {{name: value for name, value in os.environ.items() if name.startswith("SLURM_")}}
with open(os.environ["STARTED"] + "/" + os.environ["SLURM_PROCID"] + ".json", "w") as file:
    json.dump([sys.argv[1:], said], file)
"""


def run(template, folder, environment, *arguments):
    """What each of two tasks has started: its arguments and environment."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("proclip", STARTED), ("accelerate", STARTED)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "STARTED": str(folder), **environment}
    subprocess.run(["bash", TEMPLATES / template, *arguments], env=environment, check=True, timeout=60)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("template", ["embed.sbatch", "train.sbatch"])
def test_templates_are_sound_and_say_what_they_lack(template):
    subprocess.run(["bash", "-n", TEMPLATES / template], check=True)
    assert (TEMPLATES / template).read_text().startswith("#!/bin/bash\n")
    result = subprocess.run(
        ["bash", TEMPLATES / template], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True
    )
    assert result.returncode != 0 and ("TEXTS: a file" in result.stderr or "RECIPE: the recipe" in result.stderr)


def test_two_tasks_embed_a_corpus(tmp_path):
    for part in tiny_proclip(max_length=20):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "my texts.txt").write_text("\n".join(make_texts(40)))
    environment = {
        "TEXTS": f"{tmp_path}/my texts.txt",
        "MODEL": f"{tmp_path}/model",
        "STORE": f"{tmp_path}/store",
        "NUM_TASKS": "6",
    }
    (tmp_path / "bin").mkdir()
    for rank, (arguments, said) in enumerate(run("embed.sbatch", tmp_path / "bin", environment, "--device", "cpu")):
        assert (said["SLURM_PROCID"], said["SLURM_NTASKS"]) == (str(rank), "2")
        result = CliRunner().invoke(app, arguments, env=said)
        assert result.exit_code == 0, result.output
        expected = ("6 tasks, 40 texts: 40 embedded", "this process: 0 texts: 0 embedded")[rank]
        assert expected in result.output
    store = TextEmbeddingStore(tmp_path / "store")
    assert len(store) == 40 and store.lookup(make_texts(40)).shape == (40, 32)


@pytest.mark.parametrize("config", [None, "fsdp.yaml"])
def test_two_nodes_train(tmp_path, config):
    environment = {
        "RECIPE": "my recipe.yaml",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "45678",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        **({} if config is None else {"ACCELERATE_CONFIG": config}),
    }
    for rank, (arguments, _) in enumerate(run("train.sbatch", tmp_path, environment, "--dry-run")):
        assert arguments[0] == "launch"
        parsed = launch_command_parser().parse_args(arguments[1:])
        assert (parsed.machine_rank, parsed.num_machines, parsed.num_processes) == (rank, 2, 16)
        assert (parsed.main_process_ip, parsed.main_process_port) == ("node7", 25678)
        assert (parsed.config_file, parsed.multi_gpu, parsed.module) == (config, config is None, True)
        assert parsed.training_script == "trainers.cli"
        assert parsed.training_script_args == ["train", "my recipe.yaml", "--dry-run"]
