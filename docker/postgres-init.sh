#!/usr/bin/env bash
# Run once by the image of PostgreSQL, on an empty volume: a role and databases each for MLflow and for Optuna, so that
# neither can read what is the other's. Passwords come from files; psql quotes them and takes them from no argument.
set -euo pipefail

make_owner() { # role, then its databases
    local role=$1 password
    password=$(cat "/run/secrets/${role}_db_password")
    if [[ -z $password ]]; then echo "postgres-init.sh: ${role}_db_password is empty" >&2; exit 2; fi
    shift
    OWNER_PASSWORD=$password psql --quiet --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres <<SQL
\\getenv password OWNER_PASSWORD
CREATE ROLE $role LOGIN PASSWORD :'password';
$(for database in "$@"; do
        echo "CREATE DATABASE $database OWNER $role;"
        echo "REVOKE ALL ON DATABASE $database FROM PUBLIC;"
    done)
SQL
}

make_owner mlflow mlflow mlflow_auth
make_owner optuna optuna
