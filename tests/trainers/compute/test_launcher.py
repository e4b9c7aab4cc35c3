"""Which of several processes this one is."""

import pytest

from trainers.compute.launcher import LaunchedProcess, launched_process


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, LaunchedProcess()),
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, LaunchedProcess(2, 4, 0)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, LaunchedProcess(2, 4)),
        ({"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}, LaunchedProcess(9, 16, 1)),
        (
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "5"},
            LaunchedProcess(5, 16, 5),
        ),
        ({"LOCAL_RANK": "3"}, LaunchedProcess()),
    ],
)
def test_the_launcher_says_which_process_this_is(environment, expected):
    assert launched_process(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "RANK is set and WORLD_SIZE is not: accelerate or torchrun sets both"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set and RANK is not"),
        ({"SLURM_PROCID": "1"}, "SLURM_PROCID is set and SLURM_NTASKS is not: Slurm sets both"),
        ({"SLURM_NTASKS": "2"}, "SLURM_NTASKS is set and SLURM_PROCID is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE is 2: the index of a process is from 0 to 1"),
        ({"SLURM_PROCID": "4", "SLURM_NTASKS": "2"}, "SLURM_PROCID is 4 and SLURM_NTASKS is 2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK is 0 and WORLD_SIZE is 0: there is at least one process"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1': it should be a whole number"),
        ({"SLURM_PROCID": "one", "SLURM_NTASKS": "2"}, "SLURM_PROCID is 'one'"),
    ],
)
def test_variables_that_make_no_sense_are_one_error(environment, message):
    with pytest.raises(ValueError, match=message):
        launched_process(environment)


def test_a_batch_script_is_not_a_task_of_srun(caplog):
    """In it Slurm sets the variables too: each text that falls to the other processes would be missing."""
    environment = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    launched_process({**environment, "SLURM_STEP_ID": "0"})
    launched_process({**environment, "SLURM_NTASKS": "1"})
    assert not caplog.records
    assert launched_process(environment) == LaunchedProcess(0, 4)
    assert "number 0 of 4, and srun did not start it" in caplog.text
