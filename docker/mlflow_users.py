"""Make the MLflow user that studies log in as, or give it its present password; run once after the server is up.

Usage: MLFLOW_ADMIN_PASSWORD=… MLFLOW_STUDY_PASSWORD=… python mlflow_users.py http://mlflow:5000
"""

from __future__ import annotations

import base64
import json
import os
import sys
import urllib.error
import urllib.request

USER = "study"


def main() -> None:
    """Create the user, or set its password.

    Raises:
        SystemExit: the server refuses; says what it said.
    """
    uri, password = sys.argv[1].rstrip("/"), os.environ["MLFLOW_STUDY_PASSWORD"]
    account = {"username": USER, "password": password}
    status, said = ask(uri, "POST", "users/create", account)
    if status == 400 and "RESOURCE_ALREADY_EXISTS" in said:
        status, said = ask(uri, "PATCH", "users/update-password", account)
    if status != 200:
        raise SystemExit(f"mlflow_users.py: {uri} refuses user {USER!r}: {status} {said}")
    print(f"MLflow user {USER!r} is there")


def ask(uri: str, method: str, what: str, content: dict[str, str]) -> tuple[int, str]:
    """Status and text of the server's answer to the administrator."""
    login = base64.b64encode(f"admin:{os.environ['MLFLOW_ADMIN_PASSWORD']}".encode()).decode()
    headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
    request = urllib.request.Request(
        f"{uri}/api/2.0/mlflow/{what}", json.dumps(content).encode(), headers, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


if __name__ == "__main__":
    main()
