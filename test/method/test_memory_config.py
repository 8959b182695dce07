"""Settings of two tiers: bytes in words, half pairs, and what tiers do not serve."""

import dataclasses
import errno
import os

import pytest
import torch
from sgl_psa_kernels.page_tier import TierShape

from sgl_psa.config import ConfigError, PSAConfig
from sgl_psa.config_field import parse_bytes
from sgl_psa.memory import open_pages
from sgl_psa.memory.host_file import HostFile
from sgl_psa.memory.sizes import pool_sizes
from sgl_psa.rule import RequestRule

TIERS = {"device_pool_bytes": "1M", "host_pool_bytes": "8M"}
SHAPE = TierShape(3, 1, 1, 16, 2, 32, torch.bfloat16)
INT8 = SHAPE._replace(host_dtype=torch.int8)
FRAME = 2 * 2 * 16 * 32 * 2
#: Elements, 2 * (32 + 16) exponents, and 32 bytes that align the next one.
RECORD = FRAME // 2 + 96 + 32


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("512M", 512 << 20),
        ("1.5g", 3 << 29),
        ("8GiB", 8 << 30),
        ("2 kb", 2048),
        ("", None),
        ("-1", None),
        ("8X", None),
        ("G", None),
        ("0.3", None),
        ("1e9", None),
    ],
)
def test_bytes(text: str, size: int | None) -> None:
    assert parse_bytes(text) == size


def test_bytes_are_settings() -> None:
    config = PSAConfig.from_sources(
        {"device_pool_bytes": "512M"}, {"host_pool_bytes": 1 << 31}, {"SGL_PSA_HOST_PATH": "/tmp"}
    )
    assert config.device_pool_bytes == 512 << 20 and config.host_pool_bytes == 1 << 31
    assert config.tiered and not PSAConfig().tiered


