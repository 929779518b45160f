# SPDX-License-Identifier: LGPL-2.1-or-later
"""Settings: what is written, where it is looked for, and that nothing written wrong does any harm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from watcher.settings import config, syntax
from watcher.settings.config import ServiceSettings, Settings


def watcher(text: str) -> tuple[Settings, list[str]]:
    settings, remarks = config.watcher_settings(syntax.parse(text, "/f").assignments)
    return settings, [f"{r.path} {r.text}" for r in remarks]


def service(text: str) -> tuple[ServiceSettings, list[str]]:
    settings, remarks = config.service_settings(
        syntax.parse(text, "/f").assignments, lambda t: t.replace("%n", "x")
    )
    return settings, [f"{r.path} {r.text}" for r in remarks]


def test_nothing_written_gives_the_defaults() -> None:
    assert watcher("") == (Settings(), [])
    assert service("[Service]\nReload=x\nExtensionImages=/x\n") == (ServiceSettings(), [])


def test_the_watchers_settings() -> None:
    text = """[Watcher]
        SettleSec=0
        SettleMaxSec=1min
        SettleTreeSec=3s
        SettleTreeMaxSec=1h
        RemoveSec=0
        ScrubSec=2w 1d
        StoreMax=2G
        ImageMax=64M
        KeepStacks=5
        HistoryMax=7
        ReloadLimitBurst=0
        ReloadLimitIntervalSec=3s
        LogLevel=debug
    """
    expected = Settings(
        settle_usec=0,
        settle_max_usec=60_000_000,
        settle_tree_usec=3_000_000,
        settle_tree_max_usec=3_600_000_000,
        remove_usec=0,
        scrub_usec=15 * 86_400_000_000,
        store_max=2 << 30,
        image_max=64 << 20,
        keep_stacks=5,
        history_max=7,
        reload_limit_burst=0,
        reload_limit_interval_usec=3_000_000,
        log_level="debug",
    )
    assert watcher(text) == (expected, [])


def test_the_settings_of_a_service() -> None:
    text = """[X-Confext]
        Reload=signal:hup
        Check=/usr/sbin/nginx -t
        Check=/bin/check %n "a b"
        ReloadSec=1min
        ReloadErrors=fail
        CheckSec=5s
        HealthCheck=/bin/answers
        HealthCheckSec=1s
        HealthStableSec=500ms
        HealthWatchSec=2s
        BaseChanged=reload
        Rollback=no
        Rollout=rolling
        RolloutParallel=2
        SettleSec=250ms
        SettleTreeSec=1s
        RemoveSec=1min
        ImagePolicy=signed
        Enabled=no
    """
    expected = ServiceSettings(
        reload="signal:SIGHUP",
        check=("/usr/sbin/nginx -t", '/bin/check x "a b"'),
        reload_usec=60_000_000,
        reload_errors="fail",
        check_usec=5_000_000,
        health_check=("/bin/answers",),
        health_check_usec=1_000_000,
        health_stable_usec=500_000,
        health_watch_usec=2_000_000,
        base_changed="reload",
        rollback=False,
        rollout="rolling",
        rollout_parallel=2,
        settle_usec=250_000,
        settle_tree_usec=1_000_000,
        remove_usec=60_000_000,
        image_policy="signed",
        enabled=False,
    )
    assert service(text) == (expected, [])


def test_later_wins_and_empty_goes_back_to_the_default() -> None:
    settings, remarks = service(
        "[X-Confext]\nCheck=/a\nCheck=\nCheck=/b\nReload=none\nReload=\nEnabled=no\nEnabled=yes\n"
    )
    assert (settings, remarks) == (ServiceSettings(check=("/b",)), [])


def test_an_unknown_key_or_a_bad_value_is_told_and_changes_nothing_else() -> None:
    settings, remarks = watcher(
        "[Watcher]\nSettleSec=soon\nSetleSec=1\nImageMax=1G2\nKeepStacks=0\nX-Mine=1\nHistoryMax=9"
    )
    assert settings == Settings(image_max=(1 << 30) + 2, history_max=9)
    assert remarks == [
        "/f:2 ignored: SettleSec= is not a time span, such as 5s or 1min 30s: soon",
        "/f:3 ignored: SetleSec= is not known in [Watcher]",
        "/f:5 ignored: KeepStacks= is not a number from 1 on: 0",
    ]


def test_an_unknown_section_is_told() -> None:
    assert watcher("[Watcher]\n[Wacher]\nSettleSec=0\n[X-Mine]\nA=1\n") == (
        Settings(),
        ["/f:3 ignored: the section [Wacher] is not known"],
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("Reload=maybe", "not auto, unit, signal:SIGNAL, restart, reload-or-restart or none: maybe"),
        ("Reload=signal:", "not auto, unit, signal:SIGNAL, restart, reload-or-restart or none: signal:"),
        ("Reload=signal:NOPE", "not a signal: NOPE"),
        ("Reload=signal:99", "not a signal: 99"),
        ("Rollout=slow", "not parallel or rolling: slow"),
        ("Check='/bin/x", "a quote that is not closed: '/bin/x"),
        ("ReloadSec=0", "no time at all: 0"),
        ("BaseChanged=no", "not refresh, reload or ignore: no"),
        ("Rollback=si", "not yes or no: si"),
    ],
)
def test_bad_values_of_a_service(line: str, reason: str) -> None:
    key = line.partition("=")[0]
    assert service(f"[X-Confext]\n{line}\n") == (ServiceSettings(), [f"/f:2 ignored: {key}= is {reason}"])


def test_directories_as_systemd_sets_them() -> None:
    environment = {
        "RUNTIME_DIRECTORY": "/run/a:/run/b",
        "STATE_DIRECTORY": "/var/a/",
        "XDG_CONFIG_HOME": "/x",
    }
    assert config.directories(environment, root=True) == {
        "runtime_directory": "/run/a",
        "state_directory": "/var/a",
        "configuration_directory": "/etc/confext-watcher",
    }


def test_directories_of_a_person() -> None:
    assert config.directories({"HOME": "/home/me", "XDG_RUNTIME_DIR": "/run/user/7"}, root=False) == {
        "runtime_directory": "/run/user/7/confext-watcher",
        "state_directory": "/home/me/.local/state/confext-watcher",
        "configuration_directory": "/home/me/.config/confext-watcher",
    }
    environment = {"XDG_STATE_HOME": "/s", "XDG_CONFIG_HOME": "/c"}
    assert config.directories(environment, root=False) == {
        "runtime_directory": "/s/confext-watcher/run",
        "state_directory": "/s/confext-watcher",
        "configuration_directory": "/c/confext-watcher",
    }


def test_root_of_a_user_namespace_alone_has_a_persons_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != ("/run", os.W_OK))
    settings, _ = config.load({"HOME": "/home/me", "XDG_RUNTIME_DIR": "/run/user/7"})
    assert settings.runtime_directory == "/run/user/7/confext-watcher"
    assert settings.state_directory == "/home/me/.local/state/confext-watcher"


def test_the_file_of_the_first_place_and_the_drop_ins_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    etc, usr = tmp_path / "etc", tmp_path / "usr"
    monkeypatch.setattr(config, "_VENDOR_DIRECTORIES", (str(usr),))
    for place in (etc, usr):
        (place / "watcher.conf.d").mkdir(parents=True)
    (usr / "watcher.conf").write_text("[Watcher]\nKeepStacks=9\nHistoryMax=9\n")
    (usr / "watcher.conf.d/10-a.conf").write_text("[Watcher]\nSettleSec=1\nHistoryMax=2\n")
    (usr / "watcher.conf.d/20-b.conf").write_text("[Watcher]\nHistoryMax=8\n")
    environment = {"CONFIGURATION_DIRECTORY": str(etc), "STATE_DIRECTORY": "/s", "RUNTIME_DIRECTORY": "/r"}

    settings, _ = config.load(environment)
    assert (settings.keep_stacks, settings.settle_usec, settings.history_max) == (9, 1_000_000, 8)
    assert (settings.configuration_directory, settings.state_directory) == (str(etc), "/s")

    (etc / "watcher.conf").write_text("[Watcher]\nKeepStacks=7\nnonsense\n")
    (etc / "watcher.conf.d/10-a.conf").write_text("[Watcher]\nSettleSec=2\n")
    (etc / "watcher.conf.d/20-b.conf").symlink_to("/dev/null")
    settings, remarks = config.load(environment)
    assert (settings.keep_stacks, settings.history_max) == (7, 10_000)
    assert settings.settle_usec == 2_000_000
    assert [r.path for r in remarks] == [f"{etc}/watcher.conf:3"]


def test_no_file_at_all(tmp_path: Path) -> None:
    settings, remarks = config.load({"CONFIGURATION_DIRECTORY": str(tmp_path)}, root=True)
    assert settings == Settings(configuration_directory=str(tmp_path))
    assert remarks == ()


def test_trusted_users_add_up_until_an_empty_value() -> None:
    settings, remarks = service(
        "[X-Confext]\nTrustedUsers=forgotten\nTrustedUsers=\nTrustedUsers=deploy 1001\n"
        "TrustedUsers=first.last@example.org\nTrustedUsers=a:b\nTrustedGroups=www"
    )
    assert settings.trusted_users == ("deploy", "1001", "first.last@example.org")
    assert settings.trusted_groups == ("www",)
    assert remarks == ["/f:6 ignored: TrustedUsers= is not the name of a user or group: a:b"]


def test_what_is_written_is_told_with_its_place_as_far_as_it_counts() -> None:
    text = """[X-Confext]
        Check=/a
        Check=/b %n
        Reload=restart
        Reload=none
        CheckSec=soon
        HealthCheck=/c
        HealthCheck=
    """
    written = [(one.key, one.value, one.source) for one in service(text)[0].written]
    assert written == [("Check", "/a", "/f:2"), ("Check", "/b %n", "/f:3"), ("Reload", "none", "/f:5")]
