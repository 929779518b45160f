# SPDX-License-Identifier: LGPL-2.1-or-later
"""The interface of the control socket, as Varlink describes one: what each method takes and answers, and in which unit.

A new version may add fields, types and methods. It never takes one away: a reader may rely on all that is here.
"""

from __future__ import annotations

from watcher.records.traces_interface import DESCRIPTION as TRACES

DESCRIPTION = f"""\
# Services whose /etc is kept at the newest good configuration extension (confext) images.
# Reading calls are open to everybody, but for Trace and Compare; changing calls (Rollback, Forget, Reload) to root and
# to the user that the watcher runs as. All times are microseconds since the epoch, all durations microseconds.
#
# Reasons, paths, outputs and settings are for root, the watcher's own user and the members of the group
# confext-watcher: what a command has printed may be a password, and which paths there are is not for everybody. Others
# get `redacted: true`, and of these fields the empty value: source, reason, output; settings, remarks, report; and a
# message that only says the outcome and the verdict. To Wait for an image by its path is for them to wait for it by its
# file name.
interface io.confext.Watcher

# What was proved of an image.
# protection: "signed", "verity" (it is what its root hash stands for), or "unprotected", as directory trees are.
# signer: subject of the certificate whose key has signed it, and its fingerprint (SHA-256 of DER).
# how: in which way that was proved; "" where nothing was to be proved, or by an older version.
# remark: why it is not more, such as "signed by an unknown key".
type Trust (
  protection: string,
  signer: string,
  fingerprint: string,
  rootHash: string,
  how: string,
  remark: string
)

# One admitted image or directory tree in a stack.
# slot: its name under units/SERVICE/ in the state directory.
# digest: SHA-256 of its content.
# kind: "image" or "directory".
# source: the path that it was dropped at.
# fileSystem: of an image, by the kernel's name.
type Layer (
  slot: string,
  name: string,
  version: string,
  digest: string,
  kind: string,
  source: string,
  trust: Trust,
  fileSystem: string
)

# One outcome.
# outcome: "applied", "unchanged", "refused", "incomplete", "failed", "rolled-back",
# "needs-restart" or "requested" (somebody asked for Rollback or Forget: the message says who).
# verdict: how the service took the stack, null where it was not judged: "good", "check-failed" (it never saw it),
# "reload-failed", "health-check-failed" or "went-down" (the service ended or failed). There may be more one day.
# message: a sentence for people.
# stack, previous: identities of the stacks after and before.
# output: what the check or the reload printed, and what the service itself logged as errors from the swap to the
# verdict; History and Wait have it.
type Event (
  service: string,
  outcome: string,
  message: string,
  when: int,
  stack: string,
  previous: string,
  image: string,
  version: string,
  digest: string,
  source: string,
  reason: string,
  output: string,
  swapUSec: ?int,
  totalUSec: ?int,
  layers: []Layer,
  verdict: ?string
)

# What is so now of an image that somebody waits for.
# kind: a word, see the table in confext-watcher(1). There may be more one day.
# status: 0 if the service runs on it, or would at its next start where it does not run; 1 if it will not come by
# itself; 4 if it is in progress. The exit status of the command line.
# text: a sentence for people.
# command: what helps, "" where no command does.
type Answer (
  kind: string,
  status: int,
  text: string,
  command: string
)

# Content that a service must not get again.
type Quarantined (
  service: string,
  digest: string,
  reason: string,
  when: int,
  source: string
)

# Something seen while looking. level: "debug", "info" or "warning".
type Remark (
  level: string,
  path: string,
  text: string
)

# A setting of a service as it is written, and where: "FILE:LINE", or the option of `exec`.
type Setting (
  key: string,
  value: string,
  source: string
)

# One file or tree that lies there for an entry, and what becomes of it.
# kind: a word of Answer's. An older one than what is used is "older"; what is used is "applied", "accepted" and so on.
# reason: why it is not used, for people; "" where it is.
# until: until when that is so, "" where it is not known.
# command: what helps, "" where no command does.
# triesLeft, triesDone: its counters (systemd.v(7)).
# digest: of its content; "" where that was not read.
type CandidateStatus (
  path: string,
  version: string,
  digest: string,
  kind: string,
  reason: string,
  until: string,
  command: string,
  triesLeft: ?int,
  triesDone: ?int
)

# An entry, that is a source that the unit declares or one of `.confext.d/`, with all that lies there, best first.
# kind: "image" or "directory".
type EntryStatus (
  slot: string,
  path: string,
  kind: string,
  declared: bool,
  candidates: []CandidateStatus
)

# manager: "systemd" or "standalone".
# state: "running", "stopped", "needs-restart", or "template", which runs as its instances alone.
# stack: what its main process runs on, by its layers (bottom to top); empty is its own /etc.
# accepted: the stack that its next start gets.
# since: when the stack was put in place.
# last: its newest outcome.
# onTrial: what it runs on was not judged yet; `last` is about something before.
# pinned: the stack that it was rolled back to by hand, and stays on.
# settings: those that do not have their defaults.
# notAllowed: what of its stack would not get in now, since a policy is stricter than it was.
# newer: what would be used in the place of what it has, and is not.
# step, stepSince: what it is at just now, and since when: "check", "reload", "watch" (how it takes its stack) and
# "start"; "" if nothing. There may be more one day.
# drifted: of the accepted stack, which host files below it the service does not see.
# entries, remarks: all that lies there, and what else a look finds now: with `deep`.
type ServiceStatus (
  service: string,
  manager: string,
  state: string,
  pid: ?int,
  stack: string,
  accepted: string,
  layers: []Layer,
  since: ?int,
  last: ?Event,
  pinned: ?string,
  quarantined: []Quarantined,
  settings: []Setting,
  onTrial: bool,
  notAllowed: []Remark,
  newer: []CandidateStatus,
  step: string,
  stepSince: ?int,
  entries: []EntryStatus,
  remarks: []Remark,
  drifted: []Drift
)

# A file of the host that a file of an image covers, and that has changed since the stack was accepted.
# image: what covers it. change: "changed", "came" or "went".
type Drift (
  path: string,
  image: string,
  change: string
)

# What a look now would change.
# reload: how the service would be told, "" if nothing changes.
# check: with `check`, what Check= says of the stack that the service should have: "" if it passed, else why not; null:
# it was not run, and a remark says why.
# report: with `debug`, all that the look has found, and the next step: JSON in ASCII, for people who mend the
# watcher. What is in it is not part of this interface, and changes with the program.
type PlannedChange (
  service: string,
  changes: bool,
  stack: string,
  wanted: string,
  layers: []Layer,
  wantedLayers: []Layer,
  reload: string,
  remarks: []Remark,
  report: ?string,
  check: ?string
)

# The services that take part, or one of them. `deep` needs a service: it is looked at what lies there for it.
method Status(service: ?string, deep: ?bool) -> (services: []ServiceStatus, redacted: bool)

# Outcomes, newest first: at most `limit` (100 if not given), of those to which all that is given applies.
# outcomes: as in Event.
# since: not before that.
# image: name of an image, with or without its version and ".raw", or how its digest begins (8 characters at least).
# truncated: there were more of them than one reply can hold.
method History(
  service: ?string,
  limit: ?int,
  outcomes: ?[]string,
  since: ?int,
  image: ?string
) -> (events: []Event, truncated: bool, redacted: bool)

# What a look now would change, without doing it. `debug` needs a service. `check` runs each service's Check=, where the
# service cannot see it; it is for those who are told reasons.
method Plan(service: ?string, debug: ?bool, check: ?bool) -> (changes: []PlannedChange, redacted: bool)

# Replies once the answer is final, that is 0 or 1: at once if it is already. It is about the content that the file has
# now. With `more`, the answers before are told as well, each once it is so. Ends with the connection.
# event: the outcome that the answer is the end of; where there is none, one of this moment, which is not in History.
method Wait(service: string, image: string) -> (event: Event, answer: Answer, redacted: bool)

# Back to the stack before, or to the given one, and stay there. A second call goes further back. Done, or Failed: then
# the service stays on what it has. With `more`, the first reply says where it goes, before it does.
method Rollback(service: string, to: ?string) -> (event: Event)

# Lets content back in: all of it that the service has in quarantine, or one digest. Undoes Rollback as well.
method Forget(service: string, digest: ?string) -> (forgotten: []Quarantined)

# Reads the settings again, and looks at every service.
method Reload() -> ()

{TRACES}
# No service of this name takes part.
# nearest: the one that was probably meant, "" if none is called like it.
error ServiceNotFound (service: string, nearest: string)

# The service has never been on this stack, or its copy is gone. An empty `stack` means that there is none before.
error NoSuchStack (service: string, stack: string)

# Only root and the watcher's own user may do this.
error NotPermitted (method: string)

# Only root, the watcher's own user and the members of this group may do this.
error MembersOnly (method: string, group: string)

# So many calls of Wait by this user wait already: there is room for another when one of them ends.
error TooManyCalls (uid: int, limit: int)

# It was tried and did not work. The reason is empty for those who are not told reasons.
error Failed (reason: string)
"""
