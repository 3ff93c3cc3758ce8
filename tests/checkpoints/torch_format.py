"""Writes PyTorch's file format without PyTorch, sound or broken, for the tests."""

import struct
import zipfile

import numpy as np

from geomjax.checkpoints.torch_pickle import Call, Global, Storage

STORAGES = {
    "float64": "torch.DoubleStorage",
    "float32": "torch.FloatStorage",
    "float16": "torch.HalfStorage",
    "bfloat16": "torch.BFloat16Storage",
    "int64": "torch.LongStorage",
}


def dump(value):
    """A protocol 2 pickle of data, with calls and storages where `value` has them."""
    return b"\x80\x02" + _emit(value) + b"."


def call(name, *args, state=None, items=None):
    made = Call(name, args)
    made.state = state
    made.items = items or {}
    return made


def _emit(value):
    match value:
        case Global(name):
            module, _, attribute = name.rpartition(".")
            return b"c" + f"{module}\n{attribute}\n".encode()
        case Call():
            out = _emit(Global(value.name)) + _emit(value.args) + b"R"
            if value.items:
                out += b"(" + b"".join(
                    _emit(x) for kv in value.items.items() for x in kv
                )
                out += b"u"
            return out if value.state is None else out + _emit(value.state) + b"b"
        case Storage(kind, key, numel):
            return _emit(("storage", Global(kind), key, "cpu", numel)) + b"Q"
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int() if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        case int():
            raw = value.to_bytes(10, "little", signed=True)
            return b"\x8a" + bytes([len(raw)]) + raw
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            raw = value.encode()
            return b"X" + struct.pack("<I", len(raw)) + raw
        case tuple():
            return b"(" + b"".join(map(_emit, value)) + b"t"
        case list():
            return b"](" + b"".join(map(_emit, value)) + b"e"
        case dict():
            return b"}(" + b"".join(_emit(x) for kv in value.items() for x in kv) + b"u"
    raise TypeError(value)


class Archive:
    """A state dict on its way to a file; `package` is where DTensor lives."""

    def __init__(self, package="torch.distributed.tensor"):
        self.storages = {}
        self.package = package

    def tensor(self, array, shape=None, strides=None, offset=0, numel=None):
        """The description of a tensor, whose elements are put into a new storage."""
        key = str(len(self.storages))
        self.storages[key] = array.tobytes()
        steps = [step // array.itemsize for step in array.strides]
        return call(
            "torch._utils._rebuild_tensor_v2",
            Storage(
                STORAGES[array.dtype.name], key, array.size if numel is None else numel
            ),
            offset,
            tuple(array.shape if shape is None else shape),
            tuple(steps if strides is None else strides),
            False,
            call("collections.OrderedDict"),
        )

    def dtensor(self, array, shape, placements, coordinates, mesh=None):
        """The description of a rank's part of a distributed tensor."""
        tensor = self.package
        spec = call(
            f"{tensor}._dtensor_spec.DTensorSpec",
            state={
                "mesh": call(
                    "torch.distributed.device_mesh.DeviceMesh",
                    state={"_coordinate_on_dim": coordinates} if mesh is None else mesh,
                ),
                "placements": tuple(
                    call(f"{tensor}.placement_types.Replicate")
                    if axis is None
                    else call(f"{tensor}.placement_types.Shard", state={"dim": axis})
                    if isinstance(axis, int)
                    else call(f"{tensor}.placement_types.{axis}", state={"dim": 0})
                    for axis in placements
                ),
            },
        )
        cls = Global(f"{tensor}.DTensor")
        return call(
            "torch._tensor._rebuild_from_type_v2",
            Global("torch._utils._rebuild_wrapper_subclass"),
            cls,
            (cls, Global("torch.float32"), tuple(shape), (1,) * len(shape), 0),
            (None, {"_local_tensor": self.tensor(array), "_spec": spec}),
        )

    def save(self, path, root, compression=zipfile.ZIP_STORED, order=b"little"):
        """Writes the file; `root` is a value to pickle, or a pickle."""
        content = root if isinstance(root, bytes) else dump(root)
        with zipfile.ZipFile(path, "w", compression) as file:
            file.writestr("archive/data.pkl", content)
            file.writestr("archive/byteorder", order)
            for key, data in self.storages.items():
                member = zipfile.ZipInfo(f"archive/data/{key}")
                member.compress_type = compression
                # As PyTorch does: a padding field puts the data at a multiple of 64.
                start = file.fp.tell() + 30 + len(member.filename) + 4
                member.extra = struct.pack("<2sH", b"FB", -start % 64).ljust(
                    4 + -start % 64, b"Z"
                )
                file.writestr(member, data)
        return path


def save(path, tensors):
    """Saves arrays as a state dict."""
    archive = Archive()
    items = {name: archive.tensor(np.asarray(array)) for name, array in tensors.items()}
    return archive.save(path, call("collections.OrderedDict", items=items))
