#!/bin/bash
# The model's server in the head's container: serve.sh start|record|follow|state|stop|settle|fetch [ARGUMENT...]
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
    rm -f "$logs"/{vitals,ended,loading}.json "$logs/left.txt" # they describe the last server
    [ ! -e "$log" ] || mv "$log" "$log.1"
    # Otherwise Ray shows of lines that differ in numbers alone only the first, so the sizes of one rank are missing.
    RAY_DEDUP_LOGS=0 setsid "$@" </dev/null >>"$log" 2>&1 &
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

record() { # URL FLOOR DROP: start the recorder beside the server. Kill an earlier recorder, which may be stuck
    pkill -KILL -f "^bash $0 keep_recording "
    pkill -KILL -f "^[^ ]*python[^ ]* ${0%/*}/recorder.py $pid "
    setsid bash "$0" keep_recording "$@" </dev/null >>"$log" 2>&1 &
}

keep_recording() { # URL FLOOR DROP: run the recorder. If it dies while the server runs, start it again
    exec 9>"$pid.recorder" # the recorder inherits this lock, and `settle` waits for it
    flock 9
    until python3 "${0%/*}/recorder.py" "$pid" "$logs" "$@" || ! kill -0 -- "-$(cat "$pid")" 2>/dev/null; do
        sleep 1
    done
}

follow() { # show the log from its start until the server ends
    exec tail -n +1 -F --pid="$(cat "$pid")" "$log"
}

state() { # print 0 if the server runs, 2 if its first process is gone and others are left, 1 if none is left; its start
    # in seconds since 1970; its words. Without a server: nothing
    [ -e "$pid" ] || exit 0
    server=$(cat "$pid")
    if ! kill -0 -- "-$server" 2>/dev/null; then echo 1; elif [ -e "/proc/$server" ]; then echo 0; else echo 2; fi
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

settle() { # wait until the recorder has ended: it watches the ranks go, and writes what is left after 60 s
    flock -n "$pid.recorder" true && exit
    echo "waiting until no rank is left and every node has its memory back, for 60 s at most" >&2
    flock -w 70 "$pid.recorder" true || echo "the recorder beside the server does not end" >&2
    [ ! -e "$logs/left.txt" ] || cat "$logs/left.txt" >&2
}

fetch() { # hf download REPOSITORY FILE ... FOLDER: fetch the file once for a folder, and print the commit it came from
    noted=${!#}/.cache/huggingface/download/$4.metadata # hf writes this when the file is whole
    [ -e "${!#}/$4" ] && [ -e "$noted" ] || NO_COLOR=1 "$@" || exit
    head -n1 "$noted"
}

"$@" # the first argument names one of the functions above
