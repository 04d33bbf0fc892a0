"""The local page's server: who may talk to it, what it opens, and that it registers as `register` does."""

import asyncio
import contextlib
import dataclasses
import http.client
import io
import json
import pathlib
import threading
import time
import urllib.parse
import zipfile

import numpy as np
import page_files
import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

from data_pipelines import cases
from data_pipelines.ct.scans import Scan
from data_pipelines.io import files
from data_pipelines.xrays import radiograph
from experiments.patients import one_acquisition
from experiments.patients import registering
from experiments.patients.workdir import load
from experiments.patients.workdir import ScanDigests
from experiments.patients.workdir import Target
from experiments.patients.workdir import target_of
from experiments.serving import access
from experiments.serving import server
from experiments.serving import sessions
from experiments.serving import slices
from experiments.serving import user_files
from experiments.serving.sessions import Inputs
from experiments.serving.sessions import Session
from radgs_jax import errors
from radgs_jax.geometry import rigid_host
from radgs_jax.registration import confidence


class Client:
    """Talks to a server of the page, as the page does unless a test says otherwise."""

    def __init__(self, url):
        parts = urllib.parse.urlsplit(url)
        self.port, self.token = parts.port, urllib.parse.parse_qs(parts.query)["token"][0]

    def ask(self, path, method="GET", body=None, headers=None):
        """(status, headers, content) of a request; a header of None is left out."""
        given = {"Host": f"127.0.0.1:{self.port}", access.TOKEN_HEADER: self.token} | (headers or {})
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.putrequest(method, path, skip_host=True)
        body = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        if body is not None:
            given["Content-Length"] = str(len(body))
        for name, value in given.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        return response.status, response.headers, response.read()

    def json(self, path, method="GET", body=None):
        status, _, content = self.ask(path, method, body)
        return status, json.loads(content)

    def wait(self):
        """The state when nothing is being done any more."""
        end = time.monotonic() + 300
        while time.monotonic() < end:
            state = self.json("/api/state")[1]
            if not state["busy"]:
                return state
            time.sleep(0.05)
        raise TimeoutError(state)


@contextlib.contextmanager
def _served(session, workdir, folder):
    started, found = threading.Event(), {}

    def ready(url, running):
        found.update(url=url, server=running)
        started.set()

    thread = threading.Thread(target=server.serve, args=(session, workdir, folder, 0, ready))
    thread.start()
    assert started.wait(30)
    try:
        yield Client(found["url"]), found["server"]
    finally:
        found["server"].should_exit = True
        thread.join()


@pytest.fixture
def client(tmp_path):
    """Of a server with nothing loaded; `tmp_path / "start"` is where it was started."""
    (tmp_path / "start" / "deep").mkdir(parents=True)
    (tmp_path / "start" / "a.txt").write_text("a")
    (tmp_path / "secret.txt").write_text("secret")
    with _served(Session(tmp_path / "results"), tmp_path / "work", tmp_path / "start") as (found, _):
        yield found


PATHS = ("/", "/page.js", "/page.css", "/api/state", "/api/files?folder=.", "/api/xrays/0", "/nothing")


def test_every_request_needs_the_token(client):
    for path in PATHS:
        for token in (None, "", "x", client.token[:-1], client.token + "x"):
            assert client.ask(path, headers={access.TOKEN_HEADER: token})[0] == 403, (path, token)
    page = f"/?token={client.token}"
    assert client.ask(page, headers={access.TOKEN_HEADER: None})[0] == 200
    # A page of another origin can make a browser send an address, but no header.
    for path in ("/api/accept", "/api/load", "/api/register", "/api/uploads"):
        status, _, _ = client.ask(f"{path}?token={client.token}", "POST", {}, {access.TOKEN_HEADER: None})
        assert status == 403, path


def test_other_names_and_other_pages_are_refused(client):
    for host in (
        "evil.example",
        f"evil.example:{client.port}",
        "127.0.0.1.evil.example",
        "[::1]",
        "127.0.0.1:x",
        "",
        None,
    ):
        assert client.ask("/", headers={"Host": host})[0] in (400, 403), host
    for host in ("localhost", f"localhost:{client.port}", "127.0.0.1"):
        assert client.ask("/", headers={"Host": host})[0] == 200, host
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{client.port + 1}"):
        assert client.ask("/api/accept", "POST", {}, {"Origin": origin})[0] == 403, origin


