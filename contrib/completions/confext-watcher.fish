# SPDX-License-Identifier: LGPL-2.1-or-later
# Completion for fish: /usr/share/fish/vendor_completions.d/confext-watcher.fish

function __confext_watcher_services
    set -l state /var/lib/confext-watcher
    set -q STATE_DIRECTORY; and set state $STATE_DIRECTORY
    for path in $state/units/*
        test -L $path; and string replace -r '.*/(.*?)(\.exec)?$' '$1' -- $path
    end
end

set -l c complete -c confext-watcher
set -l first __fish_use_subcommand
set -l asks '__fish_seen_subcommand_from status plan history wait rollback remove origin diff'
set -l builds '__fish_seen_subcommand_from build'
set -l execs '__fish_seen_subcommand_from exec'

$c -f
$c -s h -l help -d 'Show the options'
$c -n $first -l version -d 'Show the version'
$c -n $first -a run -d 'the daemon, in the foreground'
$c -n $first -a exec -d 'start a program on its stack, without systemd'
$c -n $first -a status -d 'services, their stacks and versions, since when, last outcome'
$c -n $first -a plan -d 'what a look now would change, without doing it'
$c -n $first -a history -d 'what was applied, refused, rolled back, when and why'
$c -n $first -a wait -d 'block until an image is applied or refused'
$c -n $first -a rollback -d 'back to the stack before, and stay there'
$c -n $first -a init -d 'have a unit of systemd take part, with a first version of what it has now, and its check'
$c -n $first -a remove -d 'undo init: the service has the /etc of the host again'
$c -n $first -a enable -d 'have a unit of systemd take part, and say when that is so'
$c -n $first -a check -d 'would this image be admitted here?'
$c -n $first -a build -d 'make an image from a directory, or from files'
$c -n $first -a doctor -d 'is this host fit, and what to do where it is not'
$c -n $first -a origin -d 'which image the files of a service\'s /etc come from'
$c -n $first -a diff -d 'what would change in the /etc of a service, or did'
$c -n $asks -a '(__confext_watcher_services)'
$c -n '__fish_seen_subcommand_from status plan history wait rollback init remove enable check build doctor origin diff' -l json -d 'print one JSON object'
$c -n '__fish_seen_subcommand_from plan' -l check -d 'run its check, too'
$c -n '__fish_seen_subcommand_from plan' -l stat -d 'and the files that would change'
$c -n '__fish_seen_subcommand_from status' -s f -l follow -d 'stay, and keep it up to date'
$c -n '__fish_seen_subcommand_from plan' -l debug -d 'with a report for whoever mends the watcher'
$c -n '__fish_seen_subcommand_from history' -s v -l verbose -d 'with what was logged'
$c -n '__fish_seen_subcommand_from history' -x -s n -l lines -d 'the newest N'
$c -n '__fish_seen_subcommand_from history' -x -l outcome -a 'applied unchanged refused incomplete failed rolled-back needs-restart requested' -d 'these alone'
$c -n '__fish_seen_subcommand_from history' -x -l since -d 'from then on'
$c -n '__fish_seen_subcommand_from history' -x -l image -d 'of an image'
$c -n '__fish_seen_subcommand_from wait' -x -l timeout -d 'give up after so many seconds'
$c -n '__fish_seen_subcommand_from wait check build origin' -F
$c -n '__fish_seen_subcommand_from rollback' -x -l to -d 'to this stack'
$c -n '__fish_seen_subcommand_from rollback' -l forget -d undo
$c -n '__fish_seen_subcommand_from init' -r -F -l from -d 'of the /etc of the host'
$c -n '__fish_seen_subcommand_from init' -x -l name -d 'of the image'
$c -n '__fish_seen_subcommand_from init' -r -F -l recipe -d 'this recipe'
$c -n '__fish_seen_subcommand_from init' -x -a '(__fish_complete_users)' -l user -d 'who may deploy'
$c -n '__fish_seen_subcommand_from init remove' -l yes -d 'do it without asking'
$c -n '__fish_seen_subcommand_from init remove' -l dry-run -d 'only show what would be done'
$c -n '__fish_seen_subcommand_from remove' -l all -d 'also what init has not made'
$c -n '__fish_seen_subcommand_from diff' -x -l from -d 'from this stack'
$c -n '__fish_seen_subcommand_from diff' -r -F -l to -d 'to this stack, or with these images'
$c -n '__fish_seen_subcommand_from diff' -l stat -d 'one line for each file'
$c -n $builds -r -F -s o -l output -d 'the image, or its directory'
$c -n $builds -x -l name -d 'its name'
$c -n $builds -x -l version -d 'its version'
$c -n $builds -x -l for -a 'any host' -d 'systems that it is for'
$c -n $builds -x -l scope -a 'system initrd portable' -d 'scopes that it is for'
$c -n $builds -x -l format -a 'squashfs erofs ddi' -d 'what is made'
$c -n $builds -r -F -l sign -d 'private key to sign it with'
$c -n $builds -r -F -l certificate -d 'of that key'
$c -n $execs -x -l name -d 'name of the service'
$c -n $execs -r -F -l confext-dir -d 'directory that images are dropped into'
$c -n $execs -r -F -l extension-image -d 'an image, or a directory PATH.raw.v/'
$c -n $execs -r -F -l extension-directory -d 'a tree, or a directory PATH.v/'
$c -n $execs -x -l reload-signal -d 'sent after a change'
$c -n $execs -x -l reload-command -d 'run after a change'
$c -n $execs -x -l check -d 'run before the program sees a change'
$c -n $execs -x -l health-check -d 'run after a reload'
$c -n $execs -x -l set -d 'any other setting, KEY=VALUE'
