#!/bin/bash
# The first program of a node's container: start.sh PROGRAM ARGUMENT... starts the memory guard, then becomes PROGRAM.
# For `ray` it becomes ray_start.py, which is Ray with two refusals said in a sentence.
#
# Bash runs this file, because NVIDIA's images set library paths in bash's start-up files. The guard is a process of its
# own, because Ray may stand still where memory is short. Python starts without site-packages, so that little is locked.

guard() { # start the guard, and start it again if it dies
    while :; do
        python3 -IS "${0%/*}/memory_guard.py"
        sleep 0.5
    done
}

guard </dev/null &
[ "$1" != ray ] || set -- python3 "${0%/*}/ray_start.py" "$@"
exec "$@"
