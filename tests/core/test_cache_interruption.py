"""Teacher cache built by several processes: nothing is computed twice, and whoever is killed, the bytes are the same."""

import errno
import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kdlib.cache import CacheError, TeacherCache, verify_cache
from kdlib.cache.writer import Writer

# Forks from one process that has torch loaded and no threads: a start costs milliseconds, so that many can be killed.
SCRIPT = """
    import json, os, random, signal, sys, time, torch
    from torch import nn
    from kdlib.cache import TeacherCache

    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Linear(3, 6).eval()

    class Slow(nn.Module):
        fingerprint = "slow"
        def forward(self, x):
            time.sleep(0.01)  # 50 batches, half a second: however fast the machine, the first deaths come before the end
            return {"map": net(x).reshape(-1, 2, 3), "embedding": net(x).abs()}

    def build(path, shared, log=None):
        def fetch(samples, view):
            if log is not None:
                with open(log, "a") as file:
                    file.write(f"{samples.tolist()} {view}\\n")
            return samples[:, None].float().expand(-1, 3) * (1 - 2 * view)
        TeacherCache.build(
            path, Slow(), fetch, samples=range(5, 600, 3), views=2, dtype="int8", batch_size=8,
            sync_seconds=0.01, shard_bytes=700, shared=shared, prefetch=1 if shared else 0)

    def start(*arguments):
        child = os.fork()
        if child == 0:
            build(*arguments)
            os._exit(0)
        return child

    def ended(children):
        return {child: os.waitpid(child, 0)[1] for child in children}

    folder = sys.argv[1]
    build(f"{folder}/whole", False)
    assert set(ended([start(f"{folder}/two", True, f"{folder}/log{n}") for n in range(2)]).values()) == {0}
    moments, kills = random.Random(0), {}
    for name, writers in (("one", 1), ("pair", 2), ("three", 3)):
        kills[name] = 0
        for number in range(400):  # each dies at a moment of its own, ever later, until one gets to the end before
            children = [start(f"{folder}/{name}", writers > 1) for _ in range(writers)]
            latest = 0.11 + 0.005 * number
            ends = sorted(time.monotonic() + moments.uniform(0.01, latest) for _ in children)
            for child, end in zip(children, ends):
                time.sleep(max(0, end - time.monotonic()))
                os.kill(child, signal.SIGKILL)
            states = set(ended(children).values())
            assert states <= {0, signal.SIGKILL}, states
            kills[name] += len(children) if 0 not in states else 0
            if 0 in states:
                break
    kills["left"] = 0
    for number in range(4):  # one dies, the other must take over what it held
        first, second = start(f"{folder}/left{number}", True), start(f"{folder}/left{number}", True)
        time.sleep(moments.uniform(0.01, 0.15))  # two need a quarter of a second at least
        os.kill(moments.choice([first, second]), signal.SIGKILL)
        states = sorted(ended([first, second]).values())
        assert states in ([0, 0], [0, signal.SIGKILL]), states
        kills["left"] += states[1] == signal.SIGKILL
    print(json.dumps(kills))
"""


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def test_killed_at_random_moments_and_built_by_several_the_bytes_are_the_same(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, check=False, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout)
    assert kills["one"] >= 3
    assert kills["pair"] + kills["three"] >= 6
    assert kills["left"] >= 2
    whole = contents(tmp_path / "whole")
    assert len(whole) == 3 + 12
    for name in ("two", "one", "pair", "three", "left0", "left1", "left2", "left3"):
        assert contents(tmp_path / name) == whole, name
    # Two that were not killed have shared the work, and done nothing twice.
    logs = [(tmp_path / f"log{n}").read_text().splitlines() for n in range(2)]
    assert all(len(log) > 5 for log in logs)
    assert len(logs[0]) + len(logs[1]) == len({*logs[0], *logs[1]}) == 50
    assert verify_cache(TeacherCache.open(tmp_path / "pair")).rows == 398


class Says(nn.Module):
    fingerprint = "says"

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"embedding": x}


def fetch(samples: Tensor, view: int) -> Tensor:
    return torch.stack([samples.float(), samples.float() + view + 1], 1)