def test_nothing_of_other_servers_is_loaded_and_nothing_is_kept(client):
    for path in (*PATHS, "/?token=wrong"):
        _, headers, content = client.ask(path)
        assert headers["Content-Security-Policy"].startswith("default-src 'self'")
        assert headers["Cache-Control"] == "no-store" and headers["Referrer-Policy"] == "no-referrer"
        assert headers["X-Content-Type-Options"] == "nosniff" and "Set-Cookie" not in headers
        assert b"http://" not in content and b"https://" not in content


def test_it_listens_on_this_machine_alone(tmp_path):
    with _served(Session(tmp_path / "r"), tmp_path, tmp_path) as (found, running):
        found.wait()
        assert {s.getsockname()[0] for one in running.servers for s in one.sockets} == {"127.0.0.1"}


def test_files_are_those_of_the_start_folder(client, tmp_path):
    start = tmp_path / "start"
    (start / "out.txt").symlink_to(tmp_path / "secret.txt")
    (start / "up").symlink_to(tmp_path)
    (start / "loop").symlink_to(start / "loop")
    (start / ".hidden").write_text("")
    status, listed = client.json("/api/files?folder=.")
    assert status == 200 and listed["parent"] is None
    assert [(e["path"], e["folder"]) for e in listed["entries"]] == [("deep", True), ("a.txt", False)]
    assert client.json("/api/files?folder=deep")[1]["parent"] == "."
    for bad in ("..", "../", "deep/../..", str(tmp_path), "/", "up", "loop", "%00", "nothing", "a.txt"):
        status, found = client.json(f"/api/files?folder={urllib.parse.quote(bad, safe='%')}")
        assert status == 400 and "wanted" in found["error"] and len(found["error"].splitlines()) == 1, bad
    for bad in ("../secret.txt", "out.txt", "up/secret.txt", str(tmp_path / "secret.txt")):
        status, found = client.json("/api/load", "POST", {"ct": {"path": bad}, "mask": {"path": "a.txt"}, "xrays": []})
        assert status == 400 and "files: path: found" in found["error"], bad
    for bad in ("/../secret.txt", "/page.js/../../access.py", "/..%2fapp.py", "/api/results/../../secret.txt"):
        status, _, content = client.ask(bad)
        assert status in (400, 404) and content != b"secret", bad


def test_uploads_have_plain_names_and_a_limit(client, tmp_path):
    upload = client.json("/api/uploads", "POST")[1]["upload"]
    put = lambda name, data=b"x", of=upload: client.ask(f"/api/uploads/{of}/{name}", "PUT", data)[0]
    for bad in ("..", ".hidden", "..%5cx", "a%5cb", "a%00b", "a%0ab", "c:x", "x" * 300):
        assert put(bad) in (400, 404), bad
    for bad in ("..%2f..%2fx", "%2fetc%2fx"):
        assert put(bad) in (400, 404, 405), bad
    assert put("x", of="nothing") == 400
    assert put("ct.nii.gz", b"data") == 200 and put("ct.nii.gz") == 400
    place = tmp_path / "work" / "uploads" / upload
    assert [(p.name, p.read_bytes()) for p in place.iterdir()] == [("ct.nii.gz", b"data")]

    async def parts():
        for _ in range(3):
            yield b"12345"

    limited = user_files.Uploads(tmp_path / "limited", 12)
    one = limited.new()
    with pytest.raises(errors.InputError, match="more than 12 bytes"):
        asyncio.run(limited.add(one, "big", parts()))
    assert not list((tmp_path / "limited" / one).iterdir())
    with pytest.raises(errors.InputError, match="wanted a file"):
        limited.path(one)


def test_malformed_requests_are_one_line(client):
    for path, body in (
        ("/api/load", b"{"),
        ("/api/load", b"[" * 5000),
        ("/api/load", b"[]"),
        ("/api/load", b" " * 100_000),
        ("/api/load", {"xrays": 3}),
        ("/api/load", {"xrays": [None], "ct": {"path": "a.txt"}, "mask": {"path": "a.txt"}}),
        ("/api/load", {"xrays": [], "air": "x"}),
        ("/api/load", {"xrays": [], "bits": "7.5"}),
        ("/api/load", {"xrays": [], "bits": "inf"}),
        ("/api/load", {"xrays": [], "values": "x"}),
        ("/api/load", {"xrays": [], "camera_sd": "99,99"}),
        ("/api/register", {"label": "L3"}),
        ("/api/register", {"label": 22, "points": None}),
        ("/api/register", {"label": 22, "points": [[1]]}),
        ("/api/accept", {}),
    ):
        status, found = client.json(path, "POST", body)
        assert status == 400 and "wanted" in found["error"] and "\n" not in found["error"], (path, body)
    assert client.json("/api/state")[1]["loaded"] is None


