"""Policy files and training states: what is written reads back whole, what is damaged, foreign or hostile is refused in
one line, before anything is created; and so is a command line that no run can have."""

import collections
import copy
import functools
import io
import multiprocessing
import os
import pathlib
import random
import resource
import signal
import struct
import sys
import time
import warnings
import zipfile

import pytest
import torch
from helpers import make_policy_file

import ppd_continuous
import train_teacher

ENV = "InvertedPendulum-v4"
SMALL = ["--num-envs", "2", "--num-steps", "16", "--minibatch-size", "16", "--update-epochs", "1"]
SMALL += ["--total-timesteps", "32", "--eval-episodes", "1", "--env-threads", "1"]
SCRIPTS = {"teach": train_teacher, "distill": ppd_continuous}
by_script = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with a policy file, and a training state of each script."""
    folder = tmp_path_factory.mktemp("start")
    make_policy_file(folder / "policy.pt", ppd_continuous, hidden=[8])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for script in SCRIPTS:
            run(script, command(script, folder))
            (checkpoint,) = folder.glob("runs/*/checkpoint.pt")
            checkpoint.rename(folder / f"{script}.pt")
            checkpoint.parent.rename(folder / f"old-{script}")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return folder


def run(script, arguments):
    SCRIPTS[script].main(SCRIPTS[script].parse_args([str(argument) for argument in arguments]))


def command(script, start, *changes):
    what = ["--env-id", ENV, "--size", "smaller"] if script == "teach" else ["--teacher", start / "policy.pt"]
    return [*what, *SMALL, *changes]


def listing():
    return sorted(pathlib.Path(".").rglob("*"))


def check_refused(capsys, script, arguments, *words):
    """Exit code 2, one line on stderr (a warning would be a second one) that holds the words, nothing created."""
    before = listing()
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as caught, pytest.raises(SystemExit) as stop:
        warnings.simplefilter("always")
        run(script, arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1, lines
    assert len(lines[0]) < 2000
    assert not [str(warning.message) for warning in caught if warning.category is not ResourceWarning]
    for word in words:
        assert word in lines[0]
    assert listing() == before


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def rezipped(data, change=lambda name, record: record, compression=zipfile.ZIP_STORED, extra=()):
    """The archive again, with every record put through `change`."""
    old, file = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
        for name, record in extra:
            new.writestr(name, record, zipfile.ZIP_STORED)
    return file.getvalue()


# --- GOOD FILES ---


def test_round_trip(folder):
    path = make_policy_file("p.pt", ppd_continuous, activation="tanh")
    content = ppd_continuous.read_file(path)
    assert same(content, torch.load(path, weights_only=True))
    actor, critic, return_rms = ppd_continuous.load_policy(content, path, "continuous", [4], 1)
    policy = dict(content, actor=ppd_continuous.plain(actor), critic=ppd_continuous.plain(critic))
    policy |= dict(return_rms=ppd_continuous.plain(return_rms))
    ppd_continuous.save_atomically("q.pt", lambda file: torch.save(policy, file))
    assert same(ppd_continuous.read_file("q.pt"), content)
    again, critic_again, _ = train_teacher.load_policy(train_teacher.read_file("q.pt"), "q.pt", "continuous", [4], 1)
    obs = torch.randn((100, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 20
    assert torch.equal(again.normalize(obs), actor.normalize(obs))
    assert torch.equal(again(actor.normalize(obs))[0], actor(actor.normalize(obs))[0])
    assert torch.equal(critic_again(actor.normalize(obs)), critic(actor.normalize(obs)))
    assert os.listdir() == ["p.pt", "q.pt"] or os.listdir() == ["q.pt", "p.pt"]  # no temporary file stays


def test_student_file_is_a_teacher(folder, start, capsys):
    run("distill", command("distill", start, "--save-path", "s.pt", "--student-size", "smaller"))
    student = ppd_continuous.read_file("s.pt")
    fields = "format suite env_id network actor critic return_rms global_step args score versions"
    assert set(student) == set(fields.split())
    run("distill", ["--teacher", "s.pt", *SMALL])
    (path,) = set(pathlib.Path(".").glob("runs/*/student.pt"))
    assert ppd_continuous.read_file(path)["network"] == student["network"]  # the same as its teacher's
    assert "Traceback" not in capsys.readouterr().err


def test_teacher_where_a_student_would_lie(folder, start):
    """A teacher runs/student.pt is in nobody's way: without --save-path the student goes to the run's own folder."""
    os.mkdir("runs")
    path = make_policy_file("runs/student.pt", ppd_continuous, hidden=[8])
    before = pathlib.Path(path).read_bytes()
    run("distill", ["--teacher", path, *SMALL])
    assert len(list(pathlib.Path("runs").glob("*/student.pt"))) == 1
    assert pathlib.Path(path).read_bytes() == before


def test_other_env_id_with_equal_spaces_warns(folder, start, capsys):
    path = make_policy_file("p.pt", ppd_continuous, env_id="InvertedPendulum-v5", hidden=[8])
    run("distill", ["--teacher", path, "--env-id", ENV, *SMALL])
    warning = "warning: the teacher was trained on InvertedPendulum-v5, not on InvertedPendulum-v4"
    assert warning in capsys.readouterr().err


def test_failure_while_writing_keeps_the_old_file(folder):
    make_policy_file("p.pt", ppd_continuous)
    old = pathlib.Path("p.pt").read_bytes()

    def write(file):
        file.write(b"half")
        raise OSError("no space left on device")

    for module in SCRIPTS.values():
        with pytest.raises(OSError, match="no space"):
            module.save_atomically("p.pt", write)
        assert pathlib.Path("p.pt").read_bytes() == old


def save_for_ever():
    for i in range(1, 10**9):
        content = dict(format=1, i=i, x=torch.full((2_000_000,), float(i)))
        train_teacher.save_atomically("c.pt", functools.partial(torch.save, content))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_kill_while_saving(folder):
    moments, reached = random.Random(0), set()
    for _ in range(4):
        process = multiprocessing.get_context("fork").Process(target=save_for_ever)
        process.start()
        while not os.path.exists("c.pt"):
            time.sleep(0.01)
        time.sleep(0.1 + moments.random())
        process.kill()
        process.join()
        content = train_teacher.read_file("c.pt")
        assert (content["x"] == content["i"]).all()
        reached.add(content["i"])
    assert max(reached) > 1


# --- DAMAGED FILES ---


def outcome(path):
    try:
        return ppd_continuous.read_file(path)
    except SystemExit as stop:
        assert stop.code == 2
        return None


def test_flipped_bits_are_found(folder, start, capsys):
    """In the weights every byte is damaged, elsewhere many; torch alone loads most of that, and with one bit of the
    archive's directory set it loads weights that it has not read."""
    data = (start / "policy.pt").read_bytes()
    content, weights = ppd_continuous.read_file(start / "policy.pt"), set()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        directory, entries = archive.start_dir, archive.infolist()
    flips = [(position, 1 << position % 8) for position in random.Random(0).sample(range(directory), 200)]
    flips += [(position, 1 << position % 8) for position in range(directory, len(data), 3)]
    position = directory
    for entry in entries:
        if "/data/" in entry.filename:
            first = entry.header_offset + 30 + sum(struct.unpack_from("<HH", data, entry.header_offset + 26))
            weights |= set(range(first, first + entry.file_size))
            flips.append((position + 38, 16))  # "a folder", which has no contents
        position += 46 + sum(struct.unpack_from("<HHH", data, position + 28))
    assert len(weights) > 500 and data[position:].startswith(b"PK")
    flips += [(position, 1 << position % 8) for position in weights]
    refused = 0
    for position, bit in flips:
        damaged = bytearray(data)
        damaged[position] ^= bit
        pathlib.Path("d.pt").write_bytes(damaged)
        found = outcome("d.pt")
        refused += found is None
        assert found is None or position not in weights
        assert found is None or same(found, content)  # in padding and headers: refused, or nothing changed
    assert refused > len(weights)


