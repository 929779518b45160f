# SPDX-License-Identifier: LGPL-2.1-or-later
# Completion for bash: /usr/share/bash-completion/completions/confext-watcher

_confext_watcher_services() {
    local state=${STATE_DIRECTORY:-/var/lib/confext-watcher} path
    for path in "$state"/units/*; do
        [[ -L $path ]] && path=${path%.exec} && printf '%s\n' "${path##*/}"
    done
}

_confext_watcher() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
    local commands="run exec status plan history wait rollback init remove enable check build doctor origin diff" command= word options= i
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        # What comes after the program's name belongs to the program.
        [[ $command = exec && $word = -- ]] && { compopt -o default; return; }
        [[ -z $command && $word != -* ]] && command=$word
    done
    if [[ -z $command ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$commands --help --version" -- "$cur")
        return
    fi
    case $prev in
        --confext-dir | --extension-directory) mapfile -t COMPREPLY < <(compgen -d -- "$cur"); return ;;
        --extension-image) compopt -o default; return ;;
        --reload-signal) mapfile -t COMPREPLY < <(compgen -A signal -- "$cur"); return ;;
        --reload-command | --check | --health-check) compopt -o default; return ;;
        --output | -o | --sign | --certificate) compopt -o default; return ;;
        --format) mapfile -t COMPREPLY < <(compgen -W "squashfs erofs ddi" -- "$cur"); return ;;
        --outcome)
            mapfile -t COMPREPLY < <(compgen -W "applied unchanged refused incomplete failed rolled-back
                needs-restart requested" -- "$cur")
            return ;;
        --for) mapfile -t COMPREPLY < <(compgen -W "any host" -- "$cur"); return ;;
        --scope) mapfile -t COMPREPLY < <(compgen -W "system initrd portable" -- "$cur"); return ;;
        --version) [[ $command = build ]] && return ;;
        --from) [[ $command = init ]] && compopt -o default; return ;;
        --recipe) compopt -o default; return ;;
        --user) mapfile -t COMPREPLY < <(compgen -u -- "$cur"); return ;;
        --name | --set | --lines | -n | --since | --image | --timeout) return ;;
        --to) [[ $command = diff ]] && compopt -o default; return ;;
    esac
    case $command in
        exec)
            options="--name --confext-dir --extension-image --extension-directory --reload-signal
                --reload-command --check --health-check --set --" ;;
        status) options="--follow --json" ;;
        plan) options="--check --stat --debug --json" ;;
        history) options="--verbose --lines --outcome --since --image --json" ;;
        wait) options="--timeout --json" ;;
        rollback) options="--to --forget --json" ;;
        init) options="--from --name --recipe --user --yes --dry-run --json" ;;
        remove) options="--all --yes --dry-run --json" ;;
        enable) options="--json" ;;
        check) options="--json" ;;
        build)
            options="--output --name --version --for --scope --format --sign --certificate --json" ;;
        doctor) options="--json" ;;
        origin) options="--json" ;;
        diff) options="--from --to --stat --json" ;;
    esac
    if [[ $cur = -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$options --help" -- "$cur")
    elif [[ $command = check || $command = build || ($command = wait && $prev != wait) || ($command = origin && $prev != origin) ]]; then
        compopt -o default
    elif [[ $command != run && $command != exec && $command != enable && $command != init && $command != doctor ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$(_confext_watcher_services)" -- "$cur")
    fi
}

complete -F _confext_watcher confext-watcher