@pytest.mark.parametrize("value", ["8X", "-1", -1, 1.5, "many", True])
def test_bad_bytes_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^device_pool_bytes=.* or such as 512M"):
        PSAConfig(device_pool_bytes=value, host_pool_bytes="8G")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device_pool_bytes": "1M"}, "set host_pool_bytes too"),
        ({"host_pool_bytes": "1M"}, "set device_pool_bytes too"),
        ({"device_pool_bytes": "2M", "host_pool_bytes": "1M"}, "set host_pool_bytes to 2097152"),
        ({"placement": "even"}, "no effect without device_pool_bytes"),
        ({"pipeline": False}, "no effect without device_pool_bytes"),
        ({"host_path": "/tmp"}, "no effect without device_pool_bytes"),
        ({"host_dtype": "int8"}, "no effect without device_pool_bytes"),
        ({**TIERS, "host_dtype": "int4"}, "expected one of auto, int8"),
        ({**TIERS, "placement": "fifo"}, "expected one of demand, lru, even"),
        ({**TIERS, "audit_rate": 0.1}, "set audit_rate to 0"),
        ({**TIERS, "policy": "swa"}, "set policy to psa"),
        ({**TIERS, "policy": "oracle_top_p"}, "set scorer to two_level and policy to psa"),
        ({**TIERS, "policy": "topk"}, "set scorer to sketch, or"),
        ({**TIERS, "scorer": "hybrid"}, "set scorer to two_level, or"),
        ({**TIERS, "compensate": True}, "drop compensate"),
        ({**TIERS, "stop": "change"}, "set stop to marginal"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_fix(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PSAConfig(**settings)


def test_a_request_may_not_ask_for_what_tiers_do_not_serve() -> None:
    config = PSAConfig(**TIERS)
    assert RequestRule.parse({"psa_policy": "window"}, config).policy == "window"
    with pytest.raises(ConfigError, match="psa_policy='swa': this server keeps K and V on two"):
        RequestRule.parse({"psa_policy": "swa"}, config)
    assert RequestRule.parse({"psa_policy": "swa"}, PSAConfig()).policy == "swa"


def test_sizes_stay_within_their_bytes() -> None:
    config = PSAConfig(device_pool_bytes=10 * FRAME + 1, host_pool_bytes=9 * 3 * FRAME - 1)
    sizes = pool_sizes(config, SHAPE)
    assert (sizes.num_frames, sizes.num_pages, sizes.tokens) == (10, 8, 7 * 16)
    assert sizes.frame_bytes == FRAME
    assert sizes.device_bytes <= config.device_pool_bytes
    assert sizes.host_bytes <= config.host_pool_bytes


def test_no_frame_is_made_that_no_page_fills() -> None:
    config = PSAConfig(device_pool_bytes=26 * FRAME, host_pool_bytes=26 * FRAME)
    sizes = pool_sizes(config, SHAPE)
    assert sizes.num_frames == sizes.num_pages * 3 == 24


def test_tiers_below_one_request_are_refused_with_the_bytes_it_takes() -> None:
    least = 8 * 3 * FRAME  # padding, sink, two recent pages and a group of four
    with pytest.raises(ConfigError, match=rf"host_pool_bytes=.* to {least} or more"):
        config = PSAConfig(device_pool_bytes=FRAME, host_pool_bytes=least - 1)
        pool_sizes(config, SHAPE)
    with pytest.raises(ConfigError, match=rf"device_pool_bytes=.* to {8 * FRAME} or more"):
        config = PSAConfig(device_pool_bytes=8 * FRAME - 1, host_pool_bytes=least)
        pool_sizes(config, SHAPE)


def test_an_int8_host_has_more_pages_of_the_same_bytes() -> None:
    config = PSAConfig(
        device_pool_bytes=10 * FRAME, host_pool_bytes=9 * 3 * FRAME, host_dtype="int8"
    )
    sizes = pool_sizes(config, INT8)
    assert (sizes.num_frames, sizes.frame_bytes, sizes.record_bytes) == (10, FRAME, RECORD)
    assert sizes.num_pages == 9 * FRAME // RECORD == 16
    assert sizes.device_bytes == 10 * FRAME
    assert config.host_pool_bytes - 3 * RECORD < sizes.host_bytes <= config.host_pool_bytes
    all_frames = dataclasses.replace(config, device_pool_bytes=16 * 3 * FRAME)
    assert pool_sizes(all_frames, INT8).num_frames == 16 * 3
    with pytest.raises(ConfigError, match=rf"\(60\) too; set host_pool_bytes to {60 * RECORD}"):
        pool_sizes(dataclasses.replace(config, device_pool_bytes=60 * FRAME), INT8)


@pytest.mark.parametrize(("placement", "frames"), [("demand", 9 * 3 + 8), ("even", 3 * (9 + 8))])
def test_an_arena_that_open_pages_may_fill_is_refused(placement: str, frames: int) -> None:
    """Eight requests and padding have a page each in three layers; eight more frames serve."""
    config = PSAConfig(**TIERS, host_dtype="int8", placement=placement)
    shape = INT8._replace(num_pages=100, num_frames=frames)
    open_pages.check(config, shape, 8)
    open_pages.check(config, SHAPE._replace(num_pages=100, num_frames=24), 99)
    short = shape._replace(num_frames=frames - 1)
    fix = rf"set device_pool_bytes to {frames * FRAME} or more, --max-running-requests to 7 or less"
    with pytest.raises(ConfigError, match=rf"8 requests .* take {frames} .* {fix}, or host_dtype"):
        open_pages.check(config, short, 8)
    open_pages.check(config, short, 7)
    open_pages.check(config, shape._replace(num_pages=9), 4000)  # no more than there are pages


def test_a_host_file_is_allocated_and_leaves_no_name(tmp_path) -> None:
    file = HostFile(str(tmp_path), 1 << 16)
    assert os.fstat(file.fd).st_size == file.num_bytes == 1 << 16
    assert os.pwrite(file.fd, b"x", (1 << 16) - 1) == 1
    assert list(tmp_path.iterdir()) == []
    file.close()
    file.close()


def test_a_host_file_without_help_of_the_file_system_leaves_no_name(tmp_path, monkeypatch) -> None:
    real = os.open

    def refuse(path, flags, *rest, **options):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no")
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    file = HostFile(str(tmp_path), 4096)
    assert os.fstat(file.fd).st_size == 4096 and list(tmp_path.iterdir()) == []
    file.close()


def test_a_host_folder_that_does_not_serve_is_refused_with_the_reason(
    tmp_path, monkeypatch
) -> None:
    with pytest.raises(ConfigError, match=r"No such file.*name a folder that exists"):
        HostFile(str(tmp_path / "none"), 4096)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file: name a folder"):
        HostFile(str(tmp_path / "file"), 4096)
    with pytest.raises(ConfigError, match="/proc"):
        HostFile("/proc", 4096)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    opened = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"no room for host_pool_bytes=4096 .* bytes free"):
        HostFile(str(tmp_path), 4096)
    assert len(os.listdir("/proc/self/fd")) == opened