def test_truncated_anywhere(folder, start, capsys):
    data = (start / "policy.pt").read_bytes()
    for length in {*range(0, len(data), 61), *range(len(data) - 30, len(data))}:
        pathlib.Path("d.pt").write_bytes(data[:length])
        assert outcome("d.pt") is None
    check_refused(capsys, "distill", ["--teacher", "d.pt", *SMALL], "d.pt", "damaged")


@pytest.mark.parametrize("kind", ["missing", "folder", "unreadable", "denied", "empty", "text"])
@by_script
def test_no_file_of_ours(folder, start, capsys, monkeypatch, script, kind):
    path = {"missing": "d.pt", "folder": "d", "unreadable": "/proc/self/mem"}.get(kind, "d.pt")
    if kind == "folder":
        os.mkdir(path)
    elif kind not in ("missing", "unreadable"):
        pathlib.Path(path).write_bytes(b"some words\n" * 100 if kind == "text" else b"")
    if kind == "denied":  # chmod does not stop root

        def denied(*_):
            raise PermissionError(13, "Permission denied", path)

        monkeypatch.setattr(SCRIPTS[script], "open", denied, raising=False)
    flag = "--resume" if script == "teach" else "--teacher"
    check_refused(capsys, script, [flag, path] if script == "teach" else [flag, path, *SMALL], path)


