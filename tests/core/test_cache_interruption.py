"""Interrupted builds, and builds by several processes."""

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kdlib.cache import CacheError, TeacherCache, verify_cache
from kdlib.cache.writer import Writer

# Builders are forked from one process that has loaded torch, so that starting one takes milliseconds.
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
            time.sleep(0.01)  # 50 batches take half a second at least, so the first interruptions come before the end
            return {"map": net(x).reshape(-1, 2, 3), "embedding": net(x).abs()}

    def build(path, prefetch, log=None):
        def fetch(samples, view):
            if log is not None:
                with open(log, "a") as file:
                    file.write(f"{samples.tolist()} {view}\\n")
            return samples[:, None].float().expand(-1, 3) * (1 - 2 * view)
        TeacherCache.build(
            path, Slow(), fetch, samples=range(5, 600, 3), views=2, dtype="int8", batch_size=8,
            sync_seconds=0.01, shard_bytes=700, prefetch=prefetch)

    def start(*arguments):
        child = os.fork()
        if child == 0:
            build(*arguments)
            os._exit(0)
        return child

    def ended(children):
        return {child: os.waitpid(child, 0)[1] for child in children}

    folder = sys.argv[1]
    build(f"{folder}/whole", 0)
    assert set(ended([start(f"{folder}/two", 1, f"{folder}/log{n}") for n in range(2)]).values()) == {0}
    times, interrupted = random.Random(0), {}
    for name, writers in (("one", 1), ("pair", 2), ("three", 3)):
        interrupted[name] = 0
        for number in range(400):  # interrupt each at a random time, later in each round, until one completes the cache
            children = [start(f"{folder}/{name}", int(writers > 1)) for _ in range(writers)]
            latest = 0.11 + 0.005 * number
            ends = sorted(time.monotonic() + times.uniform(0.01, latest) for _ in children)
            for child, end in zip(children, ends):
                time.sleep(max(0, end - time.monotonic()))
                os.kill(child, signal.SIGKILL)
            states = set(ended(children).values())
            assert states <= {0, signal.SIGKILL}, states
            interrupted[name] += len(children) if 0 not in states else 0
            if 0 in states:
                break
    interrupted["left"] = 0
    for number in range(4):  # one is interrupted, and the other must take over its blocks
        first, second = (start(f"{folder}/left{number}", 1) for _ in range(2))
        time.sleep(times.uniform(0.01, 0.15))  # two processes need a quarter of a second at least
        os.kill(times.choice([first, second]), signal.SIGKILL)
        states = sorted(ended([first, second]).values())
        assert states in ([0, 0], [0, signal.SIGKILL]), states
        interrupted["left"] += states[1] == signal.SIGKILL
    print(json.dumps(interrupted))
"""


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def test_interrupted_and_shared_builds_give_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, check=False, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    interrupted = json.loads(done.stdout)
    assert interrupted["one"] >= 3
    assert interrupted["pair"] + interrupted["three"] >= 6
    assert interrupted["left"] >= 2
    whole = contents(tmp_path / "whole")
    assert len(whole) == 3 + 12
    for name in ("two", "one", "pair", "three", "left0", "left1", "left2", "left3"):
        assert contents(tmp_path / name) == whole, name
    # Two uninterrupted processes share the work without computing a block twice.
    logs = [(tmp_path / f"log{n}").read_text().splitlines() for n in range(2)]
    assert all(len(log) > 5 for log in logs)
    assert len(logs[0]) + len(logs[1]) == len({*logs[0], *logs[1]}) == 50
    assert verify_cache(TeacherCache.open(tmp_path / "pair")).rows == 398


class Passthrough(nn.Module):
    fingerprint = "passthrough"

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"embedding": x}


def fetch(samples: Tensor, view: int) -> Tensor:
    return torch.stack([samples.float(), samples.float() + view + 1], 1)


def test_a_second_build_in_the_same_process_is_refused(tmp_path: Path) -> None:
    def nested(samples: Tensor, view: int) -> Tensor:
        with pytest.raises(CacheError, match="is being built by another thread of this process"):
            TeacherCache.build(tmp_path, Passthrough(), fetch, samples=4)
        return fetch(samples, view)

    assert TeacherCache.build(tmp_path, Passthrough(), nested, samples=4).read([3])["embedding"].tolist() == [[3, 4]]


def test_a_build_resumes_with_another_batch_size(tmp_path: Path) -> None:
    sizes: list[int] = []

    def interrupted(samples: Tensor, view: int) -> Tensor:
        if len(sizes) == 2:
            raise KeyboardInterrupt
        sizes.append(len(samples))
        return fetch(samples, view)

    with pytest.raises(KeyboardInterrupt):
        TeacherCache.build(tmp_path / "a", Passthrough(), interrupted, samples=22, batch_size=6)
    sizes = [0, 0, 0]
    # Complete blocks are kept although `sync_seconds` had not passed. The others keep their size of 6.
    TeacherCache.build(tmp_path / "a", Passthrough(), interrupted, samples=22, batch_size=4)
    assert sizes[3:] == [4, 2, 4]
    TeacherCache.build(tmp_path / "b", Passthrough(), fetch, samples=22, batch_size=6)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_progress_counts_all_rows(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    options = {"samples": 10, "views": 2, "batch_size": 4, "progress": lambda *at: calls.append(at)}
    TeacherCache.build(tmp_path, Passthrough(), fetch, prefetch=2, **options)
    assert calls == [(rows, 20) for rows in (4, 8, 10, 14, 18, 20)]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_build_resumes_after_a_full_disk(tmp_path: Path, monkeypatch, prefetch: int) -> None:
    class Full:
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        seek = close = lambda *_: 0

    options = {"samples": 20, "batch_size": 2, "dtype": "float32", "shard_bytes": 32, "prefetch": prefetch}
    TeacherCache.build(tmp_path / "whole", Passthrough(), fetch, **options)
    with monkeypatch.context() as patch:
        opened = Writer._open
        patch.setattr(Writer, "_open", lambda self, shard, path: Full() if shard == 3 else opened(self, shard, path))
        with pytest.raises(
            CacheError, match=r"cannot write .*shard-00003.bin: No space left on device; complete blocks are kept"
        ):
            TeacherCache.build(tmp_path / "part", Passthrough(), fetch, **options)
    with pytest.raises(CacheError, match="of 20 rows"):
        TeacherCache.open(tmp_path / "part")
    TeacherCache.build(tmp_path / "part", Passthrough(), fetch, **options)
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


def test_a_failed_header_leaves_no_temporary_file(tmp_path: Path, monkeypatch) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(CacheError, match="No space left on device"):
            TeacherCache.build(tmp_path, Passthrough(), fetch, samples=4)
    assert not list(tmp_path.glob("*.part"))
    assert not (tmp_path / "header.json").exists()
    assert TeacherCache.build(tmp_path, Passthrough(), fetch, samples=4).samples == 4