@pytest.fixture(scope="module")
def tiny_patient(trained, tmp_path_factory):
    """(folder with a user's files, centres (u, v) of the vertebra, its label, `Session` arguments) of the tiny trained run."""
    folder = tmp_path_factory.mktemp("start")
    case_file = cases.read(trained[0] / "eval" / "cases.json")
    scene = case_file.scenes[case_file.cases[0].scene]
    target = target_of(case_file.volumes[scene.volume])
    for source, name in ((target.ct, "ct.nii.gz"), (target.mask, "mask.nii.gz")):
        (folder / name).write_bytes(pathlib.Path(source).read_bytes())
    centres = page_files.write_views(folder, case_file, scene, "artic")

    def make_loader(digests, body):
        def prepared(wanted):
            found = load(trained[0] / "p3", wanted, digests)
            fitted_for = confidence.method_digest(found.refine, found.search)
            rule = confidence.AcceptanceRule((0.0,) * 9, (0.0, 0.0), (-3.0, 0.0), 2.0, fitted_for)
            return dataclasses.replace(found, rule=rule)

        return prepared

    return folder, centres, target.label, make_loader


def _load_body(**changes):
    pick = lambda name: {"path": name}
    body = {"ct": pick("ct.nii.gz"), "mask": pick("mask.nii.gz"), "xrays": [pick("ap.npy"), pick("lateral.npy")]}
    return body | {"cameras": pick("cameras.json")} | changes


def test_a_vertebra_is_registered_as_the_command_does_it(tiny_patient, tmp_path):
    folder, centres, label, make_loader = tiny_patient
    session = Session(tmp_path / "work" / "results", make_loader)
    with _served(session, tmp_path / "work", folder) as (client, _):
        # What is wrong with a file is one line, and the page goes on.
        assert client.json("/api/load", "POST", _load_body(cameras={"path": "bad.json"}))[0] == 200
        state = client.wait()
        assert "bad.json" in state["error"] and "\n" not in state["error"] and state["loaded"] is None
        upload = client.json("/api/uploads", "POST")[1]["upload"]
        assert client.ask(f"/api/uploads/{upload}/ap.npy", "PUT", (folder / "ap.npy").read_bytes())[0] == 200
        xrays = [{"upload": upload}, {"path": "lateral.npy"}]
        assert client.json("/api/load", "POST", _load_body(xrays=xrays))[0] == 200
        state = client.wait()
        assert not state["error"] and [view["name"] for view in state["loaded"]["views"]] == ["AP", "lateral"]
        assert label in [level["label"] for level in state["loaded"]["levels"]]
        view, stored = state["loaded"]["views"][0], np.load(folder / "ap.npy")
        sent = np.frombuffer(client.ask("/api/xrays/0")[2], "<u2").reshape(view["height"], view["width"])
        step = (view["high"] - view["low"]) / slices.XRAY_STEPS
        np.testing.assert_allclose(view["low"] + step * sent, stored, atol=step)

        assert client.json("/api/register", "POST", {"label": label, "points": [[-9, 0], [0, 0]]})[0] == 400
        assert client.json("/api/register", "POST", {"label": label, "points": centres})[0] == 200
        state = client.wait()
        result = state["result"]
        assert not state["error"] and result["state"] == "accepted" and "accepted, within" in result["headline"]
        assert result["written"] and all(one["path"].startswith("M") for one in result["outlines"])
        get = lambda file: client.ask(f"/api/results/{result['name']}/{file}")
        pose = json.loads(get("pose.json")[2])
        _assert_as_the_command(pose, tiny_patient, tmp_path / "alone")
        assert pose["verdict"] == f"{result['headline']}; {result['why']}"

        assert client.json("/api/accept", "POST", {})[1]["result"]["reviewed"]
        with zipfile.ZipFile(io.BytesIO(get("result.zip")[2])) as archive:
            names = {name.split("/", 1)[1] for name in archive.namelist()}
        assert {"results.json", "run.json", "review.json", "case/pose.json", "case/report.html"} <= names
        assert get("pose.tfm")[2].startswith(b"#Insight Transform File")
        status, headers, report = get("report.html")
        assert status == 200 and report.startswith(b"<!doctype html>")
        assert "sandbox allow-scripts" in headers["Content-Security-Policy"]
        for other in ("results.json", "..", "case", "axial/61", "axial/x", "up/0"):
            assert get(other)[0] == 404, other
        assert client.ask("/api/results/other/pose.json")[0] == 400
        for plane in slices.PLANES:
            hu = np.frombuffer(get(f"{plane}/0")[2], "<i2")
            assert hu.size == slices.PIXELS**2 and hu.max() > 100 > -500 > hu.min()
    record = files.read_json(tmp_path / "work" / "results" / result["name"] / "run.json")
    assert set(record["inputs"]) == {"xrays", "cameras", "base", "scan"}


