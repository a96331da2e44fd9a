#!/usr/bin/env bash
# What a container of this project's image is, by its first argument:
#
#   head | worker            a Ray node
#   study ARGUMENTS…         a command of study/launch.py; those that train join the cluster first, as a node without CPUs
#   mlflow | mlflow-users    the tracking server, and its users
#   health                   whether the ports answer that this container's role opens
#
# Passwords and the token are files in $SECRETS. What must be handed on is handed on in the environment of the one
# process that needs it, never in arguments, which everybody on the machine can list.
set -euo pipefail

APP=$(dirname "$(dirname "$(readlink -f "$0")")")
SECRETS=${SECRETS:-/run/secrets}
STORAGE=${STORAGE:-/storage}
HEAD=${HEAD:-head}                # host name of the head node
HEAD_PORT=6379                    # its GCS
NODE_PORT=${NODE_PORT:-6380}      # every node's own manager
MLFLOW_URI=${MLFLOW_URI:-http://mlflow:5000}
OBJECT_STORE=${OBJECT_STORE:-200000000}   # bytes; trials exchange requests and records alone
ROLE_FILE=${ROLE_FILE:-/tmp/role}

secret() {
    if [[ ! -s $SECRETS/$1 ]]; then
        echo "run.sh: $SECRETS/$1 is missing or empty: mount the secret $1" >&2
        exit 2
    fi
    cat "$SECRETS/$1"
}

with_token() { # said on every node, or nodes disagree on whether a token is needed
    secret ray_token >/dev/null
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$SECRETS/ray_token
}

own_address() { getent ahostsv4 "$(hostname)" | awk 'NR == 1 { print $1 }'; }

answers() { timeout 3 bash -c "</dev/tcp/$1/$2" 2>/dev/null; }

ray_node() { # the options of `ray start` that all nodes have in common, then the caller's
    ray start --node-ip-address="$(own_address)" --node-manager-port="$NODE_PORT" --disable-usage-stats \
        --object-store-memory="$OBJECT_STORE" "$@"
}

health() {
    case $(cat "$ROLE_FILE" 2>/dev/null) in
    head) answers "$(own_address)" "$HEAD_PORT" && answers "$(own_address)" "$NODE_PORT" ;;
    worker) answers "$(own_address)" "$NODE_PORT" && answers "$HEAD" "$HEAD_PORT" ;;
    mlflow) python3 -c 'import urllib.request as u; u.urlopen("http://127.0.0.1:5000/health", timeout=4)' ;;
    *) true ;; # one-shot: it is healthy as long as it runs
    esac
}

keeps() { # whether a command of launch.py has a storage
    case ${1:-list} in
    list | schema | check | ui | --help) return 1 ;;
    esac
}

trains() { # whether it starts trials
    case $1 in
    status | report | verify) return 1 ;;
    esac
    [[ " $* " != *" --plan "* && " $* " != *" --help "* ]]
}

study() {
    local -a options=()
    if keeps "$@"; then
        options+=(--storage "$STORAGE$([[ " $* " != *" --smoke "* ]] || echo /smoke)" --tracking-uri "$MLFLOW_URI")
        MLFLOW_TRACKING_USERNAME=study
        MLFLOW_TRACKING_PASSWORD=$(secret mlflow_study_password)
        export MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD
        if [[ $1 == search || $1 == ablate-best ]]; then
            PGPASSWORD=$(secret optuna_db_password)
            export PGPASSWORD
            options+=(--optuna-storage "${OPTUNA_URI:-postgresql+psycopg://optuna@postgres/optuna}")
        fi
        if trains "$@"; then join_cluster; fi
    fi
    exec python3 "$APP"/study/launch.py "$@" ${options[@]+"${options[@]}"}
}

join_cluster() { # make this container a node of the cluster, and name it in study's options
    with_token
    ray_node --address="$HEAD:$HEAD_PORT" --num-cpus=0 --num-gpus=0 >/tmp/ray-start.log 2>&1 ||
        { cat /tmp/ray-start.log >&2; exit 1; }
    options+=(--address "$HEAD:$HEAD_PORT")
}

head() {
    with_token
    # In a container's own network loopback would be out of reach; compose.yaml publishes it on the host's loopback alone.
    ray_node --head --port="$HEAD_PORT" --num-cpus=0 --num-gpus=0 --include-dashboard=true \
        --dashboard-host="${DASHBOARD_HOST:-127.0.0.1}" --dashboard-port=8265 --block
}

worker() {
    with_token
    ray_node --address="$HEAD:$HEAD_PORT" ${CPUS:+--num-cpus="$CPUS"} ${GPUS:+--num-gpus="$GPUS"} --block
}

mlflow_server() {
    PGPASSWORD=$(secret mlflow_db_password)
    MLFLOW_AUTH_ADMIN_PASSWORD=$(secret mlflow_admin_password)
    MLFLOW_FLASK_SERVER_SECRET_KEY=$(secret mlflow_flask_key)
    export PGPASSWORD MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
    export MLFLOW_AUTH_ADMIN_USERNAME=admin MLFLOW_AUTH_CONFIG_PATH=$APP/docker/mlflow-auth.ini
    # Its jobs judge answers of language models: seven processes that nothing here needs.
    export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=${MLFLOW_SERVER_ENABLE_JOB_EXECUTION:-false}
    export MLFLOW_BACKEND_STORE_URI=${MLFLOW_DATABASE:-postgresql+psycopg://mlflow@postgres/mlflow}
    exec mlflow server --app-name basic-auth --host 0.0.0.0 --port 5000 --workers "${MLFLOW_WORKERS:-2}" \
        --artifacts-destination "${ARTIFACTS:-/artifacts}" \
        --allowed-hosts "${MLFLOW_ALLOWED_HOSTS:-mlflow:5000,localhost:*,127.0.0.1:*}"
}

role=${1:-study}
shift || true
if [[ $role == health ]]; then
    health
    exit
fi
echo "$role" >"$ROLE_FILE"
case $role in
head) head ;;
worker) worker ;;
study) study "$@" ;;
mlflow) mlflow_server ;;
mlflow-users)
    MLFLOW_ADMIN_PASSWORD=$(secret mlflow_admin_password)
    MLFLOW_STUDY_PASSWORD=$(secret mlflow_study_password)
    export MLFLOW_ADMIN_PASSWORD MLFLOW_STUDY_PASSWORD
    exec python3 "$APP"/docker/mlflow_users.py "$MLFLOW_URI"
    ;;
*)
    echo "run.sh: $role is no role; expected head, worker, study, mlflow, mlflow-users or health" >&2
    exit 2
    ;;
esac
