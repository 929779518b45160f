# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the next start of a unit gives its processes, as properties of a transient unit.

A command in such a unit sees what a process of that start will see: the same sandbox, user, environment and limits,
made by systemd itself, with another stack on `/etc`. systemd tells each setting as it is to be set again, specifiers
replaced: bus_exec_context_set_transient_property() in src/core/dbus-execute.c (257 and 262).

Not taken over is what would make the command a service: terminals, PAM sessions, priorities, its working directory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from watcher.managers.systemd.sandbox_settings import Again
from watcher.managers.systemd.unit_drop_in import MOUNT_OPTIONS
from watcher.model import Copy, Kind
from watcher.settings import device_mapper, image_policy

Value = tuple[str, Any]
"""A D-Bus signature, and what has that."""

Property = tuple[str, Value]

LIMITS: Final = (
    *("Slice", "MemoryHigh", "MemoryMax", "MemorySwapMax", "TasksMax", "CPUQuotaPerSecUSec", "CPUWeight"),
    *("LimitNOFILE", "LimitNPROC", "LimitAS", "LimitMEMLOCK"),
)
"""What the service's control group and processes may use."""

_USER: Final = ("User", "Group", "SupplementaryGroups", "DynamicUser", "UMask", "KeyringMode")
_ENVIRONMENT: Final = (
    *("Environment", "EnvironmentFiles", "PassEnvironment", "UnsetEnvironment", "ExecSearchPath"),
    *("LoadCredential", "LoadCredentialEncrypted", "SetCredential", "SetCredentialEncrypted"),
    "ImportCredential",
)
_RIGHTS: Final = (
    *("CapabilityBoundingSet", "AmbientCapabilities", "NoNewPrivileges", "SecureBits"),
    *("SystemCallFilter", "SystemCallErrorNumber", "SystemCallArchitectures", "Personality"),
    *("LockPersonality", "RestrictAddressFamilies", "RestrictNamespaces", "RestrictFileSystems"),
    *("RestrictRealtime", "RestrictSUIDSGID", "MemoryDenyWriteExecute", "DevicePolicy", "DeviceAllow"),
)
_NAMESPACES: Final = (
    *("RootDirectory", "RootImage", "RootImageOptions", "RootVerity", "RootEphemeral", "MountAPIVFS"),
    *("ProtectSystem", "ProtectHome", "ProtectProc", "ProcSubset", "ProtectClock", "ProtectHostname"),
    *("ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs", "ProtectControlGroups"),
    *("PrivateTmp", "PrivateDevices", "PrivateNetwork", "PrivateUsers", "PrivateMounts", "PrivateIPC"),
    *("PrivatePIDs", "BindLogSockets", "NetworkNamespacePath", "IPCNamespacePath", "UserNamespacePath"),
    *("ReadWritePaths", "ReadOnlyPaths", "InaccessiblePaths", "ExecPaths", "NoExecPaths", "BindPaths"),
    *("BindReadOnlyPaths", "TemporaryFileSystem", "MountImages", "MountFlags", "ExtensionImages"),
    *("ExtensionDirectories", "RootImagePolicy", "MountImagePolicy", "ExtensionImagePolicy"),
)
_DIRECTORIES: Final = tuple(
    f"{kind}Directory{what}"
    for kind in ("Runtime", "State", "Cache", "Logs", "Configuration")
    for what in ("", "Mode", "Symlink")
)
_SETTINGS: Final = (*LIMITS, *_USER, *_ENVIRONMENT, *_RIGHTS, *_NAMESPACES, *_DIRECTORIES)

_MS_REC: Final = 0x4000


def limits(values: Mapping[str, Value]) -> list[Property]:
    """What a unit's processes may use.

    Args:
        values: all properties of a service that only services have.
    """
    return [(key, values[key]) for key in LIMITS if key in values and values[key][1] not in (None, "")]


def of_next_start(
    values: Mapping[str, Value], copies: Iterable[Copy], slots: str, again: Sequence[Again] = ()
) -> list[Property]:
    """What a unit's next start will give its processes, with these layers on `/etc`.

    Args:
        values: all properties of a service that only services have.
        copies: of the layers, bottom to top.
        slots: path of the directory with the unit's slots: layers from there are left out.
        again: what has to be said again of a sandbox where there are layers (`sandbox_settings.py`).
    """
    found = dict(filter(None, (_setting(values, key) for key in _SETTINGS)))
    layers = list(copies)
    # Its directory is there already if the service runs, or is started meanwhile, and must outlive the command.
    found["RuntimeDirectoryPreserve"] = "s", "yes"
    images = [one for one in _list(found, "ExtensionImages") if not one[0].startswith(f"{slots}/")]
    verifies = device_mapper.is_there() and _may_verify(found)
    images += [
        (one.protected if one.protected and verifies else one.path, False, [("root", MOUNT_OPTIONS)])
        for one in layers
        if one.kind is Kind.IMAGE
    ]
    trees = [
        one for one in _list(found, "ExtensionDirectories") if not one.lstrip("-+").startswith(f"{slots}/")
    ]
    trees += [one.path for one in layers if one.kind is Kind.DIRECTORY]
    found["ExtensionImages"] = "a(sba(ss))", images
    found["ExtensionDirectories"] = "as", trees
    if images and found.get("DevicePolicy", ("s", "auto"))[1] != "auto":  # see `unit_drop_in`
        allowed = [*_list(found, "DeviceAllow"), ("/dev/loop-control", "rw"), ("block-loop", "rw")]
        found["DeviceAllow"] = "a(ss)", allowed
    for key, paths, options in again if layers else ():
        if key == "ReadOnlyPaths":
            found[key] = "as", [*_list(found, key), f"-{paths[0]}"]
        else:
            flags = 0 if "norbind" in options else _MS_REC
            found[key] = "a(ssbt)", [*_list(found, key), (*paths, True, flags)]
    return list(found.items())


def _setting(values: Mapping[str, Value], key: str) -> Property | None:
    """A setting; of those that have become more than yes or no, all that they are now (`PrivateTmpEx`)."""
    key = f"{key}Ex" if f"{key}Ex" in values else key
    if key not in values or values[key][1] in ("", [], (False, []), [False, []]):
        return None
    return key, values[key]


def _list(found: Mapping[str, Value], key: str) -> list[Any]:
    return list(found[key][1]) if key in found else []


def _may_verify(found: Mapping[str, Value]) -> bool:
    """Whether the policy of a unit lets systemd verify: not, where the generator found no device mapper yet."""
    policy = found.get("ExtensionImagePolicy", ("s", ""))[1]
    try:
        return not policy or bool(image_policy.in_unit(policy).effective("root") & {"verity", "signed"})
    except ValueError:
        return True