def _assert_as_the_command(pose, tiny_patient, out):
    """The pose is that of `register_rows` from the same points."""
    folder, centres, label, make_loader = tiny_patient
    xrays = radiograph.read_views([folder / "ap.npy", folder / "lateral.npy"], folder / "cameras.json")
    prepared = make_loader(ScanDigests(), None)
    target = Target("ct.nii.gz", folder / "ct.nii.gz", folder / "mask.nii.gz", label)
    start = one_acquisition.GivenStart(points=np.round(centres, 12).tolist())
    rows, _ = one_acquisition.rows([target], xrays, prepared, start)
    (result,) = registering.register_rows(rows, prepared, out, pictures=False).results
    np.testing.assert_allclose(pose["world_from_ct"], result["T"], atol=1e-6)
    assert pose["uncertainty_mm"] == pytest.approx(result["uncertainty_mm"], rel=1e-6)


def test_one_job_at_a_time_and_a_fault_does_not_end_the_page(tiny_patient, tmp_path, capsys):
    folder, _, _, _ = tiny_patient
    go, reached = threading.Event(), threading.Event()

    def make_loader(digests, body):
        reached.set()
        go.wait(30)
        raise TypeError("a fault")

    session = Session(tmp_path, make_loader)
    views = (folder / "ap.npy", folder / "lateral.npy")
    inputs = Inputs(folder / "ct.nii.gz", folder / "mask.nii.gz", views, folder / "cameras.json")
    session.load(inputs)
    assert reached.wait(60) and session.state()["job"]["step"].startswith("reading the CT")
    with pytest.raises(sessions.Busy, match="load under way"):
        session.load(inputs)
    go.set()
    session.close()
    state = session.state()
    assert not state["busy"] and state["error"] == "a fault of this program: TypeError: a fault"
    assert "Traceback" in capsys.readouterr().err


def test_slices_show_the_ct_in_the_c_arms_frame():
    """A bright voxel on the patient's left, in front and above is drawn at the right, above, and above."""
    hu = np.full((40, 50, 60), -1000, np.int16)
    voxel = np.array([9, 31, 45])
    hu[tuple(voxel)] = 2000
    ct_from_index = np.diag([2.0, 2.0, 2.0, 1.0])
    ct_from_index[:3, 3] = (-30.0, 7.0, 100.0)
    world_from_ct = rigid_host.matrix([0.1, -0.2, 0.3], (5.0, -6.0, 7.0))
    spot = (world_from_ct @ ct_from_index @ [*voxel, 1.0])[:3]
    offset = np.array([-21.0, 14.0, 28.0])
    found = slices.Slices(Scan("p", hu, np.zeros(hu.shape, np.uint8), ct_from_index), world_from_ct, spot - offset)
    middle = 0.5 * (slices.PIXELS - 1)
    for plane, (along, (column, row)) in slices.PLANES.items():
        image = found.slice(plane, int(offset[along]))
        assert image.shape == (slices.PIXELS, slices.PIXELS) and image.dtype == np.int16
        bright = image.astype(float) + 1000
        v, u = np.mgrid[: slices.PIXELS, : slices.PIXELS]
        seen = [(bright * axis).sum() / bright.sum() for axis in (u, v)]
        wanted = [middle - offset[axis] / slices.PIXEL_MM for axis in (column, row)]
        np.testing.assert_allclose(seen, wanted, atol=0.3)
        assert (found.slice(plane, -slices.REACH) == -1000).all()