def test_who_shares_and_who_does_not_keep_apart(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    inside, leave = threading.Event(), threading.Event()

    def waits(samples: Tensor, view: int) -> Tensor:
        inside.set()
        assert leave.wait(60)
        return fetch(samples, view)

    first = threading.Thread(target=TeacherCache.build, args=(path, Says(), waits), kwargs={"samples": 4})
    first.start()
    assert inside.wait(60)
    with pytest.raises(CacheError, match="another thread of this process"):
        TeacherCache.build(path, Says(), fetch, samples=4, shared=True)
    leave.set()
    first.join()
    assert TeacherCache.open(path).read([3])["embedding"].tolist() == [[3, 4]]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX locks")
def test_the_lock_of_another_process_is_respected(tmp_path: Path) -> None:
    import fcntl

    other = os.open(tmp_path, os.O_RDONLY)  # a lock of another opening counts as that of another process
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        for shared in (False, True):
            with pytest.raises(CacheError, match="is being built by another process"):
                TeacherCache.build(tmp_path, Says(), fetch, samples=4, shared=shared)
        fcntl.flock(other, fcntl.LOCK_SH)
        with pytest.raises(
            CacheError, match="by another process; several processes can build it together with shared=True"
        ):
            TeacherCache.build(tmp_path, Says(), fetch, samples=4)
        assert TeacherCache.build(tmp_path, Says(), fetch, samples=4, shared=True).samples == 4
    finally:
        os.close(other)


def test_one_that_joins_with_another_batch_size_keeps_to_the_blocks(tmp_path: Path) -> None:
    seen: list[int] = []

    def stops(samples: Tensor, view: int) -> Tensor:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(samples))
        return fetch(samples, view)

    with pytest.raises(KeyboardInterrupt):
        TeacherCache.build(tmp_path / "a", Says(), stops, samples=22, batch_size=6)
    asked: list[int] = []

    def counts(samples: Tensor, view: int) -> Tensor:
        asked.append(len(samples))
        return fetch(samples, view)

    # What was whole when it stopped is there, though no time for a mark had come.
    TeacherCache.build(tmp_path / "a", Says(), counts, samples=22, batch_size=4)
    assert asked == [4, 2, 4]
    TeacherCache.build(tmp_path / "b", Says(), fetch, samples=22, batch_size=6)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_progress_counts_to_the_end(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    options = {"samples": 10, "views": 2, "batch_size": 4, "progress": lambda *at: told.append(at)}
    TeacherCache.build(tmp_path, Says(), fetch, prefetch=2, **options)
    assert told == [(rows, 20) for rows in (4, 8, 10, 14, 18, 20)]


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_full_disk_is_one_error_and_the_same_build_goes_on(tmp_path: Path, monkeypatch, ahead: int) -> None:
    opened = Writer._open

    class Full:
        def __init__(self, file) -> None:
            self.file = file

        def write(self, data) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name: str):
            return getattr(self.file, name)

    def full(self: Writer, shard: int, path: Path):
        file = opened(self, shard, path)
        if shard == 3:
            file.flush()
            self.files[shard] = file = Full(file)
        return file

    options = {"samples": 20, "batch_size": 2, "dtype": "float32", "shard_bytes": 32, "prefetch": ahead}
    TeacherCache.build(tmp_path / "whole", Says(), fetch, **options)
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_open", full)
        with pytest.raises(
            CacheError, match=r"cannot write .*shard-00003.bin: No space left on device; complete blocks are kept"
        ):
            TeacherCache.build(tmp_path / "part", Says(), fetch, **options)
    with pytest.raises(CacheError, match="of 20 rows"):
        TeacherCache.open(tmp_path / "part")
    TeacherCache.build(tmp_path / "part", Says(), fetch, **options)
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


def test_a_header_that_cannot_be_written_leaves_no_rest(tmp_path: Path, monkeypatch) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("kdlib.cache.layout.os.fsync", full)
        with pytest.raises(CacheError, match="No space left on device"):
            TeacherCache.build(tmp_path, Says(), fetch, samples=4)
    assert not list(tmp_path.glob("*.part"))
    assert not (tmp_path / "header.json").exists()
    assert TeacherCache.build(tmp_path, Says(), fetch, samples=4).samples == 4
