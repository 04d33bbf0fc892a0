"""Training by several processes and devices of this machine: the losses of one, and a signal that reaches one of them."""

import shutil
import signal
import time

import numpy as np
import pytest
from trainings import LIMIT_S
from trainings import Running


@pytest.mark.multiprocess
def test_losses_do_not_depend_on_processes_and_devices(tmp_path):
    """At a rate of 1e-5: at 1e-3, each step of an untrained network makes differences of the last digit about ten times larger."""

    def losses(name, devices, processes):
        lines = Running(tmp_path / name, devices=devices, processes=processes).ended()
        return {(stage, step): values for stage, step, *values in lines if stage != "resumed"}

    two, one, alone = losses("two", 2, 2), losses("one", 4, 1), losses("alone", 1, 1)
    assert two.keys() == one.keys() == alone.keys() and len(two) == 27
    for place, (loss, norm) in two.items():
        np.testing.assert_allclose(loss, one[place][0], rtol=1e-5, err_msg=str(place))
        np.testing.assert_allclose(loss, alone[place][0], rtol=1e-4, err_msg=str(place))
        # What a small learning rate would hide in the losses.
        np.testing.assert_allclose(norm, one[place][1], rtol=1e-2, err_msg=str(place))
        np.testing.assert_allclose(norm, alone[place][1], rtol=1e-2, err_msg=str(place))


@pytest.mark.multiprocess
def test_a_signal_to_one_process_saves_both_and_another_number_goes_on(tmp_path):
    """SIGTERM in the middle of an epoch; one process goes on, and ends as a run of two that nobody stopped."""
    flags = "--stage=p1_rec", "--steps=400", "--log_steps=10"
    running = Running(tmp_path / "W", *flags, devices=2, processes=2)
    limit = time.monotonic() + LIMIT_S
    while len(running.lines()) < 3 and time.monotonic() < limit:
        assert not running.stopped(), running.text()[-6000:]
        time.sleep(0.2)
    running.processes[1].send_signal(signal.SIGTERM)
    last = running.ended(128 + signal.SIGTERM)[-1][1]
    checkpoints = tmp_path / "W" / "checkpoints" / "p1_rec"
    saved = max(int(path.name[5:]) for path in checkpoints.glob("step_*"))
    assert last <= saved < 400
    shutil.copytree(tmp_path / "W", tmp_path / "copy")
    two = Running(tmp_path / "W", *flags, devices=2, processes=2).ended()
    one = Running(tmp_path / "copy", *flags).ended()
    assert one[0] == two[0] == ["resumed", saved]
    assert [line[1] for line in one] == [line[1] for line in two] and one[-1][1] == 400
    np.testing.assert_allclose(one[1][2], two[1][2], rtol=1e-3)
    np.testing.assert_allclose(one[-1][2], two[-1][2], rtol=1e-2)
