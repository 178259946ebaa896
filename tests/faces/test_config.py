"""Configurations: TOML and overrides to dataclasses and back, with the key named in every error. And progress."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdlib_faces._checks import InputError
from kdlib_faces.config import dump_toml, load_config
from kdlib_faces.progress import TrainProgress, progress


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    layers: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Middle:
    inner: Inner = field(default_factory=lambda: Inner(rate=0.5))
    flag: bool = False


@dataclass(frozen=True)
class Config:
    steps: int = 10
    name: str = "a"
    mode: Literal["fast", "slow"] = "fast"
    size: int | None = None
    limit: float | None = 2.0
    path: Path = Path("x")
    pair: tuple[int, str] = (1, "b")
    names: list[str] = field(default_factory=list)
    table: dict[str, float] = field(default_factory=dict)
    middle: Middle = field(default_factory=Middle)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Config: steps must be >= 1, got {self.steps}")


def test_defaults_file_and_overrides_in_that_order(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('steps = 3\nlimit = "none"\n[middle]\nflag = true\n[middle.inner]\nlayers = [4]\n')
    assert load_config(Config) == Config()
    config = load_config(Config, path, ["steps=5", "middle.inner.layers=[7, 8]", "name=quick", "size=2", "limit=1"])
    assert config == Config(
        steps=5, name="quick", size=2, limit=1.0, middle=Middle(flag=True, inner=Inner(rate=0.5, layers=(7, 8)))
    )
    assert isinstance(config.limit, float)
    assert load_config(Config, path).limit is None
    base = Config(steps=99, middle=Middle(inner=Inner(rate=9.0)))
    changed = load_config(Config, None, ["middle.inner.layers=[]"], base=base)
    assert (changed.steps, changed.middle.inner) == (99, Inner(9.0, ()))
    assert load_config(Config, None, {"middle.flag": True, "path": "p/q"}).path == Path("p/q")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("step=3", r"step=3: no setting named 'step'; the nearest are 'steps'"),
        ("middle.inner.rat=3", r"no setting named 'middle.inner.rat'; the nearest are 'middle.inner.rate'"),
        ("rate=3", r"no setting named 'rate'; the nearest are 'middle.inner.rate'"),
        ("middle.rate=3", r"no setting named 'middle.rate'; the nearest are 'middle.inner.rate'"),
        ("inner.layers=[1]", r"no setting named 'inner'; the nearest are 'middle.inner.layers'"),
        (f"steps={'9' * 400}", r"steps must be a whole number, got a number of 1329 bits"),
        (f"steps={'9' * 5000}", r"steps must be a whole number, got 9{77}\.\.\."),
        (f"middle.inner.rate={'9' * 400}", r"rate must be a number, got a number of 1329 bits"),
        ("steps=2.5", r"steps must be a whole number, got 2.5"),
        ("steps=true", r"steps must be a whole number, got true"),
        ("steps=many", r"steps must be a whole number, got many"),
        ("steps=0", r"steps=0: Config: steps must be >= 1, got 0"),
        ("middle.flag=yes", r"middle.flag must be true or false, got yes"),
        ("middle.flag=1", r"middle.flag must be true or false, got 1"),
        ("mode=medium", r"mode must be one of 'fast', 'slow', got medium"),
        ("mode=fa\u2028st", r"mode must be one of 'fast', 'slow', got fa\\u2028st"),
        ("middle=3", r"'middle' is a group of settings, got 3"),
        ("steps.x=3", r"'steps' is a single value without 'x'"),
        ("pair=[1]", r"pair must be a list of 2: a whole number, text"),
        ("middle.inner.layers=[1, 2.5]", r"middle.inner.layers\[1\] must be a whole number, got 2.5"),
        ("names=a", r"names must be a list, each text, got a"),
        ("size=big", r'size must be a whole number or "none", got big'),
        ("table.x=3", r"'table' is a single value"),
        ("steps", r"a setting must be key=value, got 'steps'"),
        ("=3", r"a setting must be key=value"),
    ],
)
def test_wrong_settings(setting, message):
    with pytest.raises(InputError, match=message):
        load_config(Config, None, [setting])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"steps = ", r"c\.toml: not TOML"),
        (b"stops = 3", r"c\.toml: no setting named 'stops'; the nearest are 'steps'"),
        (b"[middle]\nflag = 3", r"c\.toml: middle\.flag must be true or false, got 3"),
        (b"steps = -1", r"c\.toml: Config: steps must be >= 1"),
        (b"name = '\xff'", r"c\.toml: not UTF-8"),
        (b"a = " + b"[" * 5000, r"c\.toml: tables or lists are nested too deeply"),
        (b"a." * 20_000 + b"b = 1", r"c\.toml: not TOML: a key has more than 32 parts"),
        (b"[" + b"'a' . " * 7_000 + b"b]", r"c\.toml: not TOML: a key has more than 32 parts"),
        (b"x = {" + b"a." * 20_000 + b"b = 1}", r"c\.toml: not TOML: a key has more than 32 parts"),
        (b"steps = " + b"9" * 5000, r"c\.toml: not TOML: a number has too many digits"),
        (b"steps = 0x" + b"f" * 5000, r"c\.toml: steps must be a whole number, got a number of 20000 bits"),
        (b"a" * 5000 + b" = 1", r"c\.toml: no setting named 'a{77}\.\.\.'"),
        (b"#" * 1_000_001, r"at most 1,000,000 bytes"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    path = tmp_path / "c.toml"
    path.write_bytes(text)
    with pytest.raises(InputError, match=message):
        load_config(Config, path)
    with pytest.raises(InputError, match="configuration not found"):
        load_config(Config, tmp_path / "no.toml")


@given(
    st.builds(
        Config,
        steps=st.integers(1, 2**62),
        name=st.text(st.characters(exclude_categories=["Cs"])),
        size=st.none() | st.integers(-5, 5),
        limit=st.none() | st.floats(allow_nan=False),
        names=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=3),
        table=st.dictionaries(st.text('ab ."', max_size=3), st.floats(allow_nan=False), max_size=3),
        middle=st.builds(Middle, inner=st.builds(Inner, rate=st.floats(allow_nan=False, width=32))),
    )
)
def test_what_is_dumped_is_read_back(config: Any):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.toml"
        path.write_bytes(dump_toml(config).encode())
        assert load_config(Config, path) == config


def test_progress_off_a_terminal_is_an_occasional_line():
    out = io.StringIO()
    assert list(progress(range(3), "faces", stream=out, every=0.0)) == [0, 1, 2]
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("faces: 2 of 3, ")
    for quiet, every in ((True, 0.0), (False, 60.0)):
        out = io.StringIO()
        assert list(progress(iter("ab"), "faces", stream=out, every=every, quiet=quiet)) == ["a", "b"]
        assert out.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_training_hook_shows_the_loss():
    for stream in (io.StringIO(), Terminal()):
        hook = TrainProgress("student", stream=stream, every=0.0)
        for step in (1, 2):
            speed = {"images_per_second": 1234.5, "step_seconds": 0.02, "data_wait": 0.25, "memory": 3 * 2**29}
            hook(SimpleNamespace(step=step, total_steps=2, total=0.25, **speed))
        shown = stream.getvalue()
        assert "student" in shown
        assert "loss 0.25, 1234 images/s, 20 ms/step, 25% waiting for data, 1.5 GiB" in shown
    assert repr(hook) == "TrainProgress('student', quiet=False, every=0.0)"
