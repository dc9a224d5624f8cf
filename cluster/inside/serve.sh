#!/bin/bash
# The model's server in the head's container: serve.sh start|record|follow|state|stop|fetch [ARGUMENT...]
#
# `docker exec` passes no signal on, and its program loses standard output when `docker exec` ends. So the server gets a
# session, a log and a pid file of its own. Bash runs this file, because NVIDIA's images set library paths in bash's
# start-up files.

# The pid file ends with its container, because its number would be another process in the next container.
pid=${SERVE_PID:-/run/vllm-serve.pid}
# The server's command line, a word per line. `stop` deletes the file, so a file without a server means a crash.
words=${pid%.pid}.words
logs=${SERVE_LOGS:-/var/log/node-ray}
log=$logs/serve.log
log_bytes=${SERVE_LOG_BYTES:-$((64 * 1024 * 1024))}
log_look_s=${SERVE_LOG_LOOK_S:-60}

start() { # PROGRAM ARGUMENT...
    exec 9>"$pid.lock" # the server inherits this lock and holds it while it runs, so a second start is refused
    flock -n 9 || { echo "a server runs here already" >&2; exit 1; }
    rm -f "$logs/vitals.json" "$logs/memory-low.json" "$logs/ended.json" # they describe the last server
    [ ! -e "$log" ] || mv "$log" "$log.1"
    setsid "$@" </dev/null >>"$log" 2>&1 &
    echo $! >"$pid" # setsid makes this also the id of the server's process group
    printf '%s\n' "$@" >"$words"
    exec 9>&-
    cut_log $! </dev/null >/dev/null 2>&1 &
}

cut_log() { # until the server ends: when the log reaches log_bytes, move its lines to serve.log.1
    until timeout "$log_look_s" tail -f --pid="$1" /dev/null; do
        [ "$(stat -c %s "$log")" -lt "$log_bytes" ] || { cp "$log" "$log.1"; : >"$log"; }
    done
}

record() { # URL GIB: start the recorder beside the server. Kill an earlier recorder, which may be stuck
    recorder=${0%/*}/recorder.py
    pkill -KILL -f "^[^ ]*python[^ ]* $recorder $pid "
    setsid python3 "$recorder" "$pid" "$logs" "$@" </dev/null >>"$log" 2>&1 &
}

follow() { # show the log from its start until the server ends
    exec tail -n +1 -F --pid="$(cat "$pid")" "$log"
}

state() { # print 0 if the server runs, else 1; its start in seconds since 1970; its words. Without a server: nothing
    [ -e "$pid" ] || exit 0
    kill -0 -- "-$(cat "$pid")" 2>/dev/null
    echo $?
    stat -c %Y "$pid"
    [ ! -e "$words" ] || cat "$words"
}

stop() { # ask the server to end, wait up to 30 s, then force it
    rm -f "$words"
    server=$(cat "$pid") || exit
    kill -TERM "$server" 2>/dev/null || kill -TERM -- "-$server" || exit
    for _ in {1..30}; do
        kill -0 -- "-$server" 2>/dev/null || exit 0
        sleep 1
    done
    echo "still there after 30 s, killed" >&2
    kill -KILL -- "-$server"
}

fetch() { # hf download REPOSITORY FILE ... FOLDER: fetch the file once for a folder, and print the commit it came from
    noted=${!#}/.cache/huggingface/download/$4.metadata # hf writes this when the file is whole
    [ -e "${!#}/$4" ] && [ -e "$noted" ] || NO_COLOR=1 "$@" || exit
    head -n1 "$noted"
}

"$@" # the first argument names one of the functions above
