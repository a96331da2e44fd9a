#!/usr/bin/env bash
# Draw the secrets of compose.yaml that are not there yet: docker/secrets.sh FOLDER. What is there is never changed.
# The folder is for its owner alone (0700). The files in it are readable (0444): containers get them one by one, as
# users of their own, and nobody else gets past the folder.
set -euo pipefail
folder=${1:?usage: secrets.sh FOLDER}
umask 077
mkdir -p "$folder"
chmod 0700 "$folder"
for name in postgres_password mlflow_db_password optuna_db_password mlflow_admin_password mlflow_study_password \
    mlflow_flask_key ray_token; do
    if [[ -s $folder/$name ]]; then continue; fi
    drawn=$(mktemp "$folder/.$name.XXXXXX")
    od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n' >"$drawn"
    chmod 0444 "$drawn"
    mv "$drawn" "$folder/$name"
done
