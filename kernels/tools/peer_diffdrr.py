"""DiffDRR's trilinear renderer as a process that times itself; `race` runs it under a Python that has DiffDRR.

    python -I kernels/tools/peer_diffdrr.py '{"volume": "volume.npy", ...}'

The settings:
  volume      NPY, (X, Y, Z), 1/mm.
  spacing_mm  side of a voxel.
  matrix      4x4, volume mm from camera mm; the volume's origin is its centre, and the camera looks along +z.
  pixels      height and width of the image.
  focal_px    focal length.
  weights     NPY of the image's size, the cotangent.
  samples     per ray.
  threads     of torch.

It prints one line of JSON when it is ready, then answers each line of its standard input:
  forward     renders; the answer is its seconds.
  both        renders and takes the gradient of <weights, image> to the six numbers of the pose; the answer is its seconds.
  image FILE  writes the image as NPY, rows down and columns to the right; the answer is "written".
"""

import json
import sys
import time


def main() -> None:
    """Reads the settings from the first argument, then answers until standard input ends."""
    settings = json.loads(sys.argv[1])
    # DiffDRR and torch are not dependencies: they are in another Python.
    try:
        import numpy as np
        import torch  # pyright: ignore[reportMissingImports]
        import torchio  # pyright: ignore[reportMissingImports]
        from diffdrr.data import read  # pyright: ignore[reportMissingImports]
        from diffdrr.drr import DRR  # pyright: ignore[reportMissingImports]
        from diffdrr.pose import RigidTransform  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return
    torch.set_num_threads(settings["threads"])
    volume = torch.from_numpy(np.load(settings["volume"]))
    affine = np.diag([settings["spacing_mm"]] * 3 + [1.0])
    affine[:3, 3] = -0.5 * settings["spacing_mm"] * (np.array(volume.shape) - 1)
    subject = read(torchio.ScalarImage(tensor=volume[None], affine=affine), orientation=None, center_volume=False)
    height, width = settings["pixels"]
    # Only the ratio of the two lengths matters; it is the focal length in pixels.
    panel_mm, pixel_mm = 1000.0, 1000.0 / settings["focal_px"]
    drr = DRR(subject, sdd=panel_mm, height=height, width=width, delx=pixel_mm, renderer="trilinear")
    # `read` expects Hounsfield units and maps them to a density of its own; the volume here is an attenuation already.
    drr.density.copy_(volume)
    matrix = torch.tensor(settings["matrix"], dtype=torch.float32)
    rotation, translation = RigidTransform(matrix).convert("axis_angle")
    # With `reverse_x_axis`, on by default, the image is rotated by 180 degrees from rows down and columns to the right.
    weights = torch.from_numpy(np.load(settings["weights"])[::-1, ::-1].copy())

    def render():
        return drr(rotation, translation, parameterization="axis_angle", n_points=settings["samples"])[0, 0]

    def forward():
        with torch.no_grad():
            render()

    def both():
        pose = rotation.requires_grad_(), translation.requires_grad_()
        torch.autograd.grad((render() * weights).sum(), pose)

    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        command, *rest = line.split(maxsplit=1)
        if command == "image":
            with torch.no_grad():
                np.save(rest[0].strip(), render().numpy()[::-1, ::-1])
            print("written", flush=True)
            continue
        run = {"forward": forward, "both": both}[command]
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