# --- HOSTILE FILES ---


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def put(**changes):
    return lambda policy: saved(policy | changes)


def network(**changes):
    return lambda policy: saved(policy | dict(network=policy["network"] | changes))


def weight(name, change, part="actor"):
    def damage(policy):
        policy[part][name] = change(policy[part][name])
        return saved(policy)

    return damage


def without(field, part=None):
    def damage(policy):
        del (policy[part] if part else policy)[field]
        return saved(policy)

    return damage


def filled(value):
    def change(tensor):
        tensor.view(-1)[-1] = value
        return tensor

    return change


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def laughing(depth):
    """A list of 2**depth ones, in a few hundred bytes."""
    value = [1]
    for _ in range(depth):
        value = [value, value]
    return value


def claims_more(policy):
    """Every record of numbers has half the bytes that its tensor needs."""
    return rezipped(saved(policy), lambda name, record: record[: len(record) // 2] if "/data/" in name else record)


def script_module(policy):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(4, 1)), file)
    return file.getvalue()


def two_directories(policy):
    """An archive whose end can be read in two ways: Python's zipfile takes the directory just before it, torch the one
    at the offset that it names. The second lists deflated records, of a policy with another global_step."""

    def parts(data):
        end = data.rfind(b"PK\5\6")
        count, size, offset = struct.unpack("<HII", data[end + 10 : end + 20])
        return data[:offset], data[offset : offset + size], count

    seen = rezipped(saved(policy), extra=[("archive/pad", b"")])
    loaded = rezipped(saved(policy | dict(global_step=666)), compression=8, extra=[("archive/pad", bytes(20_000))])
    (records, directory, count), (loaded_records, loaded_directory, _) = parts(seen), parts(loaded)
    directory, position = bytearray(directory), 0
    for _ in range(count):
        (offset,) = struct.unpack_from("<I", directory, position + 42)
        struct.pack_into("<I", directory, position + 42, len(loaded_records) - len(records) + offset)
        position += 46 + sum(struct.unpack_from("<HHH", directory, position + 28))
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, len(directory), len(loaded_records), 0)
    return loaded_records + loaded_directory + records + bytes(directory) + end


def aliased(policy):
    """Sixty layers that share one storage: each no larger than the file, the student of their size is."""
    size, layers = 200, 60
    shared = torch.ones(size, size)
    weights = {name: tensor for name, tensor in policy["actor"].items() if not name.startswith("mean")}
    for i in range(layers + 1):
        rows, columns = (1 if i == layers else size), (4 if i == 0 else size)
        weights[f"mean.{2 * i}.weight"] = shared.view(-1)[: rows * columns].view(rows, columns)
        weights[f"mean.{2 * i}.bias"] = shared[0, :rows]
    return saved(policy | dict(network=policy["network"] | dict(actor_hidden=[size] * layers), actor=weights))


