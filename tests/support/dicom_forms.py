"""X-rays of clinical size in every form that DICOM files have, for tests that read them."""

import io

import numpy as np
import pydicom
import xray_files
from pydicom.uid import ExplicitVRLittleEndian

KINDS = {8: np.uint8, 16: np.uint16}


def body(shape, bits=12, seed=0):
    """A smooth image of `bits` bits with a little noise, as a panel gives it: air above, tissue below."""
    v, u = np.mgrid[: shape[0], : shape[1]] / np.array(shape)[:, None, None]
    line = 0.2 + 3.0 * np.exp(-(((u - 0.5 - 0.05 * seed) / 0.25) ** 2)) * (0.6 + 0.4 * v) + 0.1 * np.sin(30 * u * v)
    counts = (2**bits - 1) * 0.9 * np.exp(-line)
    counts += np.random.default_rng(seed).normal(0, np.sqrt(counts))
    return np.clip(np.rint(counts), 1, 2**bits - 2).astype(KINDS[8 if bits == 8 else 16])


def header(images, bits=12, **tags):
    """The data set of uncompressed images (one, or a list of frames), with changed tags; a tag of None is left out."""
    images = images if isinstance(images, list) else [images]
    frames = {"NumberOfFrames": len(images)} if len(images) > 1 else {}
    allocated = images[0].dtype.itemsize * 8
    data = b"".join(image.tobytes() for image in images)
    data = xray_files.dicom(
        ExplicitVRLittleEndian,
        Rows=images[0].shape[0],
        Columns=images[0].shape[1],
        BitsAllocated=allocated,
        BitsStored=bits,
        HighBit=bits - 1,
        PixelData=data + b"\0" * (len(data) % 2),
        **frames,
        **tags,
    )
    return pydicom.dcmread(io.BytesIO(data))


def saved(path, dataset, syntax=ExplicitVRLittleEndian, vr=None, whole=True):
    """Writes a data set in a transfer syntax; `vr` of its pixels; without preamble and meta group if not `whole`."""
    dataset.file_meta.TransferSyntaxUID = syntax
    if vr:
        dataset["PixelData"].VR = vr
    if syntax == pydicom.uid.ExplicitVRBigEndian:
        element, allocated = dataset["PixelData"], dataset.BitsAllocated
        if allocated == 16 or element.VR == "OW":  # pydicom writes these bytes as they are
            element.value = np.frombuffer(element.value, np.uint16).byteswap().tobytes()
    order = {"implicit_vr": syntax.is_implicit_VR, "little_endian": syntax.is_little_endian}
    if whole:
        pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    else:
        bare = pydicom.Dataset(dataset)
        pydicom.dcmwrite(path, bare, enforce_file_format=False, **order)
    return path


def compressed(path, source, syntax_name):
    """Compresses a file with GDCM into a transfer syntax, by GDCM's name."""
    import gdcm

    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(source))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax_name)))
    change.SetInput(reader.GetImage())
    assert change.Change(), syntax_name
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return path


def fragmented(path, source, fragments, table=False):
    """Rewrites the pixels of a compressed file as fragments: a list of bytes, or a list of lists, one list for each frame."""
    dataset = pydicom.dcmread(source)
    frames = [frame if isinstance(frame, list) else [frame] for frame in fragments]
    items, offsets, at = [], [], 0
    for frame in frames:
        offsets.append(at)
        for fragment in frame:
            fragment += b"\0" * (len(fragment) % 2)
            items.append(b"\xfe\xff\x00\xe0" + len(fragment).to_bytes(4, "little") + fragment)
            at += 8 + len(fragment)
    entries = b"".join(offset.to_bytes(4, "little") for offset in offsets) if table else b""
    head = b"\xfe\xff\x00\xe0" + len(entries).to_bytes(4, "little") + entries
    dataset.PixelData = head + b"".join(items)
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path, enforce_file_format=True)
    return path


def frames_of(path):
    """The frames of a compressed file, as bytes."""
    dataset = pydicom.dcmread(path)
    count = int(dataset.get("NumberOfFrames", 1))
    return list(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=count))
