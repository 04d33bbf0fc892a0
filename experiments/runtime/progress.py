"""What a run shows while it works: one progress bar per stage with an ETA, and TensorBoard scalars and images."""

import pathlib
import sys

import tensorboardX
import tqdm


def bar(total, text, start=0):
    """A tqdm bar with ETA on standard error, `start` of `total` done; quiet updates where it is not a terminal."""
    interval = 0.2 if sys.stderr.isatty() else 20.0
    return tqdm.tqdm(total=total, initial=start, desc=text, mininterval=interval, maxinterval=4 * interval, ncols=110)


class Log:
    """TensorBoard event file of one stage, in `folder`/tensorboard/`stage`."""

    def __init__(self, folder, stage):
        self._writer = tensorboardX.SummaryWriter(str(pathlib.Path(folder) / "tensorboard" / stage))

    def scalars(self, step, values):
        """Writes a dict of scalars by name."""
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), step)

    def image(self, step, name, image):
        """Writes an image (H, W) with values in [0, 1]."""
        self._writer.add_image(name, image[None], step)

    def close(self):
        """Writes what is pending and closes the file."""
        self._writer.close()