def doubled_names(policy):
    """Two records of one name: zipfile checks the last, and the first has a byte flipped."""
    file = io.BytesIO(rezipped(saved(policy)))
    with zipfile.ZipFile(file) as archive, warnings.catch_warnings():
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("/data/1"))
        record = archive.read(entry)
        with zipfile.ZipFile(file, "a") as more:
            warnings.simplefilter("ignore")
            more.writestr(entry.filename, record)
    data = bytearray(file.getvalue())
    data[entry.header_offset + 30 + len(entry.filename)] ^= 64
    return bytes(data)


legacy = dict(_use_new_zipfile_serialization=False)
nan = float("nan")
NOT_OURS = "not a file of this project"
HOSTILE = {  # what is wrong: (function of a good policy that returns the bytes of a file, words of the refusal)
    "format 0": (put(format=0), "format"),
    "format 2": (put(format=2), "format"),
    "format text": (put(format="1"), "format"),
    "format True": (put(format=True), "format"),
    "format tensor": (put(format=torch.ones(3, 3)), "format"),
    "format long": (put(format=laughing(20)), "format"),
    "no format": (without("format"), "format"),
    "a list": (lambda policy: saved([policy]), ""),
    "a tensor": (lambda policy: saved(torch.ones(3)), ""),
    "bare state dict": (lambda policy: saved(policy["actor"]), "format"),
    "other suite": (put(suite="atari"), "suite"),
    "suite with a line break": (put(suite="a\nb"), "suite"),
    "no suite": (without("suite"), "suite"),
    "no network": (without("network"), "network"),
    "network is a list": (put(network=[1]), "network"),
    "actor is a list": (put(actor=[1]), "actor"),
    "critic is None": (put(critic=None), "critic"),
    "return_rms is a list": (put(return_rms=[1]), "return_rms"),
    "env_id imports": (put(env_id="antigravity:X-v0"), "env_id"),
    "env_id is a number": (put(env_id=1), "env_id"),
    "other observation shape": (network(obs_shape=[5]), "obs_shape"),
    "pixels": (network(obs_shape=[3, 64, 64]), "obs_shape"),
    "observation shape is a float": (network(obs_shape=[4.0]), "obs_shape"),
    "observation shape is a tensor": (network(obs_shape=[torch.tensor(4)]), "obs_shape"),
    "observation shape is tensors": (network(obs_shape=[torch.ones(2)]), "obs_shape"),
    "other action dimension": (network(action_dim=2), "action_dim"),
    "action dimension is True": (network(action_dim=True), "action_dim"),
    "action dimension is a float": (network(action_dim=1.0), "action_dim"),
    "action dimension is a tensor": (network(action_dim=torch.ones(2)), "action_dim"),
    "action dimension with a line break": (network(action_dim="1\n"), "action_dim"),
    "no action dimension": (lambda p: p["network"].pop("action_dim") and saved(p), "action_dim"),
    "unknown activation": (network(activation="gelu"), "activation"),
    "unknown kind": (network(kind="cnn"), "kind"),
    "huge widths": (network(actor_hidden=[2**19] * 8, critic_hidden=[2**19] * 8), "actor"),
    "absurd width": (network(actor_hidden=[10**18]), "network"),
    "width 0": (network(actor_hidden=[0]), "network"),
    "width -8": (network(critic_hidden=[-8]), "network"),
    "width 8.0": (network(actor_hidden=[8.0]), "network"),
    "width True": (network(actor_hidden=[True]), "network"),
    "thousands of layers": (network(actor_hidden=[8] * 5000), "network"),
    "missing weights": (without("mean.0.weight", "actor"), "actor.mean.0.weight"),
    "missing statistics": (without("obs_rms.var", "actor"), "actor.obs_rms.var"),
    "missing critic bias": (without("value.0.bias", "critic"), "critic.value.0.bias"),
    "unexpected weights": (lambda p: saved(p | dict(actor=p["actor"] | {"x": torch.ones(1)})), "actor.x"),
    "key with a line break": (lambda p: saved(p | dict(actor=p["actor"] | {"x\ny": torch.ones(1)})), "actor.x"),
    "key is a number": (lambda p: saved(p | dict(actor=p["actor"] | {7: torch.ones(1)})), "actor.7"),
    "key is a tuple": (lambda p: saved(p | dict(actor=p["actor"] | {(1, 2): torch.ones(1)})), "actor"),
    "wrong dtype": (weight("mean.0.weight", torch.Tensor.double), "actor.mean.0.weight"),
    "wrong dtype of statistics": (weight("obs_rms.mean", torch.Tensor.float), "actor.obs_rms.mean"),
    "float8": (weight("mean.0.weight", lambda x: x.to(torch.float8_e4m3fn)), NOT_OURS),
    "wrong shape": (weight("mean.0.weight", lambda x: x.T.contiguous()), "actor.mean.0.weight"),
    "a number for a tensor": (weight("mean.0.bias", lambda x: 1.0), "actor.mean.0.bias"),
    "NaN": (weight("mean.0.weight", filled(nan)), "actor.mean.0.weight"),
    "infinity": (weight("value.2.bias", filled(-torch.inf), "critic"), "critic.value.2.bias"),
    "NaN logstd": (weight("logstd", filled(nan)), "actor.logstd"),
    "NaN statistics": (weight("obs_rms.mean", filled(nan)), "actor.obs_rms.mean"),
    "NaN return statistics": (weight("var", filled(nan), "return_rms"), "return_rms.var"),
    "negative variance": (weight("obs_rms.var", filled(-1.0)), "actor.obs_rms.var"),
    "negative return variance": (weight("var", filled(-1.0), "return_rms"), "return_rms.var"),
    "negative clip": (weight("obs_clip", filled(-10.0)), "actor.obs_clip"),
    "meta tensor": (weight("mean.0.weight", lambda x: x.to("meta")), NOT_OURS),
    "sparse tensor": (weight("mean.0.weight", torch.Tensor.to_sparse), NOT_OURS),
    "sparse rows": (weight("mean.0.weight", torch.Tensor.to_sparse_csr), NOT_OURS),
    "quantized": (weight("mean.0.weight", lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)), NOT_OURS),
    "nested tensor": (weight("mean.0.weight", lambda x: torch.nested.nested_tensor([x, x[:1]])), NOT_OURS),
    "Parameter": (weight("mean.0.weight", torch.nn.Parameter), NOT_OURS),
    "leaf that requires grad": (weight("obs_rms.mean", torch.Tensor.requires_grad_), "actor.obs_rms.mean"),
    "OrderedDict": (lambda p: saved(p | dict(actor=collections.OrderedDict(p["actor"]))), "actor"),
    "a set": (put(extra={1}), NOT_OURS),
    "bytes": (put(extra=b"x"), NOT_OURS),
    "a bytearray": (put(extra=bytearray(5)), NOT_OURS),
    "4 GB of stride 0": (put(extra=torch.zeros(1).expand(10**9)), "extra"),
    "weights of stride 0": (weight("mean.0.weight", lambda x: x[:1, :1].expand(8, 4)), "actor.mean.0.weight"),
    "layers that share their weights": (aliased, "more numbers than the file"),
    "a storage short of its claim": (claims_more, "damaged"),
    "deflated": (lambda p: rezipped(saved(p), compression=zipfile.ZIP_DEFLATED), "damaged"),
    "runs code": (put(extra=Call(os.mkdir, "ran")), NOT_OURS),
    "runs code, legacy": (lambda p: saved(p | dict(extra=Call(os.mkdir, "ran")), **legacy), NOT_OURS),
    "runs eval": (put(extra=Call(eval, "open('ran', 'w')")), NOT_OURS),
    "legacy": (lambda p: saved(p, **legacy), NOT_OURS),
    "legacy with an archive behind": (lambda p: saved(p, **legacy) + rezipped(saved([])), NOT_OURS),
    "TorchScript": (script_module, "damaged"),
    "a whole module": (lambda p: saved(torch.nn.Linear(4, 1)), NOT_OURS),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_policy(folder, start, capsys, case):
    damage, word = HOSTILE[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = damage(torch.load(start / "policy.pt", weights_only=True))
    pathlib.Path("d.pt").write_bytes(data)
    check_refused(capsys, "distill", ["--teacher", "d.pt", *SMALL], "d.pt", word)
    assert not os.path.exists("ran")


def test_deep_nesting(folder, start, capsys):
    """Refused or loaded, but no RecursionError and no crash."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10**6)  # for writing it
    data = saved(dict(torch.load(start / "policy.pt", weights_only=True), extra=nested(5000)))
    sys.setrecursionlimit(limit)
    pathlib.Path("d.pt").write_bytes(data)
    content = outcome("d.pt")
    assert content is None or ppd_continuous.load_policy(content, "d.pt", "continuous", [4], 1)


@pytest.mark.parametrize("damage", [two_directories, doubled_names])
def test_archive_that_reads_in_two_ways(folder, start, capsys, damage):
    """Refused, or loaded as it was checked."""
    policy = torch.load(start / "policy.pt", weights_only=True)
    pathlib.Path("d.pt").write_bytes(damage(policy))
    content = outcome("d.pt")
    assert content is None or same(content, policy)


def deflated_bomb(policy):
    file = io.BytesIO(saved(policy))
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data/99", "w") as record:
            for _ in range(600):
                record.write(bytes(2**20))
    return file.getvalue()


BOMBS = {
    "deflated": deflated_bomb,
    "stride 0": put(extra=torch.zeros(1).expand(150_000_000)),
    "bytearray": put(extra=Call(bytearray, 600_000_000)),
    "long key": put(extra={"a" * 2_000_000: dict.fromkeys(range(300), 1)}),
}


@pytest.mark.parametrize("case", BOMBS)
def test_memory_stays_bounded(folder, start, capsys, case):
    pathlib.Path("d.pt").write_bytes(BOMBS[case](torch.load(start / "policy.pt", weights_only=True)))
    assert os.path.getsize("d.pt") < 12_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome("d.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


# --- TRAINING STATES ---


def state(*path, value=None, remove=False):
    """Change the training state at a path of keys."""

    def damage(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value(content.get(path[-1])) if callable(value) else value
        if remove:
            del content[path[-1]]

    return damage


STATES = {
    "missing argument": (state("args", "num_envs", remove=True), "args.num_envs"),
    "unexpected argument": (state("args", "sneaky", value=1), "args.sneaky"),
    "argument of another type": (state("args", "num_envs", value="2"), "num_envs"),
    "env_id is None": (state("args", "env_id"), "env_id"),
    "env_id imports": (state("args", "env_id", value="antigravity:X-v0"), "env_id"),
    "other script": (state("script", value="ppd_atari.py"), "script"),
    "no script": (state("script", remove=True), "script"),
    "no optimizer": (state("optimizer", remove=True), "optimizer"),
    "optimizer of another network": (state("optimizer", value={}), "optimizer"),
    "momentum of another shape": (state("optimizer", 1, "exp_avg", value=torch.zeros(1)), "optimizer"),
    "no step count": (state("optimizer", 1, "step", value=torch.zeros(0)), "optimizer"),
    "generator too short": (state("generator", value=lambda tensor: tensor[:100].clone()), "generator"),
    "generator of floats": (state("generator", value=lambda tensor: tensor.float()), "generator"),
    "NaN weights": (state("policy", "actor", "mean.0.weight", value=filled(nan)), "policy.actor.mean.0.weight"),
    "missing weights": (state("policy", "actor", "mean.0.weight", remove=True), "actor.mean.0.weight"),
    "no progress": (state("progress", remove=True), "progress"),
    "negative step": (state("progress", "global_step", value=-1), "global_step"),
    "NaN seconds": (state("progress", "train_seconds", value=nan), "train_seconds"),
    "returns are words": (state("progress", "last_returns", value=["a"]), "last_returns"),
}


@pytest.mark.parametrize("case", STATES)
@by_script
def test_hostile_training_state(folder, start, capsys, monkeypatch, script, case):
    damage, word = STATES[case]
    content = torch.load(start / f"{script}.pt", weights_only=True)
    damage(content)
    torch.save(content, "checkpoint.pt")

    def step(*_):
        raise AssertionError("training started")

    monkeypatch.setattr(torch.optim.Adam, "step", step)  # with a momentum of another shape it writes out of bounds
    resume = ["--resume", "checkpoint.pt", "--total-timesteps", "64"]
    check_refused(capsys, script, resume, *([] if case.startswith("argument") else ["checkpoint.pt"]), word)


@pytest.mark.parametrize("part", ["missing", "noise", "foreign"])
def test_hostile_teacher_in_a_training_state(folder, start, capsys, part):
    content = torch.load(start / "distill.pt", weights_only=True)
    if part == "missing":
        del content["teacher"]
    elif part == "noise":
        content["teacher"]["actor"]["logstd"][0] = nan
    else:
        content["teacher"]["suite"] = "atari"
    torch.save(content, "checkpoint.pt")
    word = {"missing": "teacher", "noise": "teacher.actor.logstd", "foreign": "suite"}[part]
    check_refused(capsys, "distill", ["--resume", "checkpoint.pt"], "checkpoint.pt", word)


@by_script
def test_file_of_the_other_kind(folder, start, capsys, script):
    policy, own = start / "policy.pt", start / f"{script}.pt"
    other = start / ("distill.pt" if script == "teach" else "teach.pt")
    check_refused(capsys, script, ["--resume", policy], str(policy), "a policy file")
    check_refused(capsys, script, ["--resume", other], str(other), "script")
    check_refused(capsys, "distill", ["--teacher", own, *SMALL], str(own), "a training state")
    check_refused(capsys, script, ["--resume", "."], "checkpoint.pt")


# --- BAD INPUT ---

INPUTS = [  # (which script, arguments, words of the refusal)
    ("both", "--env-id InvertedPendulun-v4", "InvertedPendulum-v4"),
    ("both", "--env-id Nothing-v0", "Nothing-v0"),
    ("distill", "--env-id ALE/Pong-v5", "ALE/Pong-v5"),
    ("distill", "--env-id PongNoFrameskip-v4", "PongNoFrameskip-v4"),
    ("both", "--env-id CartPole-v1", "CartPole-v1: its action space"),
    ("both", "--env-id FrozenLake-v1", "FrozenLake-v1: its observation space"),
    ("both", "--num-envs 0", "--num-envs 0"),
    ("both", "--num-steps 0", "--num-steps 0"),
    ("both", "--minibatch-size 33", "--minibatch-size 33"),
    ("both", "--minibatch-size 0", "--minibatch-size 0"),
    ("both", "--update-epochs 0", "--update-epochs 0"),
    ("both", "--checkpoint-interval 0", "--checkpoint-interval 0"),
    ("both", "--learning-rate nan", "--learning-rate nan"),
    ("both", "--learning-rate 0", "--learning-rate 0"),
    ("both", "--learning-rate inf", "--learning-rate inf"),
    ("both", "--gamma 1.5", "--gamma 1.5"),
    ("both", "--gae-lambda -1", "--gae-lambda -1"),
    ("both", "--ent-coef nan", "--ent-coef nan"),
    ("both", "--max-grad-norm 0", "--max-grad-norm 0"),
    ("both", "--seed -1", "--seed -1"),
    ("both", "--total-timesteps -1", "--total-timesteps -1"),
    ("both", "--eval-episodes -1", "--eval-episodes -1"),
    ("both", "--eval-interval -1", "--eval-interval -1"),
    ("both", "--eval-interval 32 --eval-episodes 0", "--eval-interval 32"),
    ("both", "--env-threads -1", "--env-threads -1"),
    ("both", "--track", "wandb"),
    ("both", "--save-path there.pt", "there.pt: exists"),
    ("both", "--save-path there", "there"),
    ("both", "--save-path there --overwrite", "there"),
    ("both", "--save-path there.pt/x.pt", "there.pt"),
    ("both", "--save-path locked/x.pt", "locked"),
    ("both", "--save-path link.pt", "link.pt: exists"),
    ("teach", "--total-timesteps 0", "--resume"),
    ("distill", "--distill-lambda -1", "--distill-lambda -1"),
    ("distill", "--distill-lambda-end -0.5", "--distill-lambda-end -0.5"),
    ("distill", "--distill-lambda nan", "--distill-lambda nan"),
    ("distill", "--teacher-noise -1", "--teacher-noise -1"),
    ("distill", "--save-path own.pt --teacher own.pt", "own.pt"),
    ("distill", "--save-path own.pt --teacher own.pt --overwrite", "own.pt: the teacher's own file"),
    ("distill", "--save-path ./there/../own.pt --teacher own.pt --overwrite", "the teacher's own file"),
    ("distill", "--save-path alias.pt --teacher own.pt --overwrite", "the teacher's own file"),
]
INPUTS = [(script, *rest) for which, *rest in INPUTS for script in SCRIPTS if which in ("both", script)]


@pytest.mark.parametrize("script, arguments, word", INPUTS)
def test_bad_input(folder, start, capsys, monkeypatch, script, arguments, word):
    os.mkdir("there")
    pathlib.Path("there.pt").write_text("precious")
    os.symlink("nowhere.pt", "link.pt")
    pathlib.Path("own.pt").write_bytes((start / "policy.pt").read_bytes())
    os.symlink("own.pt", "alias.pt")
    os.mkdir("locked")
    access = os.access  # a folder's mode does not stop root
    monkeypatch.setattr(os, "access", lambda path, mode: not path.endswith("locked") and access(path, mode))
    if "--track" in arguments:
        monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    check_refused(capsys, script, command(script, start, *arguments.split()), word)
    assert pathlib.Path("there.pt").read_text() == "precious"


def test_teacher_is_needed(folder, capsys):
    check_refused(capsys, "distill", ["--env-id", ENV], "--teacher")
    check_refused(capsys, "distill", SMALL, "--teacher")


def test_unknown_env_id_in_a_file(folder, capsys, start):
    policy = torch.load(start / "policy.pt", weights_only=True)
    for env_id in ("NoSuch-v0", "No\nSuch-v0", ""):
        torch.save(dict(policy, env_id=env_id), "d.pt")
        check_refused(capsys, "distill", ["--teacher", "d.pt", *SMALL], "env")


def test_env_id_of_other_spaces(folder, start, capsys):
    check_refused(capsys, "distill", command("distill", start, "--env-id", "Hopper-v4"), "policy.pt", "obs_shape")


@by_script
def test_overwrite(folder, start, script):
    pathlib.Path("there.pt").write_text("old")
    run(script, command(script, start, "--save-path", "there.pt", "--overwrite"))
    assert ppd_continuous.read_file("there.pt")["score"]["episodes"] == 1


@by_script
def test_resume_keeps_a_file_that_it_did_not_write(folder, start, capsys, script):
    """--save-path was free when the run started; meanwhile another file has come there."""
    content = torch.load(start / f"{script}.pt", weights_only=True)
    content["args"]["save_path"] = "mine.pt"
    torch.save(content, "checkpoint.pt")
    other = torch.load(start / "policy.pt", weights_only=True)
    torch.save(other, "mine.pt")
    check_refused(capsys, script, ["--resume", "checkpoint.pt"], "mine.pt: exists")
    torch.save(dict(other, args=copy.deepcopy(content["args"])), "mine.pt")  # as if this run had written it
    run(script, ["--resume", "checkpoint.pt"])
    assert ppd_continuous.read_file("mine.pt")["global_step"] == 32
